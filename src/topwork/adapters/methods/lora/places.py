"""Where LoRA and its kin put their parts, and how large they are. Free of torch: a base's config is enough."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from topwork.adapters.config import LoraConfig
from topwork.adapters.methods.lora.bias_places import biases_at, other_biases
from topwork.adapters.places import Places, Sizes, inputs_outputs
from topwork.adapters.targets import PLAIN, find_targets, near_names
from topwork.common.errors import AdapterError


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


@dataclass(frozen=True)
class Tokens:
    """Where rows of the embedding are trained: its path and width, and the head that is tied to it."""

    path: str
    width: int
    head: str | None


def lora_sizes(base: Places, config: LoraConfig) -> Sizes:
    """LoRA in every target, with DoRA's lengths and biases; and trained tokens."""
    targets, tokens = lora_places(base, config)
    sizes = {target.path: target.sizes(config.use_dora) for target in targets}
    if tokens is not None:
        sizes[tokens.path] = (len(config.trainable_token_indices or ()) * tokens.width,)
        sizes |= {tokens.head: ()} if tokens.head is not None else {}
    return sizes | {path: base.by_path[path].tensors[-1:] for path in other_biases(base, config, sizes)}


def lora_places(base: Places, config: LoraConfig) -> tuple[list[Target], Tokens | None]:
    """Every module that gets a part. Raises AdapterError where the config does not fit the base."""
    paths = find_targets(base, config, ("linear", "embedding"))
    targets = [replace(at, biases=biases_at(base.by_path[at.path], config)) for at in _ranked(base, paths, config)]
    _refuse_more_than_lora([target.path for target in targets if target.is_embedding], config)
    _refuse_large_ranks(targets, config)
    if config.trainable_token_indices is None:
        return targets, None
    path = _check_tokens(base, config.trainable_token_indices)
    tokens = Tokens(path, base.by_path[path].columns, base.head if base.tied else None)
    _refuse_both(set(paths) & {tokens.path, tokens.head})
    return targets, tokens


def _ranked(base: Places, paths: Sequence[str], config: LoraConfig) -> list[Target]:
    """Each path with its rank and alpha. A pattern that matches nothing would be ignored silently, and the run would
    not be the one asked for: AdapterError."""
    ranks, alphas = keys_of(config.rank_pattern, paths), keys_of(config.alpha_pattern, paths)
    for name, pattern, keys in (
        ("rank_pattern", config.rank_pattern, ranks), ("alpha_pattern", config.alpha_pattern, alphas)
    ):  # fmt: skip
        matched = {key for found in keys.values() for key in found}
        for key in pattern:
            if key not in matched:
                raise AdapterError(f"{name} has {key!r}, which matches no target module{near_names(key, paths)}")
    return [
        Target(
            path,
            config.rank_pattern[ranks[path][0]] if ranks[path] else config.r,
            config.alpha_pattern[alphas[path][0]] if alphas[path] else config.lora_alpha,
            *inputs_outputs(base.by_path[path]),
            base.by_path[path].kind == "embedding",
        )
        for path in paths
    ]


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


def _refuse_large_ranks(targets: Sequence[Target], config: LoraConfig) -> None:
    """Weights have no more directions than rows or columns."""
    for target in targets if isinstance(config.init_lora_weights, str) else ():
        most = min(target.inputs, target.outputs)
        if target.r > most and config.init_lora_weights != "gaussian":
            raise AdapterError(
                f"init_lora_weights: {config.init_lora_weights} takes r directions of a weight, and that of "
                f"{target.path} has {most}, fewer than r = {target.r}; lower r, there by rank_pattern"
            )


def _check_tokens(base: Places, tokens: Sequence[int]) -> str:
    """The embedding's path. Raises AdapterError for tokens that it does not have, or that are named twice."""
    if base.embedding is None or base.by_path[base.embedding].kind != "embedding":
        raise AdapterError("trainable_token_indices needs a base with an input embedding; this one has none")
    vocabulary = base.by_path[base.embedding].rows
    outside = sorted(token for token in set(tokens) if not 0 <= token < vocabulary)
    if outside or not tokens:
        raise AdapterError(
            f"trainable_token_indices has {outside or 'no ids'}; the base has 0 to {vocabulary - 1}: give ids "
            "that are in it (the tokenizer tells a token's id)"
        )
    twice = sorted(token for token, count in Counter(tokens).items() if count > 1)
    if twice:
        raise AdapterError(f"trainable_token_indices names {twice} more than once; give each id once")
    return base.embedding


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
