"""Reading a base into 4 or 8 bits: each weight is packed as it comes off the disk, or comes packed already.

transformers reads the model (names, conversions, tied weights, missing keys are its business) and asks a quantizer for
each linear weight. Ours packs it, or passes on what a bitsandbytes checkpoint holds. Weights are handed over as
promises and fetched one at a time, from one open file at a time: what is in memory is the packed model so far, one
weight, and one shard's pages.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from topwork.common.errors import CheckpointError, ModelError, did_you_mean
from topwork.common.files import MANIFEST, verify_folder
from topwork.models.auto import auto_class
from topwork.models.fingerprint import Sampled, sampled
from topwork.models.quiet import without_bars
from topwork.models.shards import PackedPromise, Ready, promised, weight_files
from topwork.models.source import Source
from topwork.models.stored_names import stored_names
from topwork.models.weights import quantizable, weight_shape
from topwork.ops.packed import Packed, PackedInt8, pack_4bit, pack_int8
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedEmbedding, QuantizedLinear, packed_modules

ORIGIN = "topwork.json"
"""Beside a quantized model that Topwork wrote: which base it was made of."""
METHOD = "topwork"
"""The name under which transformers finds the quantizer."""


class Reading(QuantizationConfigMixin):
    """One reading of a base, as transformers' quantization_config.

    wanted    what is asked for
    dtype     the model's type, in which weights are packed and made dense again
    packed    keys of the weights that come packed
    samples   of every weight that was packed here, taken before: `fingerprint` wants them
    refused   the first weight that could not be packed: transformers goes on, and in the end says only that it failed
    """

    def __init__(self, wanted: QuantizationConfig, dtype: torch.dtype, packed: Sequence[str]) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.wanted, self.dtype, self.packed = wanted, dtype, packed
        self.samples: dict[str, Sampled] = {}
        self.refused: ModelError | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


def read_packed(
    source: Source,
    config: PreTrainedConfig,
    wanted: QuantizationConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Sampled]]:
    """The model in host memory, its dense parts in `dtype`; transformers' loading info; and samples of the weights that
    were packed on the way. Raises ModelError, and OSError where there are no weights."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(_Quantizer)
    weights = promised(weight_files(source.folder, source.revision))
    packed = sorted(key for key, weight in weights.items() if isinstance(weight, PackedPromise))
    if packed and wanted.active:
        raise ModelError(
            f"{source.name} is quantized already, and quantizing it again would only lose more; leave quantization "
            "out, or give the 16-bit model"
        )
    if not packed and not wanted.active:
        raise ModelError(
            f"{source.name}'s config.json says that it is quantized, and its files hold no packed weight; take "
            "quantization_config out of the config.json, or fetch the model anew"
        )
    vars(config).pop("quantization_config", None)
    reading = Reading(wanted, dtype, packed)
    known = {"trust_remote_code": trust_remote_code}
    if source.revision is not None and "--" not in str(getattr(config, "auto_map", "")):
        known["code_revision"] = source.revision  # type: ignore[assignment]
    with torch.device("meta"):  # the class to read with, and its own config, which only the auto class knows
        skeleton = auto_class(config).from_config(config, **known)
    try:
        with without_bars():
            model, info = type(skeleton).from_pretrained(
                None, config=skeleton.config, state_dict=weights, dtype=dtype, quantization_config=reading,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except RuntimeError:
        if reading.refused is not None:
            raise reading.refused from None
        raise
    _finish(model)
    if model.can_generate():
        model.generation_config = _generation_config(source, model)
    return model, info, reading.samples


def written_here(folder: str) -> str | None:
    """The fingerprint of the base that a folder of `topwork quantize` was made of; None for any other folder.

    Raises ModelError where the folder is not as it was written.
    """
    place = Path(folder)
    if not ((place / ORIGIN).is_file() and (place / MANIFEST).is_file()):
        return None
    try:
        verify_folder(place)
        return str(json.loads((place / ORIGIN).read_text("utf-8"))["base"]["fingerprint"])
    except (CheckpointError, ValueError, KeyError) as error:
        raise ModelError(f"{error}. Write it anew with: topwork quantize") from error


def is_packed(config: PreTrainedConfig, name: str) -> bool:
    """Whether a checkpoint is bitsandbytes-quantized. Raises ModelError naming any other kind of quantization."""
    return check_quantization(stored_quantization(config), name)


def check_quantization(given: dict[str, Any] | None, name: str) -> bool:
    """`is_packed` for a quantization_config alone."""
    if given is None:
        return False
    method = str(given.get("quant_method") or ("bitsandbytes" if given.get("load_in_4bit") else "an unnamed method"))
    if method != "bitsandbytes":
        raise ModelError(
            f"{name} is quantized by {method}, which cannot be read here; give a bitsandbytes checkpoint or the 16-bit "
            "model (with quantization: {load_in_4bit: true} it is packed while it is read)"
        )
    return True


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """A config's quantization_config as plain values."""
    given = getattr(config, "quantization_config", None)
    return given if given is None or isinstance(given, dict) else dict(given.to_dict())


class _Quantizer(HfQuantizer):
    """transformers' side of it: which modules are replaced, which weights are packed."""

    requires_calibration = False
    quantization_config: Reading

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:  # noqa: ARG002
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:  # noqa: ARG002
        reading = self.quantization_config
        for path in _layers_of(reading.packed, model) if reading.packed else chosen_layers(model, reading.wanted):
            _replace(model, path)


def chosen_layers(model: PreTrainedModel, wanted: QuantizationConfig) -> list[str]:
    """Every linear layer but the output head and what was asked to be left. The model may be a skeleton. Raises
    ModelError where none is left, or what is to be left is not there."""
    kept = HfQuantizer.get_modules_to_not_convert(
        model, wanted.llm_int8_skip_modules or None, list(model._keep_in_fp32_modules or []), add_default_skips=True
    )
    linear = quantizable(model)
    for name in wanted.llm_int8_skip_modules:
        if all(should_convert_module(path, [name]) for path in linear):
            names = {path.rpartition(".")[2] for path in linear}
            raise ModelError(
                f"quantization.llm_int8_skip_modules names {name!r}, and no linear layer's path ends or begins so"
                f"{did_you_mean(name, sorted(names))}"
            )
    chosen = [path for path in linear if should_convert_module(path, kept)]
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to quantize beside its head and quantization."
            "llm_int8_skip_modules; leave quantization out, or skip less"
        )
    return chosen


def _layers_of(packed: Sequence[str], model: PreTrainedModel) -> list[str]:
    """The layers whose weights come packed, by their paths in the model, whose files may call them otherwise."""
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    named = [key.removesuffix(".weight") for key in packed]
    names = {key: name for name, key in stored_names(model, packed).keys.items()}
    layers = [names.get(key, key).removesuffix(".weight") for key in packed]
    unknown = [name for name, path in zip(named, layers) if path not in linear]
    if unknown:
        raise ModelError(f"the checkpoint holds {unknown[0]!r} in few bits, and this model has no such linear layer")
    return layers


def _replace(model: PreTrainedModel, path: str) -> None:
    old = model.get_submodule(path)
    outputs, inputs = weight_shape(old)
    new = QuantizedLinear(inputs, outputs, old.bias)  # type: ignore[arg-type]
    new.turned = isinstance(old, Conv1D)
    model.set_submodule(path, new)


class _Pack(ConversionOps):
    """One weight into its layer."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def convert(self, input_dict: dict[str, Any], *patterns: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        model: nn.Module = kwargs["model"]
        result = {}
        for name, given in input_dict.items():
            weight = given[0] if isinstance(given, list) else given
            layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, QuantizedLinear)
            try:
                result[name] = layer.hold(self._packed(name, weight, layer)).weight
            except ModelError as error:
                self.reading.refused = self.reading.refused or error
                raise
        return result

    def _packed(self, name: str, weight: Tensor | Ready, layer: QuantizedLinear) -> Packed:
        turned = weight.t() if isinstance(weight, Tensor) and layer.turned else weight
        shape = turned.packed.shape if isinstance(turned, Ready) else tuple(turned.shape)
        if shape != layer.shape:
            raise misfit(name, shape, layer.shape)
        if isinstance(turned, Ready):  # int8's files do not say which type it was packed from
            is_int8 = isinstance(turned.packed, PackedInt8)
            return replace(turned.packed, dtype=self.reading.dtype) if is_int8 else turned.packed
        self.reading.samples[name] = sampled(weight)  # type: ignore[arg-type]
        return pack(turned, self.reading.wanted, name)


def misfit(name: str, found: Sequence[int], expected: Sequence[int]) -> ModelError:
    """The error for a weight whose shape is not the config's."""
    return ModelError(
        f"{name} has the shape {tuple(found)} in the weights' file, and config.json asks for {tuple(expected)}; do the "
        "two belong to one model?"
    )


def pack(weight: Tensor, wanted: QuantizationConfig, name: str) -> Packed:
    """A weight [out, in] as the options say. Raises ModelError naming it where it cannot be packed."""
    try:
        if wanted.load_in_8bit:
            return pack_int8(weight)
        return pack_4bit(
            weight, wanted.bnb_4bit_quant_type, wanted.block_size, wanted.bnb_4bit_use_double_quant
        )  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def quantize_head(model: PreTrainedModel, kind: str) -> None:
    """Hold the output head in int8 or NF4; an embedding tied to it is read from the same weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear:
        raise ModelError(f"the output head is a {type(head).__name__}; only a plain linear head can be quantized")
    tied = head.weight is embedding.weight
    if tied and type(embedding) is not nn.Embedding:
        raise ModelError(
            f"this model's head is tied to a {type(embedding).__name__}, which does more than look rows up; leave "
            "quantization.head at 16bit"
        )
    weight = head.weight.detach()
    packed = pack_head(weight, kind)
    quantized = QuantizedLinear(weight.shape[1], weight.shape[0], head.bias).hold(packed).train(False)
    model.set_output_embeddings(quantized)
    if tied:
        rows = QuantizedEmbedding(packed.shape).hold(packed).train(False)
        rows.weight = quantized.weight  # one parameter: counted once, moved once
        model.set_input_embeddings(rows)


def pack_head(weight: Tensor, kind: str) -> Packed:
    """A head's weight [V, d] in int8 or nf4."""
    wanted = QuantizationConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4")
    return pack(weight, wanted, "the output head")


def left_dense(model: PreTrainedModel) -> str | None:
    """What to tell where most of a quantized model is not packed: experts that transformers holds in one tensor are
    no linear layers, here as in bitsandbytes."""
    packed = packed_modules(model)
    outside = {
        id(p) for part in (model.get_input_embeddings(), model.get_output_embeddings()) for p in part.parameters()
    }
    outside |= {id(module.weight) for module in packed.values()}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outside)
    total = dense + sum(module.shape[0] * module.shape[1] for module in packed.values())
    if dense < 0.1 * total:
        return None
    return (
        f"{dense / total:.0%} of the layers' parameters are not packed (experts held in one tensor, or skipped) and "
        f"stay in {str(model.dtype).removeprefix('torch.')}; {len(packed)} linear layers are packed"
    )


def _finish(model: PreTrainedModel) -> None:
    """Take transformers' marks of a quantized model off: layers are what they are, and nothing else depends on them."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        vars(config).pop("quantization_config", None)


def _generation_config(source: Source, model: PreTrainedModel) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source.folder, revision=source.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(model.config)
