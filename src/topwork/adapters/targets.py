"""Which modules an adapter goes into, decided exactly as PEFT decides it, and loud about misses. Free of torch."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from difflib import get_close_matches

from topwork.adapters.config import Targeted
from topwork.adapters.places import CALLED, Module, Places
from topwork.common.errors import AdapterError
from topwork.common.kinds import Kind


def find_targets(base: Places, config: Targeted, fitting: Container[Kind] = ("linear",)) -> list[str]:
    """Paths of the modules that `config` names, in the model's order; all-linear leaves the output head out.

    Raises AdapterError where a name matches nothing, with the nearest names there are, and where a match is not of the
    kinds that are fitting.
    """
    kept, modules = choose_modules(base, config), base.by_path
    wrong = [path for path in kept if modules[path].kind not in fitting]
    if wrong:
        raise AdapterError(
            f"target_modules names {wrong[0]!r}, which is {CALLED[modules[wrong[0]].kind]}; an adapter goes into "
            f"linear layers: {', '.join(linear_names(modules))}. Train it whole with modules_to_save instead."
        )
    return kept


def choose_modules(base: Places, config: Targeted) -> list[str]:
    """Paths of the modules of any kind that `target_modules` names and nothing leaves out; AdapterError for none."""
    modules = base.by_path
    chosen = _named(modules, config.target_modules, base.head)
    excluded = set(matching(modules, config.exclude_modules)) if config.exclude_modules else set()
    saved = config.saved_modules
    kept = [
        path for path in chosen
        if path not in excluded and not any(f".{name}." in f".{path}." for name in saved) and _in_layers(path, config)
    ]  # fmt: skip
    if not kept:
        raise AdapterError(
            f"target_modules {config.target_modules!r} matched {len(chosen)} modules, and exclude_modules, "
            "modules_to_save or layers_to_transform left none of them; loosen one of these."
        )
    return kept


def find_saved(base: Places, names: Sequence[str]) -> list[str]:
    """Paths of the modules that `modules_to_save` names; AdapterError for a name that matches nothing.

    As in PEFT, which saves by the same rule, a name is any ending: `norm` is `input_layernorm` too.
    """
    modules = base.by_path
    for name in names:
        if not any(path.endswith(name) for path in modules):
            raise AdapterError(f"modules_to_save names {name!r}, which matches no module{near_names(name, modules)}")
    found = [path for path in modules if path.endswith(tuple(names))]
    mixing = [path for path in found if modules[path].attends]
    if mixing:
        inside = sorted({path.rpartition(".")[2] for path in modules if path.startswith(mixing[0] + ".")})
        raise AdapterError(
            f"modules_to_save chooses {mixing[0]}, which mixes tokens of a sequence; a copy that sees an adapter's own "
            f"rows can't stand for it: name the modules in it ({', '.join(inside[:12])})"
        )
    return found


def refuse_overlap(targets: Sequence[str], saved: Sequence[str]) -> None:
    """AdapterError where a module is saved whole and another part goes into it."""
    for whole in saved:
        inside = [path for path in (*targets, *saved) if path.startswith(whole + ".")]
        inside += [whole] if whole in targets else []
        if inside:
            raise AdapterError(
                f"modules_to_save chooses {whole}, and {inside[0]} is chosen as well; one module can't be both, give "
                "longer names in modules_to_save or leave the other out with exclude_modules"
            )


def linear_names(modules: Mapping[str, Module]) -> list[str]:
    """The distinct last names of the linear layers."""
    return sorted({path.rpartition(".")[2] for path, module in modules.items() if module.kind == "linear"})


def _named(modules: Mapping[str, Module], names: str | list[str], head: str | None) -> list[str]:
    if names == "all-linear":
        return [path for path, module in modules.items() if module.kind == "linear" and path != head]
    found = matching(modules, names)
    if not found:
        wanted = [names] if isinstance(names, str) else names
        hints = "".join(near_names(name, modules) for name in wanted[:1])
        raise AdapterError(
            f"target_modules {names!r} matches no module{hints}. Give all-linear, names such as "
            f"{', '.join(linear_names(modules))}, "
            "or a regular expression for whole paths."
        )
    if isinstance(names, list):
        for name in names:
            if not any(_ends(path, name) for path in modules):
                hint = near_names(name, modules)
                raise AdapterError(f"target_modules names {name!r}, which matches no module{hint}")
    return found


def matching(paths: Iterable[str], names: str | list[str]) -> list[str]:
    """A string is a regular expression for the whole path; a list is of paths or path endings."""
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise AdapterError(f"{names!r} is no regular expression ({error}); for endings give a list") from error
        return [path for path in paths if pattern.fullmatch(path)]
    return [path for path in paths if any(_ends(path, name) for name in names)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _in_layers(path: str, config: Targeted) -> bool:
    wanted = config.layers_to_transform
    layers = [wanted] if isinstance(wanted, int) else wanted
    if not layers or (isinstance(config.target_modules, list) and path in config.target_modules):
        return True  # PEFT asks no layer of a module that is named by its whole path
    patterns = config.layers_pattern or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        match = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", path)  # the first number: experts have numbers too
        if match:
            return int(match.group(1)) in layers
    return False


def near_names(name: str, paths: Iterable[str]) -> str:
    """'; did you mean …?' for the nearest endings of paths, or nothing where none is near."""
    endings = {".".join(path.split(".")[-n:]) for path in paths for n in (1, 2)}
    near = get_close_matches(name, sorted(endings), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
