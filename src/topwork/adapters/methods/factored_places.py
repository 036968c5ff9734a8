"""Where VeRA, LoHa, LoKr and OFT put their parts, and how large they are. Free of torch: a base's config is enough."""

from collections.abc import Sequence
from math import isqrt

from topwork.adapters.config import AdapterConfig, LohaConfig, LokrConfig, OftConfig, VeraConfig
from topwork.adapters.places import Places, Sizes
from topwork.adapters.targets import find_targets
from topwork.common.errors import AdapterError

Shape = tuple[int, int]


def vera_sizes(base: Places, config: VeraConfig) -> Sizes:
    """A vector for the outputs and one for the ranks at every target; the matrices between them are not learned."""
    return {path: (base.by_path[path].rows, config.r) for path in find_targets(base, config)}


def widest(base: Places, paths: Sequence[str]) -> Shape:
    """(inputs, outputs): the most that any of these linear layers has."""
    modules = [base.by_path[path] for path in paths]
    return max(module.columns for module in modules), max(module.rows for module in modules)


def loha_sizes(base: Places, config: LohaConfig) -> Sizes:
    """Two pairs of factors at every target."""
    modules = {path: base.by_path[path] for path in find_targets(base, config)}
    return {path: 2 * (config.r * module.rows, config.r * module.columns) for path, module in modules.items()}


def lokr_sizes(base: Places, config: LokrConfig) -> Sizes:
    """The two matrices of a Kronecker product at every target, or their factors."""
    modules = {path: base.by_path[path] for path in find_targets(base, config)}
    return {
        path: tuple(rows * columns for rows, columns in lokr_shapes(module.columns, module.rows, config).values())
        for path, module in modules.items()
    }


def lokr_shapes(inputs: int, outputs: int, config: LokrConfig) -> dict[str, Shape]:
    """By PEFT's names. The matrices are [a, b] and [c, d] with a c = outputs and b d = inputs; the second is a product
    of rank r where r is less than half its longer side, the first too with `decompose_both`."""
    r, factor = config.r, config.decompose_factor
    (b, d), (a, c) = two_factors(inputs, factor), two_factors(outputs, factor)

    def shapes(name: str, rows: int, columns: int, whole: bool) -> dict[str, Shape]:
        return {name: (rows, columns)} if whole else {f"{name}_a": (rows, r), f"{name}_b": (r, columns)}

    first = not config.decompose_both or 2 * r >= max(a, b)
    return shapes("lokr_w1", a, b, first) | shapes("lokr_w2", c, d, 2 * r >= max(c, d))


def two_factors(size: int, wanted: int) -> Shape:
    """Two numbers whose product is `size`: `wanted` and the rest where that divides it, else the pair nearest to the
    square root whose smaller is no more than `wanted` (-1 asks for nothing), the smaller first."""
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    most = isqrt(size) if wanted == -1 else min(isqrt(size), wanted)
    smaller = max(number for number in range(1, max(most, 1) + 1) if size % number == 0)
    return smaller, size // smaller


def oft_sizes(base: Places, config: OftConfig) -> Sizes:
    """The upper triangles of a skew-symmetric matrix for every block of a target's inputs."""
    sizes: Sizes = {}
    for path in find_targets(base, config):
        blocks, block = oft_blocks(base.by_path[path].columns, config)
        sizes[path] = ((1 if config.block_share else blocks) * (block * (block - 1) // 2),)
    return sizes


def oft_blocks(inputs: int, config: OftConfig) -> Shape:
    """(how many blocks, inputs in each). What does not divide the inputs gives way to the nearest that does, as in
    PEFT; of two as near to the smaller."""
    asked = config.r or config.oft_block_size
    if not asked:
        raise AdapterError("method oft needs r, the number of blocks, or oft_block_size, the inputs in each")
    found = inputs if asked >= inputs else _nearest_divisor(inputs, asked)
    return (found, inputs // found) if config.r else (inputs // found, found)


def _nearest_divisor(size: int, asked: int) -> int:
    lower = next(number for number in range(asked, 0, -1) if size % number == 0)
    higher = next(number for number in range(asked, size + 1) if size % number == 0)
    return lower if asked - lower <= higher - asked else higher


def inner_rank(config: AdapterConfig, inputs: int, outputs: int) -> int:
    """Of the two factors that a part of VeRA, LoHa or LoKr runs as at a linear layer; 0 for every other method."""
    if isinstance(config, VeraConfig):
        return config.r
    whole = min(inputs, outputs)
    if isinstance(config, LohaConfig):
        return min(config.r * config.r, whole)
    if isinstance(config, LokrConfig):
        shapes = lokr_shapes(inputs, outputs, config)
        side = min(two_factors(inputs, config.decompose_factor)[0], two_factors(outputs, config.decompose_factor)[0])
        return whole if "lokr_w2" in shapes else min(side * config.r, whole)
    return 0
