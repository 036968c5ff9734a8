"""Adapters to one adapter, module by module: what each source changes there, the method's sum of it, and its factors.

Linear methods stay in factors where all sources have some. Everything else is one dense matrix at a time: DoRA's and
IA3's changes, and the entrywise methods. What is left out when a matrix becomes a product of `rank` is measured.
Modules that a source trained whole stay whole, and tokens' rows stay rows: the method goes over their parameters as it
does over a matrix, and nothing of them is left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from topwork.adapters.method import Bare
from topwork.common.errors import RequestError
from topwork.merging.changes import Changes, Parameter
from topwork.merging.combine import masks
from topwork.merging.combine.places import Places, places_of, refuse_apart
from topwork.merging.combine.settings import Settings
from topwork.merging.combine.table import Way, way_of
from topwork.merging.combine.truncate import truncated
from topwork.merging.deltas import Delta, DenseDelta, LowRankDelta, as_factors, as_matrix, reduced, weighted_sum
from topwork.quantization.kinds import EMBEDDINGS, features

RANK_OF_DENSE = 16
"""What a source counts that has no rank of its own (IA3)."""
LARGEST_DENSE = 2**28
"""Values of one matrix that an entrywise method goes over; with three sources it takes about 10 GiB."""


@dataclass(frozen=True)
class Energy:
    """Of one module: ‖M‖² of the combined change M, and how much of it the result's rank leaves out."""

    total: float
    discarded: float


@dataclass(frozen=True)
class Combined:
    """One adapter.

    rank       the largest that a module needs; all are written with it
    deltas     the change of each adapted module in factors, in the model's order
    energies   the same modules'
    whole      modules' own parameters in fp32, laid out as the base's
    tokens     (the embedding's path, ids, their rows [n, d] in fp32), or none
    """

    rank: int
    deltas: dict[str, LowRankDelta]
    energies: dict[str, Energy]
    whole: dict[Parameter, Tensor]
    tokens: tuple[str, tuple[int, ...], Tensor] | None

    @property
    def discarded(self) -> float:
        """Over all modules, as a share of the combined change's energy."""
        return share(sum(e.discarded for e in self.energies.values()), sum(e.total for e in self.energies.values()))


def share(part: float, of: float) -> float:
    """part / of, and nothing of nothing."""
    return part / of if of > 0 else 0.0


def combine_changes(
    sources: Sequence[Changes], settings: Settings, bare: Bare, on_module: Callable[[], None] = lambda: None
) -> Combined:
    """The sources' changes by one method; `on_module` is called after each module. `bare` is the sources' base.

    Raises AdapterError for sources that do not go together, RequestError for a rank that no module has and for an
    entrywise method over a matrix of more than LARGEST_DENSE values, which an embedding of a large model has.
    """
    way = way_of(settings.method)
    if way.meets and len(sources) > 1:
        refuse_apart(sources, way.name)
    sources, settings = _that_count(sources, settings, way)
    places = places_of(sources, bare)
    full = {path: min(features(bare.modules[path])) for path in places.adapted}
    rank = _rank_of_result(sources, settings, way, full)
    if way.entrywise is not None:
        _refuse_large(way, places, bare)
    method = _Method(way, settings, [source.content for source in sources])
    deltas, energies = {}, {}
    for path in places.adapted:
        found = _deltas(sources, path, bare.modules[path])
        deltas[path], energies[path] = method.of_module(path, found, min(rank, full[path]))
        on_module()
    whole = {key: _whole(method, sources, key) for key in places.whole}
    return Combined(rank, deltas, energies, whole, _tokens(method, sources))


def _that_count(sources: Sequence[Changes], settings: Settings, way: Way) -> tuple[Sequence[Changes], Settings]:
    """Without those of weight 0, which give no change, no sign and no direction (slerp needs its two); and in an order
    of their own, in which sums are rounded: so the order in which they were named changes no bit."""
    given = [
        (source.content, weight, density, source)
        for source, weight, density in zip(sources, settings.weights, settings.density)
        if weight or way.sources is not None
    ]
    given.sort(key=lambda each: each[:3])
    _, weights, densities, kept = zip(*given)
    return kept, replace(settings, weights=weights, density=densities)


def _refuse_large(way: Way, places: Places, bare: Bare) -> None:
    values = {path: math.prod(features(bare.modules[path])) for path in places.adapted}
    values |= {path: bare.modules[path].get_parameter(name).numel() for path, name in places.whole}
    for path, count in values.items():
        if count > LARGEST_DENSE:
            raise RequestError(
                f"{way.name} goes over every value of a change, and that of {path} has {count:,}, more than "
                f"fit ({LARGEST_DENSE:,}); take cat, linear, task-arithmetic, svd or knots, which stay in factors, or "
                "combine adapters that leave it alone"
            )


@dataclass(frozen=True)
class _Method:
    way: Way
    settings: Settings
    contents: list[str]

    def of_module(self, path: str, deltas: Sequence[Delta], rank: int) -> tuple[LowRankDelta, Energy]:
        """The combined change, in factors of at most `rank`."""
        total = self.combined(path, deltas)
        energy = total.norm() ** 2
        if not math.isfinite(energy):
            raise RequestError(f"the combined change of {path} is not finite; are the weights too large?")
        if isinstance(total, LowRankDelta):
            kept, lost = reduced(total, rank)
        else:
            b, a, lost = truncated(total.values, rank)
            kept = LowRankDelta(b.double(), a.double())
        return kept, Energy(energy, lost)

    @torch.no_grad()
    def combined(self, path: str, deltas: Sequence[Delta]) -> Delta:
        """The method's sum of one module's changes."""
        way, settings = self.way, self.settings
        if way.coefficients is not None:
            coefficients = way.coefficients(deltas, settings.weights)
            return weighted_sum(deltas, [settings.scale * c for c in coefficients])
        if way.factors is not None:
            found = way.factors([as_factors(delta) for delta in deltas], settings)
            return LowRankDelta(settings.scale * found.b, found.a)
        assert way.entrywise is not None
        generators = [masks.generator(settings.seed, path, content) for content in self.contents]
        stacked = torch.empty(len(deltas), *deltas[0].shape)
        for values, delta in zip(stacked, deltas):
            values.copy_(delta.dense())
        return DenseDelta(settings.scale * way.entrywise(stacked, settings, generators))


def _deltas(sources: Sequence[Changes], path: str, module: nn.Module) -> list[Delta]:
    """Of every source; nothing, in factors of rank 0, where one leaves the module alone."""
    first, second = features(module)
    rows, columns = (first, second) if isinstance(module, EMBEDDINGS) else (second, first)
    nothing = LowRankDelta(torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64))
    return [source.delta(path) if path in source.adapted else nothing for source in sources]


def _rank_of_result(sources: Sequence[Changes], settings: Settings, way: Way, full: Mapping[str, int]) -> int:
    """What was asked for, or what holds the combined change; slerp's source of weight 0 needs none of it."""
    most = max(full.values())
    if settings.rank is not None:
        if settings.rank > most:
            raise RequestError(f"--rank {settings.rank} is over {most}, the largest that a module of this base has")
        return settings.rank
    counted = [source for source, weight in zip(sources, settings.weights) if weight]
    ranks = [source.rank or RANK_OF_DENSE for source in counted]
    if way.largest_rank:
        return min(max(ranks), most)
    by_path = [
        (path, [source.rank_at(path) for source in counted if path in source.adapted]) for path in full
    ]  # fmt: skip
    if way.entrywise is not None or any(None in found for _, found in by_path):
        return min(sum(ranks), most)
    return max(1, *(min(sum(r for r in found if r), full[path]) for path, found in by_path))


def _whole(method: _Method, sources: Sequence[Changes], key: Parameter) -> Tensor:
    """A parameter of a module that some source trained whole; one that adapts it changes it by its delta."""
    path, name = key
    base = next(source for source in sources if key in source.whole).base(f"{path}.{name}")
    changes = [source.of_parameter(path, name) for source in sources]
    found = [torch.zeros_like(base) if change is None else change for change in changes]
    total = method.combined(f"{path}.{name}", [DenseDelta(as_matrix(change)) for change in found])
    return (base.double() + total.dense().view(base.shape)).float()


def _tokens(method: _Method, sources: Sequence[Changes]) -> tuple[str, tuple[int, ...], Tensor] | None:
    """The rows of all tokens that a source trained; the others leave them alone."""
    trained = [source for source in sources if source.tokens is not None]
    if not trained:
        return None
    path = trained[0].tokens[0]  # type: ignore[index]
    base, by_source = trained[0].base(f"{path}.weight"), [source.of_tokens() for source in sources]
    ids = tuple(sorted({token for rows in by_source for token in rows}))
    nothing = torch.zeros(base.shape[1])
    found = [torch.stack([rows.get(token, nothing) for token in ids]) for rows in by_source]
    total = method.combined(f"{path}.tokens", [DenseDelta(rows) for rows in found])
    return path, ids, (base[list(ids)].double() + total.dense()).float()
