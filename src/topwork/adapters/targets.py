"""Which modules an adapter goes into, decided exactly as PEFT decides it, and loud about misses. Free of torch."""

import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from topwork.adapters.config import PEFT_TARGETS, Targeted
from topwork.adapters.peft_targets import peft_names
from topwork.adapters.places import CALLED, Module, Places
from topwork.common.errors import AdapterError
from topwork.common.kinds import Kind

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head."""
PLAIN = re.compile(r"[\w.\-]+")
"""A name, which an expression for whole paths would hardly be."""


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
    """Paths of the modules of any kind that `target_modules` names and nothing leaves out; AdapterError for none, and
    for a name, an expression or a layer that matches nothing."""
    kept = _in_layers(free_modules(base, config), config)
    if not kept:
        matched = len(named_modules(base, config))
        raise AdapterError(
            f"target_modules {config.target_modules!r} matched {matched} modules, and exclude_modules, "
            "modules_to_save or layers_to_transform left none of them; loosen one of these."
        )
    return kept


def free_modules(base: Places, config: Targeted) -> list[str]:
    """The same in all layers."""
    chosen = named_modules(base, config)
    excluded = excluded_modules(base.by_path, config.exclude_modules, chosen)
    saved = config.saved_modules
    return [
        path for path in chosen
        if path not in excluded and not any(f".{name}." in f".{path}." for name in saved)
    ]  # fmt: skip


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


def named_modules(base: Places, config: Targeted) -> list[str]:
    """Paths of the modules that `target_modules` names, whatever leaves some of them out again. Raises AdapterError for
    a name that matches nothing."""
    modules, asked = base.by_path, config.target_modules
    if asked == ALL_LINEAR:
        return [path for path, module in modules.items() if module.kind == "linear" and path != base.head]
    names = listed(modules, peft_names(config.method, base.family) if asked == PEFT_TARGETS else asked)
    found = matching(modules, names)
    if not found:
        wanted = [names] if isinstance(names, str) else names
        hints = "".join(near_names(name, modules) for name in wanted[:1])
        raise AdapterError(
            f"target_modules {names!r} matches no module{hints}. Give all-linear, names such as "
            f"{', '.join(linear_names(modules))}, "
            "or a regular expression for whole paths."
        )
    for name in idle_names(modules, names) if isinstance(names, list) and asked != PEFT_TARGETS else ():
        raise AdapterError(f"target_modules names {name!r}, which matches no module{near_names(name, modules)}")
    return found


def listed(paths: Iterable[str], names: str | list[str]) -> str | list[str]:
    """`q_proj` alone is a list of one: as an expression for whole paths it would match nothing."""
    if isinstance(names, str) and PLAIN.fullmatch(names) and not matching(paths, names):
        return [names]
    return names


def excluded_modules(
    modules: Mapping[str, Module], names: str | list[str] | None, chosen: Collection[str]
) -> set[str]:  # fmt: skip
    """Paths that `exclude_modules` leaves out. Raises AdapterError for a name or an expression that leaves nothing out
    because it matches no module, or because it matches a module that holds what was chosen and is not chosen itself:
    as in PEFT, what lies in a module that is left out is not left out by that."""
    if not names:
        return set()
    for name in idle_names(modules, names):
        near = near_names(name, modules)
        if isinstance(names, str) and matching(modules, [name]):
            near = f" whole; it is a regular expression for whole paths, names are given in a list: [{name}]"
        raise AdapterError(f"exclude_modules names {name!r}, which matches no module{near}")
    found = _by_ending(modules)
    for name in names if isinstance(names, list) else ():
        outer = set(found[name])
        if any(is_layer(modules[path]) for path in outer):
            continue
        inside = next((path for path in chosen if not outer.isdisjoint(_above(path))), None)
        if inside is not None:
            raise AdapterError(
                f"exclude_modules names {name!r}, which is no layer itself, and {inside} in it stays chosen; name the "
                rf"layers, or give a regular expression for whole paths: .*\.{re.escape(name)}\..*"
            )
    return set(matching(modules, names))


def is_layer(module: Module) -> bool:
    """Whether a module has weights itself, and does not only hold others."""
    return module.kind != "other" or bool(module.tensors)


def matching(paths: Iterable[str], names: str | list[str]) -> list[str]:
    """A string is a regular expression for the whole path; a list is of paths or path endings."""
    if isinstance(names, str):
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise AdapterError(f"{names!r} is no regular expression ({error}); for endings give a list") from error
        return [path for path in paths if pattern.fullmatch(path)]
    wanted = set(names)
    return [path for path in paths if not wanted.isdisjoint(_endings(path))]


def idle_names(paths: Collection[str], names: str | list[str]) -> list[str]:
    """Those of the names, or the regular expression, that match none of the paths."""
    if isinstance(names, str):
        return [] if matching(paths, names) else [names]
    there = _by_ending(paths)
    return [name for name in names if name not in there]


def _by_ending(paths: Iterable[str]) -> dict[str, list[str]]:
    """What a name in a list matches."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for ending in _endings(path):
            found.setdefault(ending, []).append(path)
    return found


def _endings(path: str) -> Iterator[str]:
    """The path, and what is behind each of its dots."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that it lies in."""
    while (path := path.rpartition(".")[0]) != "":
        yield path


def _in_layers(paths: Sequence[str], config: Targeted) -> list[str]:
    """Those that lie in `layers_to_transform`. Raises AdapterError for a layer that none lies in, while others do."""
    if config.layers_pattern and config.layers_to_transform is None:
        raise AdapterError(
            f"layers_pattern {config.layers_pattern!r} says where layers are found, and layers_to_transform, which of "
            "them, is not given; give both or neither"
        )
    wanted = layers_of(config)
    if not wanted:
        return list(paths)
    found = {path: layer for path in paths if (layer := layer_of(path, config)) is not None}
    kept = [path for path in paths if is_whole_path(path, config) or found.get(path) in wanted]
    idle = sorted(set(wanted) - set(found.values()))
    if kept and idle:
        there = sorted(set(found.values()))
        raise AdapterError(
            f"layers_to_transform names {', '.join(map(str, idle))}, where no module is chosen"
            f"{f'; there are {there[0]} to {there[-1]}' if there else ''}"
        )
    return kept


def layers_of(config: Targeted) -> list[int]:
    """`layers_to_transform` as a list."""
    wanted = config.layers_to_transform
    return [wanted] if isinstance(wanted, int) else list(wanted or ())


def is_whole_path(path: str, config: Targeted) -> bool:
    """PEFT asks no layer of a module that is named by its whole path."""
    return isinstance(config.target_modules, list) and path in config.target_modules


def layer_of(path: str, config: Targeted) -> int | None:
    """The number of the layer that a module lies in; None where it lies in none."""
    patterns = config.layers_pattern or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        match = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", path)  # the first number: experts have numbers too
        if match:
            return int(match.group(1))
    return None


def near_names(name: str, paths: Iterable[str]) -> str:
    """'; did you mean …?' for the nearest endings of paths, or nothing where none is near."""
    endings = {".".join(path.split(".")[-n:]) for path in paths for n in (1, 2)}
    near = get_close_matches(name, sorted(endings), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
