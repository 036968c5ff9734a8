"""The Triton kernels of a layer, of the vectors that adapters learn, of the residual sum and of the loss beside their
truths: compiled on a GPU, interpreted on the CPU.

`python triton_layer_cases.py`, with TRITON_INTERPRET=1, prints one line for each case: its name, and "as the truth" or
how far from it. The interpreter has to be asked for before triton is imported anywhere, hence a process of its own.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.measure import relative
from topwork.common.seeds import hashed
from topwork.ops import gain as gain_op
from topwork.ops import gated as gated_op
from topwork.ops import norm as norm_op
from topwork.ops import rotary as rotary_op
from topwork.ops.dropout import Dropout, drop_reference
from topwork.ops.logprobs import logprob_slope_reference
from topwork.ops.residual import add_and_round_reference
from topwork.ops.triton import gain, layer, logprobs, residual

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative, in norms; twice for the interpreter, which cuts fp32 off to bf16 where the GPU rounds to the nearest."""


@dataclass(frozen=True)
class Maker:
    """Random inputs."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.device, self.dtype)

    def parts(self, *shape: int, columns: int) -> tuple[Tensor, ...]:
        """`columns` tensors of that shape, side by side in one buffer, with a gap before and after."""
        whole = self(*shape[:-1], columns * shape[-1] + 16)
        return whole[..., 8:-8].tensor_split(columns, -1)


def judged(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> float:
    """How many tolerances the farthest is away; NaN and infinity have to be at the same places."""
    worst = 0.0
    for left, right in zip(found, truth, strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            return float("inf")
        odd = ~right.isfinite()
        if not torch.equal(left.isfinite(), ~odd) or not torch.equal(left[odd].nan_to_num(), right[odd].nan_to_num()):
            return float("inf")
        own = tolerance if left.dtype != torch.float32 else TOLERANCE[torch.float32]
        worst = max(worst, relative(left[~odd], right[~odd], 1e-30) / own)
    return worst


def norms(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    for shape in [(1, 1), (5, 7), (3, 576), (37, 64), (2, 3, 33), (1, 4097), (0, 8)]:
        for unit_offset in (False, True):
            for weight_type in {make.dtype, torch.float32}:
                weight = make(shape[-1]).to(weight_type)
                for layout in ("whole", "part"):
                    x, dy = make.parts(*shape, columns=2) if layout == "part" else [make(*shape) for _ in range(2)]
                    y, rstd = layer.rms_norm(x, weight, 1e-5, unit_offset)
                    truth, steady = norm_op.rms_norm_reference(x, weight, 1e-5, unit_offset)
                    again = layer.rms_normalized(x, weight, rstd, unit_offset)
                    found, expected = [y, rstd, again, again.isclose(y, 0, 0)], [truth, steady, truth, truth == truth]
                    found.append(layer.rms_norm_backward(dy, x, weight, rstd, unit_offset))
                    expected.append(norm_op.rms_norm_backward_reference(dy, x, weight, steady, unit_offset))
                    yield f"norm {shape} {layout} unit_offset={unit_offset} {weight_type}", found, expected


def rotations(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    for tokens, heads, width, rotated in [
        (1, 1, 2, 2),
        (5, 3, 64, 64),
        (4, 9, 20, 12),
        (3, 40, 128, 128),
        (2, 2, 4, 0),
    ]:
        for table in {make.dtype, torch.float32}:
            cos, sin = (torch.rand(tokens, 2 * rotated, device=make.device).to(table)[:, :rotated] for _ in range(2))
            for inverse in (False, True):
                buffer = make(tokens, heads + 2, width + 8)
                truth = buffer.clone()
                layer.rotate_(buffer[:, 1:-1, 4:-4], cos, sin, inverse)
                rotary_op.rotate_reference_(truth[:, 1:-1, 4:-4], cos, sin, inverse)
                yield f"rotate {tokens, heads, width, rotated} inverse={inverse} {table}", [buffer], [truth]
                turned = make(heads, tokens, width).transpose(0, 1)
                truth = turned.clone()
                layer.rotate_(turned, cos, sin, inverse)
                rotary_op.rotate_reference_(truth, cos, sin, inverse)
                yield f"rotate turned {tokens, heads, width, rotated} {table}", [turned], [truth]


def gates(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    for kind in gated_op.KINDS:
        for shape in [(1, 1), (3, 1025), (7, 96), (0, 4)]:
            gate, up = make.parts(*shape, columns=2)
            gate *= 4
            dh = make(*shape)
            found, expected = [layer.gated(gate, up, kind)], [gated_op.gated_reference(gate, up, kind)]
            expected += gated_op.gated_backward_reference(dh, gate, up, kind)
            apart = make(2, *shape)
            layer.gated_backward(dh, gate, up, kind, apart[0], apart[1])
            found += [apart[0], apart[1]]
            layer.gated_backward(dh, gate, up, kind, gate, up)  # in their own memory
            yield f"gated {kind} {shape}", [*found, gate, up], [*expected, *expected[1:]]


def drops(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Key and draws with their highest bits set and not."""
    for shape in [(1, 1), (3, 1025), (7, 96), (0, 4)]:
        for key, share in ((hashed("a"), 0.1), (0xFFFFFFFF, 0.75), (0, 0.0)):
            x, y = make.parts(*shape, columns=2)
            draws = torch.tensor([0xFFFFFFFF, 0, *range(1, 6)][: shape[0]], device=make.device, dtype=torch.int64)
            found, expected = [], []
            for add in (False, True):
                dropout, into, truth = Dropout(share, key, draws), y.clone(), y.clone()
                layer.drop(x, draws, key, dropout.least, dropout.scale, into, add)
                drop_reference(x, dropout, truth, add)
                found += [into, into == 0]
                expected += [truth, truth == 0]
            yield f"drop {shape} {share}", found, expected


def sums(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """A stream within a larger buffer, nothing beside which may be written."""
    for shape in [(1, 1), (5, 3), (7, 576), (3, 2050), (0, 8)]:
        for adds, rounds, in_place in [(1, 1, 1), (1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 1, 1), (0, 0, 1)]:
            count, y = shape[0] * shape[1], make(*shape) if adds else None
            begun, elsewhere = torch.randn(count + 8, device=make.device), torch.ones(count + 8, device=make.device)
            branch, results = make(count + 8), []
            for run in (residual.add_and_round, add_and_round_reference):
                buffers = [begun.clone(), elsewhere.clone(), branch.clone()]
                x, other = (buffer[4:-4].view(1, *shape) for buffer in buffers[:2])
                rounded = buffers[2][4:-4].view(shape) if rounds else None
                run(x, y, 0.3, x if in_place else other, rounded, 0.7)
                results.append(buffers)
            yield f"sum {shape} adds={adds} rounds={rounds} in_place={in_place}", results[0], results[1]


def vectors(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Columns of a wider buffer, nothing beside which may be written; sums by many blocks of a tile and by few longer
    ones."""
    before = gain.BLOCKS
    for shape, most in [((1, 1), 256), ((3, 7), 256), ((37, 64), 256), ((130, 300), 256), ((130, 300), 2), ((0, 5), 9)]:
        for leaves in (False, True):
            gain.BLOCKS = most
            factor, beside = 0.5 + torch.rand(2 * shape[1], device=make.device)[::2], make(shape[1]) if leaves else None
            whole, dy = make(shape[0], shape[1] + 16), make.parts(*shape, columns=2)[0]
            z, results = whole[:, 8:-8], []
            for triton in (True, False):
                buffers = [whole.clone() for _ in range(4)]
                multiplied, added, output, gradient = (buffer[:, 8:-8] for buffer in buffers)
                gradient.copy_(dy)
                if triton:
                    gain.multiply_(multiplied, factor, beside)
                    gain.add_(added, factor)
                    found = [gain.gain_sums_(output, dy, factor, beside, output, False), gain.column_sums(dy)]
                    found.append(gain.gain_sums_(z, gradient, factor, beside, gradient, False))
                else:
                    gain_op.multiply_reference_(multiplied, factor, beside)
                    gain_op.add_reference_(added, factor)
                    found = [gain_op.gain_sums_reference_(output, dy, factor, beside, output)]
                    found.append(gain_op.column_sums_reference(dy))
                    found.append(gain_op.gain_sums_reference_(z, gradient, factor, beside, gradient))
                results.append([*found, *buffers])
            yield f"vectors {shape} leaves={leaves} blocks={most}", results[0], results[1]
            factor[0] = 0
            divided = gain.gain_sums_(z, dy, factor, beside, torch.empty_like(dy), True)
            sums = gain_op.gain_sums_reference_(z, dy, factor, beside, torch.empty_like(dy))
            expected = torch.where(factor == 0, 0, sums / factor)
            yield f"divided {shape} leaves={leaves} blocks={most}", [divided], [expected]
    gain.BLOCKS = before


def losses(make: Maker) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    def case(name: str, logits: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[str, list[Tensor], list[Tensor]]:
        gradient = torch.randn(len(targets), device=make.device)
        expected = logprob_slope_reference(logits, targets, gradient, scale)
        return name, [logprobs.logprob_slope_(logits, targets, gradient, scale), logits], list(expected)

    for rows, vocabulary in [(1, 1), (3, 2), (5, 1000), (2, 8192), (3, 20003), (0, 9)]:
        targets = torch.randint(0, vocabulary, (rows,)).to(make.device)
        yield case(f"loss {rows, vocabulary}", make(rows, vocabulary) * 3, targets)
        yield case(f"loss of a part {rows, vocabulary}", make.parts(rows, vocabulary, columns=2)[1], targets, 0.5)
    hard = make(6, 9000)
    hard[0] *= 1e4
    hard[1], hard[2], hard[3] = -1e4, 1e4, 0
    hard[4, :8500] = -torch.inf  # the whole first stretch
    hard[5, 17] = -torch.inf
    yield case("loss of extremes", hard, torch.tensor([3, 4, 5, 8999, 8600, 17]).to(make.device))
    odd = make(3, 9000)
    odd[0, 8700], odd[1] = torch.nan, -torch.inf
    yield case("loss of rows that are no distributions", odd, torch.tensor([3, 4, 5]).to(make.device))
    beyond = torch.tensor([-1, 50, 7]).to(make.device)
    found = logprobs.logprob_slope_(make(3, 50), beyond, torch.ones(3, device=make.device), 1.0)
    yield "loss of targets beyond", [found.isfinite()], [torch.tensor([False, False, True]).to(make.device)]


FAMILIES: dict[str, Callable[[Maker], Iterator[tuple[str, list[Tensor], list[Tensor]]]]] = {
    "norm": norms, "rotate": rotations, "gated": gates, "drop": drops, "sum": sums, "vector": vectors,
    "loss": losses,
}  # fmt: skip


def cases(family: str, device: torch.device, interpreted: bool) -> Iterator[tuple[str, float]]:
    """(name, distance from the truth in tolerances) of one family of kernels."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tolerance = TOLERANCE[dtype] * (2 if interpreted and dtype == torch.bfloat16 else 1)
        for name, found, truth in FAMILIES[family](Maker(device, dtype)):
            yield f"{name} {dtype}", judged(found, truth, tolerance)


if __name__ == "__main__":
    for family in FAMILIES:
        for name, far in cases(family, torch.device("cpu"), interpreted=True):
            print(f"{name}: {'as the truth' if far <= 1 else f'{far:.2f} tolerances away'}")
