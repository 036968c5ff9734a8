"""What a reader would make of an adapter, found out before anything is written: feature by feature, what it would do
unseen, and what is done about it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from topwork.adapters.config import AdapterConfig, LoraConfig, Targeted
from topwork.adapters.fitting import Parts
from topwork.adapters.lazy_parts import LazyParts
from topwork.adapters.method import Bare
from topwork.adapters.methods.bitfit import Bias
from topwork.adapters.methods.lora.biases import BiasedLora
from topwork.adapters.methods.lora.dora import Dora
from topwork.adapters.methods.lora.embedding import EmbeddingLora
from topwork.adapters.methods.lora.experts import ExpertsLora, RouterLora
from topwork.adapters.methods.lora.inits import PAIRS
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.names import on_modules
from topwork.adapters.on_base import Stored, base_copies, grown
from topwork.adapters.peft_format import SavedAdapter, fitted_shapes, placed
from topwork.common.errors import AdapterError
from topwork.export.lowered import missing_layers
from topwork.export.readers import FEATURES, Action, Reader, Verdict
from topwork.quantization.kinds import EMBEDDINGS

INSTEAD = {
    "prefix": "use it where it was trained, or with PEFT (--format peft)",
    "prompt": "use it where it was trained, or with PEFT (--format peft)",
    "grown_vocabulary": "name the base whose embedding has grown with --model",
    "not_finite": "train it again, or take an earlier checkpoint",
}
"""What to do about what nothing can carry."""


@dataclass(frozen=True)
class Finding:
    """One feature of an adapter, and what becomes of it.

    feature  as FEATURES has it
    found    what of it there is in this adapter
    unseen   what the reader would do
    action   what is done
    instead  what to do, where the export is refused
    """

    feature: str
    found: str
    unseen: str
    action: Action
    instead: str = ""

    @property
    def refused(self) -> bool:
        """Whether nothing is written because of it."""
        return self.action in ("merge instead", "refused")

    def why(self, reader: Reader) -> str:
        """The feature, and what the reader would do, for people."""
        told = f" ({self.found})" if self.found else ""
        return f"{FEATURES[self.feature]}{told}" + (f": {reader.reader} {self.unseen}" if self.unseen else "")

    def line(self, reader: Reader) -> str:
        """The same, and what is done about it."""
        return f"{self.why(reader)} → {self.action}" + (f"; {self.instead}" if self.refused else "")

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def preflight(saved: SavedAdapter, bare: Bare, reader: Reader, quantized: bool = False) -> list[Finding]:
    """Every feature that the adapter has, and what is done about it for this reader.

    bare       its base, which may be a skeleton without weights
    quantized  whether the base was held in 4 or 8 bits in training

    Raises AdapterError where config, tensors and base do not fit one another at all.
    """
    found = _broken(saved, bare)
    if not found:
        saved = placed(saved, bare, without_copies=True)
    found |= _at_first_sight(saved)
    if quantized:
        found["quantized_base"] = ""
    if not found.keys() & {"grown_vocabulary", "not_finite"}:
        found |= _of_parts(_own_parts(saved, bare), bare, reader, 2 if "beginning" in found else 1)
    order = [name for name in FEATURES if name in found]
    return [_finding(name, found[name], reader, str(bare.config.model_type)) for name in order]


def refuse(findings: list[Finding], saved: SavedAdapter, reader: Reader) -> None:
    """AdapterError with all that cannot be carried, by name, and what to do instead."""
    lines = [f"  {finding.line(reader)}" for finding in findings if finding.refused]
    if lines:
        raise AdapterError(
            "\n".join([f"{saved.path} cannot be exported as {reader.format} for {reader.reader}:", *lines])
        )


def exported_parts(
    saved: SavedAdapter, bare: Bare, stored: Callable[[], Stored]
) -> tuple[AdapterConfig, Parts]:  # fmt: skip
    """An adapter's options and parts as they are exported. `stored` gives the base's own tensors; it is asked for only
    where the file says less than all without them: what PiSSA and OLoRA began as, and copies of the base's own
    embedding that PEFT has written beside an adapter of it, which may have been trained.

    Raises AdapterError where config, tensors and base do not fit one another.
    """
    config = placed(saved, bare, without_copies=True).config
    if not (_begins_from_base(saved) or _base_copies(saved, bare) or config.saved_modules):
        return config, fitted_shapes(bare, saved)
    opened = cache(stored)

    def tensor(path: str, kind: str) -> Tensor | None:
        return opened()(path, kind)

    parts = LazyParts(bare, saved, tensor)
    return parts.config, {path: parts.part(path, partial(_weight, bare, tensor, path)) for path in parts.shapes}


def needs_weights(findings: Sequence[Finding]) -> bool:
    """Whether the base's config does not suffice."""
    return any(finding.feature == "beginning" for finding in findings)


def _weight(bare: Bare, stored: Stored, path: str) -> Tensor:
    found = stored(path, "weight")
    assert found is not None
    return found.t() if isinstance(bare.modules[path], Conv1D) else found


def _own_parts(saved: SavedAdapter, bare: Bare) -> Parts:
    """The parts of what is in the file alone."""
    config = saved.config.model_copy(update={"init_lora_weights": True}) if _begins_from_base(saved) else saved.config
    return fitted_shapes(bare, replace(saved, config=config))


def _base_copies(saved: SavedAdapter, bare: Bare) -> list[str]:
    return base_copies(on_modules(saved.tensors, bare.modules)[0], saved.config, bare)


def _finding(name: str, found: str, reader: Reader, model_type: str) -> Finding:
    verdict = reader.verdicts[name]
    if name in ("embedding_lora", "head_lora") and reader.ends is not None and model_type not in reader.ends:
        verdict = Verdict("merge instead", f"refuses it at models of type {model_type}")
    instead = {"merge instead": reader.advice, "refused": INSTEAD.get(name, "")}.get(verdict.action, "")
    return Finding(name, found, verdict.unseen, verdict.action, instead)


def _broken(saved: SavedAdapter, bare: Bare) -> dict[str, str]:
    """What no reader takes."""
    found = {}
    broken = sorted(key for key, tensor in saved.tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        found["not_finite"] = f"in {broken[0]}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")
    if other := grown(on_modules(saved.tensors, bare.modules)[0], bare):
        found["grown_vocabulary"] = f"{other.key} is of {other.rows:,} tokens, the base has {other.base_rows:,}"
    return found


def _at_first_sight(saved: SavedAdapter) -> dict[str, str]:
    """What config and tensors tell without a base's modules."""
    config, found = saved.config, {}
    if config.method != "lora":
        named = config.method in FEATURES
        found[config.method if named else "other_method"] = "" if named else getattr(config, "peft_type", config.method)
    if (
        isinstance(config, Targeted)
        and isinstance(config.target_modules, str)
        and config.target_modules != "all-linear"
    ):
        found["regex_targets"] = repr(config.target_modules)
    if config.saved_modules:
        found["modules_to_save"] = ", ".join(config.saved_modules)
    if not isinstance(config, LoraConfig):
        return found
    if _begins_from_base(saved):
        found["beginning"] = str(config.init_lora_weights)
    if config.use_dora:
        found["dora"] = ""
    if config.use_rslora:
        found["rslora"] = f"{config.lora_alpha:g} / sqrt({config.r}) = {config.lora_alpha / math.sqrt(config.r):.4g}"
    if config.alpha_pattern:
        found["alpha_pattern"] = f"{len(config.alpha_pattern)} beside {config.lora_alpha:g}"
    if config.lora_alpha != int(config.lora_alpha):
        found["fractional_alpha"] = f"{config.lora_alpha:g}"
    if config.trainable_token_indices is not None:
        found["trained_tokens"] = f"{config.trained_tokens} of them"
    return found


def _begins_from_base(saved: SavedAdapter) -> bool:
    return isinstance(saved.config, LoraConfig) and saved.config.init_lora_weights in PAIRS


def _of_parts(parts: Parts, bare: Bare, reader: Reader, factor: int) -> dict[str, str]:
    """What shows where it goes into the base; folding makes ranks `factor` times what they are."""
    inside = [path for path, part in parts.items() if isinstance(part, ExpertsLora | RouterLora)]
    told = {"parameters": f"{inside[0]} and {len(inside) - 1} more" if len(inside) > 1 else inside[0]} if inside else {}
    lora = {path: part for path, part in parts.items() if isinstance(part, Lora | EmbeddingLora) and path not in inside}
    if biased := [path for path, part in parts.items() if isinstance(part, BiasedLora | Bias)] if lora else []:
        told["biases"] = f"at {len(biased)} modules, {biased[0]} the first"
    return told | _of_lora(lora, bare, reader, factor) if lora else told


def _of_lora(lora: Mapping[str, Lora | EmbeddingLora], bare: Bare, reader: Reader, factor: int) -> dict[str, str]:
    """Of A and B at linear layers and embeddings."""
    found, ranks = {}, sorted({factor * _rank(part) for part in lora.values()})
    if len(ranks) > 1:
        found["unequal_ranks"] = f"{ranks[0]} to {ranks[-1]}"
    if reader.most is not None and ranks[-1] > reader.most:
        found["large_rank"] = f"{ranks[-1]}"
    if missing := missing_layers(lora, bare.modules):
        found["some_layers"] = f"{missing[0]} is left out" + (f", {len(missing)} in all" if len(missing) > 1 else "")
    if any(isinstance(part, Dora) for part in lora.values()):
        return found
    tied = is_tied(bare)
    for path in lora:
        if path in (bare.head, bare.embedding):
            at = "head_lora" if path == bare.head else "embedding_lora"
            found["tied_lora" if tied else at] = path
        elif isinstance(bare.modules[path], EMBEDDINGS):
            found["embedding_lora"] = path
    return found


def is_tied(bare: Bare) -> bool:
    """Whether a base's head and embedding are one weight."""
    head, embedding = (bare.modules[path] if path else None for path in (bare.head, bare.embedding))
    return head is not None and embedding is not None and head.weight is embedding.weight


def _rank(part: Lora | EmbeddingLora) -> int:
    return len(part.lora_embedding_A if isinstance(part, EmbeddingLora) else part.lora_A)
