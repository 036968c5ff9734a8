"""What llama.cpp computes on a CPU, in torch: weights as a file holds them, inputs rounded to what they are met with.

A product's inputs are rounded to the partner of the weight's type (`ggml-cpu.c`, `type_traits_cpu`): float16 for F16,
bfloat16 for BF16, blocks of 32 eight-bit values with a float16 scale for the quantized types. GELU is a table of
float16 values (`ggml-cpu/vec.h`). Everything else is fp32, as in transformers' eager pass.
"""

import copy
from collections.abc import Callable

import gguf
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor, nn
from transformers import PreTrainedModel

QUANTIZED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


def as_stored(weight: Tensor, stored: str) -> Tensor:
    """A weight after it was written in a type and read again, fp32."""
    number = getattr(gguf.GGMLQuantizationType, stored.upper())
    return torch.from_numpy(dequantize(quantize(weight.float().numpy(), number), number).copy())


def rounded(values: Tensor, stored: str) -> Tensor:
    """A product's inputs, as they meet a weight of this type."""
    if stored in ("f16", "bf16"):
        return values.to(torch.float16 if stored == "f16" else torch.bfloat16).float()
    if stored not in QUANTIZED:
        return values
    codes, scale = _codes(values)
    return (codes * scale.half().float()).flatten(-2)


def _codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit codes [..., blocks, 32] and fp32 scales [..., blocks, 1]."""
    blocks = values.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, blocks / scale.clamp_min(1e-30), 0.0).round(), scale


def _by_least(weight: Tensor, values: Tensor, stored: str) -> Tensor:
    """What types with a least value (q4_1, q5_1) add: it meets the block's sum, which is kept as a float16 of its own
    (`block_q8_1.s`), and not the sum of the rounded inputs."""
    bytes_ = quantize(weight.float().numpy(), getattr(gguf.GGMLQuantizationType, stored.upper()))
    size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, stored.upper())][1]
    least = bytes_.reshape(len(weight), -1, size)[..., 2:4].copy().view("<f2")[..., 0]
    codes, scale = _codes(values)
    kept = (codes.sum(-1) * scale[..., 0]).half().float()
    met = (codes * scale.half().float()).sum(-1)
    return (kept - met) @ torch.from_numpy(least).float().T


def _product(module: nn.Linear, original: Tensor | None, stored: str) -> Callable[[Tensor], Tensor]:
    def forward(values: Tensor) -> Tensor:
        found = nn.functional.linear(rounded(values, stored), module.weight, module.bias)
        if stored in ("q4_1", "q5_1") and original is not None:
            found = found + _by_least(original.detach(), values, stored)
        return found

    return forward


class _Gelu(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        table = nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values <= -10, 0.0, torch.where(values >= 10, values, table))


def as_llama_cpp(model: PreTrainedModel, stored: Callable[[str], str], inputs: bool = True) -> PreTrainedModel:
    """A copy of a model that computes as llama.cpp does; `stored` says by a weight's name in which type it is.
    Without `inputs`, only weights are rounded."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():  # tied ones come once, under the embedding's name
            if parameter.dim() == 2:
                parameter.copy_(as_stored(parameter, stored(name)))
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and inputs:
            kind = stored(f"{name}.weight")
            module.forward = _product(module, dict(model.named_parameters()).get(f"{name}.weight"), kind)
        if hasattr(module, "act_fn") and "gelu" in str(type(module.act_fn)).lower():
            module.act_fn = _Gelu()
    return twin
