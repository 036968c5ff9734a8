"""Which modules of a base read text, where others beside them read pictures or sound. Free of torch."""

from collections.abc import Iterable


def part_around(embedding: str | None, linear: Iterable[str]) -> str:
    """The path of the part that reads text: the nearest module around the input embedding that holds linear layers too;
    an empty one where that is the whole model."""
    part = (embedding or "").rpartition(".")[0]
    paths = list(linear)
    while part and not any(path.startswith(f"{part}.") for path in paths):
        part = part.rpartition(".")[0]
    return part


def reads_text(path: str, part: str, head: str | None) -> bool:
    """Whether a module is in the part that reads text, or the output head. An empty part is all of a base."""
    return not part or path in (part, head) or path.startswith(f"{part}.")
