"""What is wrong between a file's tensors and the parts that its options make in a base: each misfit as its kind."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from topwork.adapters.names import split_name
from topwork.common.errors import shortened

_RANK_AXIS = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""Where the rank stands in a factor's shape."""
LENGTHS = "lora_magnitude_vector"
_NUMBER = re.compile(r"\.(\d+)\.")


def misfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """Why `tensors` are not what `own`, by the same names, has room for; None where they are."""
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
    told = [*_of_lengths(missing, unknown), *_of_ranks(wrong, own, tensors)]
    told += _of_layers(unknown, own)
    told += _of_whole_modules(unknown)
    told += _of_prefix(unknown, missing, own)
    told += [f"{len(missing)} missing (first {missing[0]})"] if missing else []
    told += [f"{len(unknown)} unknown (first {shortened(unknown[0], 120)})"] if unknown else []
    others = [key for key in wrong if not _is_rank(key, own, tensors)]
    told += [
        f"{len(others)} of another shape (first {others[0]}: {tuple(tensors[others[0]].shape)} in the file, "
        f"{tuple(own[others[0]].shape)} here). Is it another base's?"
    ] if others else []  # fmt: skip
    return "; ".join(told) or None


def _of_lengths(missing: list[str], unknown: list[str]) -> list[str]:
    """Takes what it tells of out of the lists, as all of these do."""
    more, fewer = (_taken(keys, [key for key in keys if key.endswith(LENGTHS)]) for keys in (unknown, missing))
    told = []
    if more:
        told.append(
            f"the file holds DoRA's lengths at {len(more)} modules (first {more[0]}), and the options say "
            "use_dora: false; say true in adapter_config.json if it was trained as DoRA, else take them out of the file"
        )
    if fewer:
        told.append(
            f"the options say use_dora: true, and {len(fewer)} modules have no length in the file (first "
            f"{fewer[0]}); save it again with them, or say false if it was trained without"
        )
    return told


def _of_ranks(wrong: Sequence[str], own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    ranked = [key for key in wrong if _is_rank(key, own, tensors)]
    if not ranked:
        return []
    path, part = split_name(ranked[0])
    axis, count = _RANK_AXIS[part], len({split_name(key)[0] for key in ranked})
    return [
        f"{path} has the rank {tensors[ranked[0]].shape[axis]} in the file and {own[ranked[0]].shape[axis]} by the "
        f"options ({count} modules in all); set r, or rank_pattern, to what the file has"
    ]


def _is_rank(key: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether two factors differ in their rank alone."""
    axis, here, there = _RANK_AXIS.get(split_name(key)[1]), own[key].shape, tensors[key].shape
    return axis is not None and len(there) == 2 and here[axis] != there[axis] and here[1 - axis] == there[1 - axis]


def _of_layers(unknown: list[str], own: Mapping[str, Tensor]) -> list[str]:
    """Layers that the file has and this base has not."""
    known = {_numbered(key) for key in own}
    here = {number for key in own if (number := _layer(key)) is not None}
    beyond = [
        key for key in unknown
        if (number := _layer(key)) is not None and here and number > max(here) and _numbered(key) in known
    ]  # fmt: skip
    if not _taken(unknown, beyond):
        return []
    last = max(number for key in beyond if (number := _layer(key)) is not None)
    return [
        f"the file has layers up to {last} ({len(beyond)} tensors, first {beyond[0]}), and by the options the last one "
        f"here is {max(here)}: it is another base's, or layers_to_transform leaves them out"
    ]


def _of_whole_modules(unknown: list[str]) -> list[str]:
    """Modules that were trained whole, which the options do not name."""
    whole = [key for key in unknown if split_name(key)[1] in ("weight", "bias") and "lora_" not in key]
    if not _taken(unknown, whole):
        return []
    paths = sorted({split_name(key)[0] for key in whole})
    return [
        f"the file holds {', '.join(paths[:3])}{' …' if len(paths) > 3 else ''} whole ({len(paths)} modules), which "
        "the options do not name; add what this base has of them to modules_to_save"
    ]


def _of_prefix(unknown: list[str], missing: Sequence[str], own: Mapping[str, Tensor]) -> list[str]:
    """Names of which none begins as one of this base's."""
    firsts = {key.partition(".")[0] for key in own}
    strange = [key for key in unknown if "." in key and key.partition(".")[0] not in firsts]
    if not missing or not _taken(unknown, strange):
        return []
    theirs, ours = _common(strange), _common(missing)
    return [
        f"{len(strange)} names begin with {theirs!r}, which no module here does ({ours!r} does): they are of another "
        "kind of model, or something was put around it while it was saved"
    ]


def _taken(keys: list[str], some: list[str]) -> list[str]:
    """Some of the keys, which then are no longer among them."""
    keys[:] = [key for key in keys if key not in set(some)]
    return some


def _layer(key: str) -> int | None:
    match = _NUMBER.search(key)
    return int(match.group(1)) if match else None


def _numbered(key: str) -> str:
    return _NUMBER.sub(".#.", key, count=1)


def _common(keys: Sequence[str]) -> str:
    """What all begin with, in whole names."""
    parts = [split_name(key)[0].split(".") for key in keys]
    shared = []
    for names in zip(*parts):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared) + "." if shared else parts[0][0] + "."
