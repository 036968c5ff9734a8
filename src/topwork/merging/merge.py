"""Folding one adapter into its base, and writing the result as an ordinary Hugging Face folder.

A module that was trained whole (`modules_to_save`, full fine-tuning) takes the place of the base's. Merging is for the
last adapter of a base: others grafted beside it were trained on W and not on W'.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from topwork.adapters.graft import Adapters, adapted_layers, bare_modules
from topwork.adapters.methods.full import TiedHead
from topwork.adapters.methods.lora.biases import BiasedLora
from topwork.adapters.methods.lora.embedding import TiedTokens
from topwork.adapters.methods.virtual import VirtualTokens
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy
from topwork.common.errors import AdapterError
from topwork.common.files import write_folder
from topwork.merging.fold import MERGEABLE, as_stored, folded, keeps_tie
from topwork.models.base import Base
from topwork.models.writing import write_model
from topwork.quantization.linear import PackedModule, packed_modules


def merge(base: Base, adapters: Adapters, name: str) -> None:
    """Fold adapter `name` into `base`, in place, and take its layers out of the model.

    In 16 bits the sum is rounded to the weight's type. A base in 4 or 8 bits is made dense: the adapter was trained on
    what its packed weights stand for, and packing the sum again would round most of the adapter away.
    `base.fingerprint` stays that of the weights before. Raises AdapterError, with nothing changed, where the adapter
    is not alone; RunError for a sum that is not finite, after which the base has to be loaded anew.
    """
    _check(base, adapters, name)
    dequantize(base.module)
    replaced: dict[str, nn.Module] = {}
    parts, bare = adapters.parts(name), adapters.bare()
    tied = any(isinstance(part, TiedHead | TiedTokens) for part in parts.values())
    if bare.seen.tied:
        tied |= keeps_tie(parts, lambda path, key: parts[path].state()[key], str(bare.embedding), str(bare.head))
    for path, part in parts.items():
        own = base.module.get_submodule(path).base_layer
        if isinstance(part, ModuleCopy | TiedHead):
            replaced[path] = part.replacement(own)  # type: ignore[arg-type]
        else:
            _fold(base.module, path, own, part)  # type: ignore[arg-type]
    adapters.remove(name)
    for path, module in replaced.items():
        base.module.set_submodule(path, module)
    if tied:
        base.module.get_output_embeddings().weight = base.module.get_input_embeddings().weight
    _record_untied(base.module)


def save_merged(
    base: Base, out: Path, template: str | None = None, replace: bool = False, end_ids: Sequence[int] = ()
) -> None:
    """Write a base without adapters to the folder `out`, whole or not at all: config, generation_config, safetensors,
    tokenizer and chat template (`template`, or the tokenizer's own).

    It loads with plain transformers, and stops at `end_ids` too, the tokens that end a turn. Raises AdapterError while
    adapters are still grafted, RunError where `out` holds something (unless `replace`) or the disk is full.
    """
    left = adapted_layers(base.module)
    if left:
        raise AdapterError(f"{len(left)} layers still carry adapters (first {next(iter(left))}); merge or remove them")
    write_folder(out, lambda folder: write_model(base, folder, template, end_ids), replace)


def _check(base: Base, adapters: Adapters, name: str) -> None:
    adapters.parameters(name)  # AdapterError for an unknown name
    others = sorted(adapters.configs.keys() - {name})
    if others:
        raise AdapterError(
            f"merging {name!r} would change the base under {', '.join(map(repr, others))}; remove the others first, or "
            "load the base anew with this adapter alone"
        )
    for path, part in adapters.parts(name).items():
        layer = base.module.get_submodule(path)
        if isinstance(part, BiasedLora):
            part.refuse_lost(path)
        if isinstance(part, VirtualTokens):
            part.merged(layer.weight, None)  # type: ignore[arg-type]  # AdapterError
        if isinstance(layer.base_layer, PackedModule) or isinstance(part, ModuleCopy | TiedHead):
            continue
        if layer.weight.dtype not in MERGEABLE:
            raise AdapterError(
                f"{path} holds its weight as {str(layer.weight.dtype).removeprefix('torch.')}, and an adapter is "
                "merged into a 16- or 32-bit base; load it with model.dtype: bfloat16 or float32"
            )


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> None:
    """Every packed weight as a dense one of the model's type, in place, under whatever is grafted."""
    dtype = _own_type(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = isinstance(head, PackedModule) and isinstance(embedding, PackedModule) and head.weight is embedding.weight
    for path, module in packed_modules(model).items():
        model.set_submodule(path, module.dense(dtype))
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


@torch.no_grad()
def _fold(model: PreTrainedModel, path: str, own: nn.Module, part: AdapterModule) -> None:
    weight, bias = own.get_parameter("weight"), getattr(own, "bias", None)
    turned = isinstance(own, Conv1D)  # gpt2's, which holds its weight as [in, out]
    whole, whole_bias = folded(part, weight.t() if turned else weight, bias)
    merged = as_stored(f"{path}.weight", whole.t() if turned else whole, weight.dtype)
    if _is_shared(model, weight):
        own.weight = nn.Parameter(merged, requires_grad=False)  # what was tied to it stays as it is
    else:
        weight.copy_(merged)
    if bias is not None:
        bias.copy_(whole_bias)


def _own_type(model: PreTrainedModel) -> torch.dtype:
    """The base's own; `model.dtype` is an adapter's, where head and embedding are packed and so come in no type."""
    own = (p.dtype for module in bare_modules(model).values() for p in module.parameters(recurse=False))
    return next((dtype for dtype in own if dtype.is_floating_point), model.dtype)


def _is_shared(model: PreTrainedModel, weight: torch.Tensor) -> bool:
    return sum(parameter is weight for _, parameter in model.named_parameters(remove_duplicate=False)) > 1


def _record_untied(model: PreTrainedModel) -> None:
    """A head that is no longer the embedding's weight must not be tied again by whoever loads the folder."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
