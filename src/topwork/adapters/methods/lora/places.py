"""Where LoRA and its kin put their parts, and how large they are. Free of torch: a base's config is enough."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from topwork.adapters.config import LoraConfig
from topwork.adapters.methods.lora.bias_places import biases_at, other_biases
from topwork.adapters.methods.lora.parameters import (
    ParameterTarget,
    parameter_targets,
    refuse_parameters_as_modules,
    with_parameters,
)
from topwork.adapters.methods.lora.token_places import Tokens, token_places
from topwork.adapters.places import Places, Sizes, inputs_outputs
from topwork.adapters.targets import PLAIN, find_targets, near_names
from topwork.common.errors import AdapterError
from topwork.common.kinds import Matrix


@dataclass(frozen=True)
class Target:
    """One module that gets an A and a B: its path, its rank and its alpha, its inputs and outputs (an embedding's
    entries and width), and the names of the biases that are trained with it."""

    path: str
    r: int
    alpha: float
    inputs: int
    outputs: int
    is_embedding: bool
    biases: tuple[str, ...] = ()

    def sizes(self, lengths: bool) -> tuple[int, ...]:
        """Of A and B, of DoRA's `lengths`, and of biases."""
        vectors = (1 if lengths else 0) + len(self.biases)
        return (self.r * self.inputs, self.r * self.outputs, *[self.outputs] * vectors)


class LoraPlaces(NamedTuple):
    """Modules that get an A and a B, raw parameters that do, and where tokens are trained."""

    targets: list[Target]
    parameters: list[ParameterTarget]
    tokens: list[Tokens]

    def by_module(self) -> dict[str, list[ParameterTarget]]:
        """The raw parameters by the paths of their modules, in the modules' own order."""
        found: dict[str, list[ParameterTarget]] = {}
        for parameter in self.parameters:
            found.setdefault(parameter.module, []).append(parameter)
        return found


def lora_sizes(base: Places, config: LoraConfig) -> Sizes:
    """LoRA in every target, with DoRA's lengths and biases; in raw parameters; and trained tokens."""
    places = lora_places(base, config)
    sizes: Sizes = {target.path: target.sizes(config.use_dora) for target in places.targets}
    for path, parameters in places.by_module().items():
        sizes[path] = tuple(size for parameter in parameters for size in parameter.sizes)
    for rows in places.tokens:
        sizes[rows.path] = (len(rows.ids) * rows.width,)
        sizes |= {rows.shared: ()} if rows.shared is not None else {}
    return sizes | {path: base.by_path[path].tensors[-1:] for path in other_biases(base, config, sizes)}


def lora_places(base: Places, config: LoraConfig) -> LoraPlaces:
    """All that gets a part. Raises AdapterError where the config does not fit the base."""
    config = with_parameters(base, config)
    paths, inside = _chosen(base, config)
    ranks = _ranks([*paths, *(f"{path}.{matrix.name}" for path, matrix in inside)], config)
    targets = [_target(base, path, *ranks[path]) for path in paths]
    targets = [replace(at, biases=biases_at(base.by_path[at.path], config)) for at in targets]
    parameters = [ParameterTarget(path, matrix, *ranks[f"{path}.{matrix.name}"]) for path, matrix in inside]
    _refuse_more_than_lora([target.path for target in targets if target.is_embedding], config)
    _refuse_large_ranks(targets, config)
    tokens = token_places(base, config.trainable_token_indices)
    for rows in tokens:
        _refuse_both(set(paths) & {rows.path, rows.shared})
    return LoraPlaces(targets, parameters, tokens)


def ranked_paths(base: Places, config: LoraConfig) -> list[str]:
    """Paths of all modules and raw parameters that have a rank. Raises AdapterError as `lora_places` does."""
    paths, inside = _chosen(base, with_parameters(base, config))
    return [*paths, *(f"{path}.{matrix.name}" for path, matrix in inside)]


def _chosen(base: Places, config: LoraConfig) -> tuple[list[str], list[tuple[str, Matrix]]]:
    """Paths of linear layers and embeddings, and of other modules with the parameters that are adapted in them."""
    raw = parameter_targets(base, config)
    refuse_parameters_as_modules(base, config)
    weights = [path for path, _ in raw if base.by_path[path].kind == "linear"]
    inside = [(path, matrix) for path, matrix in raw if base.by_path[path].kind == "other"]
    paths = find_targets(base, config, ("linear", "embedding")) if config.target_modules or not raw else []
    _refuse_twice(set(paths) & set(weights))
    return [*paths, *weights], inside


def _target(base: Places, path: str, r: int, alpha: float) -> Target:
    module = base.by_path[path]
    return Target(path, r, alpha, *inputs_outputs(module), module.kind == "embedding")


def _ranks(paths: Sequence[str], config: LoraConfig) -> dict[str, tuple[int, float]]:
    """Rank and alpha at each path. A pattern that matches nothing would be ignored silently, and the run would not be
    the one asked for: AdapterError."""
    ranks, alphas = keys_of(config.rank_pattern, paths), keys_of(config.alpha_pattern, paths)
    for name, pattern, keys in (
        ("rank_pattern", config.rank_pattern, ranks), ("alpha_pattern", config.alpha_pattern, alphas)
    ):  # fmt: skip
        matched = {key for found in keys.values() for key in found}
        for key in pattern:
            if key not in matched:
                raise AdapterError(f"{name} has {key!r}, which matches no target module{near_names(key, paths)}")
    return {
        path: (
            config.rank_pattern[ranks[path][0]] if ranks[path] else config.r,
            config.alpha_pattern[alphas[path][0]] if alphas[path] else config.lora_alpha,
        )
        for path in paths
    }


def keys_of(pattern: Mapping[str, Any], paths: Sequence[str]) -> dict[str, list[str]]:
    """For each path the keys of `rank_pattern` or `alpha_pattern` that match it, in their order: the first one counts.
    Raises AdapterError for a key that is no regular expression."""
    # most keys are names or paths, of which the last part tells at once that they don't match
    tries = [(key, key.rpartition(".")[2] if PLAIN.fullmatch(key) else "", _ending(key)) for key in pattern]
    return {path: [key for key, tail, regex in tries if path.endswith(tail) and regex.match(path)] for path in paths}


def _ending(key: str) -> re.Pattern[str]:
    """As PEFT looks for it."""
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise AdapterError(f"{key!r} in rank_pattern or alpha_pattern is no regular expression ({error})") from error


def _refuse_twice(paths: Collection[str]) -> None:
    if paths:
        raise AdapterError(
            f"target_parameters names {min(paths)}.weight, and target_modules chooses {min(paths)}; name it once"
        )


def _refuse_large_ranks(targets: Sequence[Target], config: LoraConfig) -> None:
    """Weights have no more directions than rows or columns."""
    for target in targets if isinstance(config.init_lora_weights, str) else ():
        most = min(target.inputs, target.outputs)
        if target.r > most and config.init_lora_weights != "gaussian":
            raise AdapterError(
                f"init_lora_weights: {config.init_lora_weights} takes r directions of a weight, and that of "
                f"{target.path} has {most}, fewer than r = {target.r}; lower r, there by rank_pattern"
            )


def _refuse_both(paths: Collection[str | None]) -> None:
    """One module holds one part of an adapter."""
    if paths:
        raise AdapterError(
            f"{min(map(str, paths))} is chosen by target_modules and has rows that trainable_token_indices trains (a "
            "head tied to the embedding shares them); take one of the two, or leave the module out with exclude_modules"
        )


def _refuse_more_than_lora(paths: Sequence[str], config: LoraConfig) -> None:
    """Embeddings among the targets take LoRA in its plain form: rows are looked up, never multiplied, so their lengths
    are no magnitude to learn here; and what begins from a weight begins from a linear layer's."""
    init = config.init_lora_weights
    if paths and config.use_dora:
        raise AdapterError(
            f"{paths[0]} is an embedding, where use_dora is not supported; leave it out of target_modules, or train "
            "some of its rows with trainable_token_indices"
        )
    if paths and init in ("pissa", "olora", "loftq"):
        raise AdapterError(
            f"init_lora_weights: {init} begins from a linear layer's weight, and target_modules names {paths[0]}, an "
            "embedding; leave that out, or take init_lora_weights: true"
        )
