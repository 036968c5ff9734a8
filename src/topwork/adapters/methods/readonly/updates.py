"""Methods that add a matrix to a layer's weight: A [n, in] and B [out, n] with B A as that matrix, in fp32.

Formulas are those of PEFT's layers, in whose forms (`forms.py`) the tensors come:

    AdaLoRA    B diag(e) A · alpha / init_r                   (Zhang et al., arXiv 2303.10512)
    C3A        blocks whose rows are one kernel, shifted      (Chen et al., arXiv 2407.19342)
    DeLoRA     B and A of unit length, times W's columns'     (Bini et al., arXiv 2503.18225)
    FourierFT  the inverse transform of a few frequencies     (Gao et al., arXiv 2405.03003)
    GraLoRA    k x k blocks, each a product of its own        (Jung et al., arXiv 2505.20355)
    HiRA       W * (B A)                                      (Huang et al., ICLR 2025)
    MiSS       columns in r groups, each with one column      (Kang and Yin, arXiv 2409.15371)
    PVeRA      VeRA by its means                              (arXiv 2512.07703)
    SHiRA      single entries                                 (Bhardwaj et al., arXiv 2406.13175)
    VB-LoRA    A and B out of mixed vectors of one bank       (Li et al., arXiv 2405.15179)
    WaveFT     the inverse Haar transform of a few entries    (Bilican et al., arXiv 2505.12532)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.adapters.methods.factored import as_factors
from topwork.adapters.methods.readonly.forms import Layer, Options


@dataclass(frozen=True)
class At:
    """A layer, its tensors by PEFT's names, the options, and what gives the base's weight [out, in] in fp32."""

    layer: Layer
    tensors: Mapping[str, Tensor]
    options: Options
    weight: Callable[[], Tensor]


Pair = tuple[Tensor, Tensor]


def adalora(at: At) -> Pair:
    r, alpha = at.options["init_r"], at.options["lora_alpha"]
    scaling = (alpha if alpha > 0 else r) / (r + 1e-5)  # PEFT's own guard against a rank of zero
    return at.tensors["lora_A"] * at.tensors["lora_E"], scaling * at.tensors["lora_B"]


def c3a(at: At) -> Pair:
    kernel = at.tensors["c3a_kernel"]
    rows, columns, size = kernel.shape
    steps = torch.arange(size, device=kernel.device)
    shifted = kernel[:, :, (steps[None] - steps[:, None]) % size]  # [rows, columns, t, s]
    update = shifted.permute(0, 2, 1, 3).reshape(rows * size, columns * size)
    return as_factors(update / at.layer.inputs)


def delora(at: At) -> Pair:
    a, b, t = at.tensors["delora_A"], at.tensors["delora_B"], at.tensors
    lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return a * t["delora_w_norm"], b * (t["delora_lambda"] / len(a) / lengths)


def fourierft(at: At) -> Pair:
    spectrum = _placed(at, at.tensors["fourierft_spectrum"])
    return as_factors(torch.fft.ifft2(spectrum).real * at.options["scaling"])


def gralora(at: At) -> Pair:
    a, b, k = at.tensors["gralora_A"], at.tensors["gralora_B"], at.options["gralora_k"]
    r = at.options["r"]
    scaling = at.options["alpha"] / (r + at.options["hybrid_r"])
    rows = torch.block_diag(
        *a.transpose(1, 2)
    )  # of input block n the ranks [n, c, s]: c is the output block they serve
    same = torch.eye(k, device=b.device, dtype=b.dtype)
    columns = torch.einsum("cnso,cd->conds", b.unflatten(1, (k, r // k)), same)
    columns = columns.reshape(at.layer.outputs, k * r)
    if at.options["hybrid_r"]:
        rows = torch.cat([rows, at.tensors["gralora_A_general.weight"]])
        columns = torch.cat([columns, at.tensors["gralora_B_general.weight"]], 1)
    return rows, scaling * columns


def hira(at: At) -> Pair:
    return as_factors(at.weight() * (at.tensors["hira_B"] @ at.tensors["hira_A"]))


def miss(at: At) -> Pair:
    block, inputs = at.tensors["miss_block"], at.layer.inputs
    if at.options["init_weights"] == "mini":
        block = block.repeat(1, at.layer.outputs // at.options["mini_r"])
    groups = torch.arange(inputs, device=block.device) % len(block)
    return torch.nn.functional.one_hot(groups, len(block)).t().to(block.dtype), block.t()


def pvera(at: At) -> Pair:
    t, r = at.tensors, at.options["r"]  # the second half of the ranks are variances, of which nothing is seen
    a, b = t["pvera_A"][:r, : at.layer.inputs], t["pvera_B"][: at.layer.outputs]
    return t["pvera_lambda_d"][:r, None] * a, t["pvera_lambda_b"][:, None] * b


def shira(at: At) -> Pair:
    rows, columns = at.tensors["shira_indices"].long()
    empty = at.tensors["shira_weight"].new_zeros(at.layer.outputs, at.layer.inputs)
    return as_factors(empty.index_put((rows, columns), at.tensors["shira_weight"], accumulate=True))


def vblora(at: At) -> Pair:
    bank = at.tensors["vblora_vector_bank"]

    def mixed(logits: Tensor) -> Tensor:
        best, which = logits.topk(at.options["topk"], dim=-1)
        return (best.softmax(-1)[..., None] * bank[which]).sum(-2)

    a, b = mixed(at.tensors["vblora_logits_A"]), mixed(at.tensors["vblora_logits_B"])
    return a.flatten(1), b.transpose(1, 2).flatten(0, 1)


def waveft(at: At) -> Pair:
    spectrum = _placed(at, at.tensors["waveft_spectrum"])
    whole = _inverse_haar(spectrum) if at.options["use_idwt"] else spectrum
    return as_factors(whole * at.options["scaling"])


def _placed(at: At, values: Tensor) -> Tensor:
    """The values in a matrix [out, in], at the places that their seed draws."""
    inputs, outputs = at.layer.inputs, at.layer.outputs
    drawn = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(at.options["random_loc_seed"]))
    places = drawn[: len(values)].to(values.device)
    return values.new_zeros(outputs, inputs).index_put((places // inputs, places % inputs), values)


def _inverse_haar(spectrum: Tensor) -> Tensor:
    """One level of a matrix whose quarters are means (above, left), the differences of neighbouring rows (above,
    right), those of neighbouring columns (below, left) and those of both. Odd sides are padded at their end."""
    outputs, inputs = spectrum.shape
    padded = torch.nn.functional.pad(spectrum, (0, inputs % 2, 0, outputs % 2))
    halves = [half.chunk(2, 1) for half in padded.chunk(2, 0)]
    (low, of_rows), (of_columns, of_both) = halves
    even_rows = torch.stack([low + of_rows + of_columns + of_both, low + of_rows - of_columns - of_both], -1)
    odd_rows = torch.stack([low - of_rows + of_columns - of_both, low - of_rows - of_columns + of_both], -1)
    whole = torch.stack([even_rows.flatten(1), odd_rows.flatten(1)], 1).flatten(0, 1) / 2
    return whole[:outputs, :inputs]


UPDATES: dict[str, Callable[[At], Pair]] = {
    "ADALORA": adalora, "C3A": c3a, "DELORA": delora, "FOURIERFT": fourierft, "GRALORA": gralora, "HIRA": hira,
    "MISS": miss, "PVERA": pvera, "SHIRA": shira, "VBLORA": vblora, "WAVEFT": waveft,
}  # fmt: skip
"""By PEFT's type."""
