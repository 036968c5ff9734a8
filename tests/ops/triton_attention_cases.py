"""The Triton kernels of attention beside the truth in float64: compiled on a GPU, interpreted on the CPU.

`python triton_attention_cases.py`, with TRITON_INTERPRET=1, prints one line for each case. The interpreter has to be
asked for before triton is imported anywhere, hence a process of its own.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.attention import attention_by_sequence
from reference.measure import relative
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.triton import attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3 * 2**-8}
"""Relative, in norms; twice for the interpreter, which cuts fp32 off to bf16 where the GPU rounds to the nearest."""
HALVES = (torch.float16, torch.bfloat16)
RAGGED = (0, 1, 1, 70, 87, 290)
"""One token, none, fewer than a tile has rows, more than two tiles of 128."""
PLAIN = AttentionRule(0.2)


@dataclass(frozen=True)
class Case:
    """One batch. `layout`: apart, turned, or q, k and v side by side in one buffer; `into`: others of that layout, the
    inputs themselves, or turned ones of another type."""

    bounds: tuple[int, ...] = RAGGED
    heads: tuple[int, int] = (2, 1)
    size: int = 64
    size_v: int | None = None
    rule: AttentionRule = PLAIN
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "apart"
    into: str = "others"


def all_cases() -> list[Case]:
    plain = Case()
    short = replace(plain, bounds=(0, 3, 40))
    rules = {
        "window": AttentionRule(0.2, window=50),
        "window of one": AttentionRule(0.2, window=1),
        "window over tiles": AttentionRule(0.2, window=150),
        "window longer than all": AttentionRule(0.2, window=1000),
        "cap": AttentionRule(0.5, softcap=1.5),
        "negative, capped": AttentionRule(-0.5, softcap=1.5),
        "negative": AttentionRule(-0.2),
        "cap and window": AttentionRule(0.5, window=40, softcap=1.5),
    }
    return [
        *(replace(plain, dtype=dtype) for dtype in TOLERANCE),
        *(replace(plain, rule=rule, bounds=(0, 1, 1, 90, 100)) for rule in rules.values()),
        replace(plain, rule=rules["window"], sinks=True, bounds=(0, 40, 41)),
        replace(plain, rule=rules["cap"], sinks=True, bounds=(0, 40, 41)),
        *(replace(plain, rule=rules["cap and window"], sinks=True, dtype=dtype) for dtype in TOLERANCE),
        *(replace(plain, dtype=dtype, rule=rules["window over tiles"], heads=(1, 1)) for dtype in HALVES),
        replace(plain, sinks=True, heads=(6, 2), bounds=(0, 40)),
        *(replace(short, size=size) for size in (8, 16, 24, 80, 96, 128, 250, 256)),
        *(replace(short, size=size, dtype=torch.bfloat16) for size in (8, 80, 128, 256)),
        replace(short, size=96, size_v=40, sinks=True),
        replace(short, size=24, size_v=128, dtype=torch.float16),
        replace(plain, size=256, dtype=torch.bfloat16, bounds=(0, 150)),
        *(replace(plain, layout="one buffer", into=into, dtype=torch.bfloat16) for into in ("others", "inputs")),
        replace(short, layout="one buffer", into="inputs", rule=rules["cap and window"], sinks=True, heads=(4, 2)),
        replace(short, into="inputs"),
        replace(short, into="turned", dtype=torch.float16),
        replace(short, layout="turned"),
        replace(plain, bounds=(0, 0, 0), sinks=True),
    ]  # fmt: skip


def cases(device: torch.device, interpreted: bool) -> Iterator[tuple[str, float]]:
    """(name, distance from the truth in tolerances), the farthest of out, lse and all gradients."""
    torch.manual_seed(0)
    for case in all_cases():
        tolerance = TOLERANCE[case.dtype] * (2 if interpreted and case.dtype == torch.bfloat16 else 1)
        yield str(case), _farthest(case, device, tolerance)
    for rule in (PLAIN, AttentionRule(0.2, window=50)):
        yield f"neighbours, {rule}", 0.0 if _neighbours_change_nothing(rule, device) else float("inf")


def _farthest(case: Case, device: torch.device, tolerance: float) -> float:
    tokens, (heads, key_heads), size_v = case.bounds[-1], case.heads, case.size_v or case.size
    shapes = ((heads, case.size), (key_heads, case.size), (key_heads, size_v))
    query, key, value = inputs = _laid_out(case.layout, tokens, shapes, case.dtype, device)
    grad = torch.randn(tokens, heads, size_v).to(device, case.dtype)
    sinks = torch.randn(heads).to(device, case.dtype) if case.sinks else None
    expected = _truth(case, inputs, grad, sinks)
    out, lse = attention.attention(query, key, value, case.bounds, case.rule, sinks)
    if case.into == "inputs":
        into = inputs
    else:
        into = _laid_out("turned" if case.into == "turned" else case.layout, tokens, shapes, case.dtype, device)
        into = tuple(x.float() for x in into) if case.into == "turned" else into
    for x in into if case.into != "inputs" else ():
        x.fill_(torch.nan)
    dsinks = attention.attention_backward(grad, query, key, value, out, lse, case.bounds, case.rule, sinks, into)
    found = [out, lse, *into, *([] if dsinks is None else [dsinks])]
    if [x.shape for x in found] != [x.shape for x in expected] or not all(x.isfinite().all() for x in found):
        return float("inf")
    least = 0.2 * float(torch.stack([x.norm() for x in expected[2:5]]).norm())  # queries of one key have no gradient
    far = [relative(out, expected[0], 1e-30), relative(lse, expected[1], 1e-30) * tolerance / TOLERANCE[torch.float32]]
    far += [relative(x, y, least) for x, y in zip(found[2:], expected[2:])]
    return max(far) / tolerance if tokens else 0.0


def _neighbours_change_nothing(rule: AttentionRule, device: torch.device) -> bool:
    """A sequence alone, and after and before others that are not finite: the same bits, out, lse and gradients."""
    given = [torch.randn(150, heads, 64).to(device, torch.bfloat16) for heads in (2, 2, 1, 1)]
    alone, all_of_them = (_both(*tensors, bounds, rule) for tensors, bounds in [
        ([x[30:110] for x in given], (0, 80)),
        ([torch.cat([x[:30] * torch.inf, x[30:110], x[110:] * torch.nan]) for x in given], (0, 30, 110, 150)),
    ])  # fmt: skip
    return all(torch.equal(x, y[30:110]) for x, y in zip(alone, all_of_them))


def _both(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule
) -> list[Tensor]:
    out, lse = attention.attention(query, key, value, bounds, rule, None)
    into = tuple(torch.empty_like(x) for x in (query, key, value))
    attention.attention_backward(grad, query, key, value, out, lse, bounds, rule, None, into)
    return [out, lse.t(), *into]


def _laid_out(
    layout: str, tokens: int, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    if layout == "one buffer":
        widths = [heads * size for heads, size in shapes]
        parts = torch.randn(tokens, sum(widths) + 8).to(device, dtype)[:, 8:].split(widths, 1)
        query, key, value = (part.unflatten(1, shape) for part, shape in zip(parts, shapes))
    elif layout == "turned":
        query, key, value = (
            torch.randn(size, heads, tokens).to(device, dtype).transpose(0, 2) for heads, size in shapes
        )
    else:
        query, key, value = (torch.randn(tokens, *shape).to(device, dtype) for shape in shapes)
    return query, key, value


def _truth(case: Case, inputs: tuple[Tensor, ...], grad: Tensor, sinks: Tensor | None) -> list[Tensor]:
    """out, lse, gradients of query, key, value and, with sinks, theirs."""
    rule = case.rule
    leaves = [x.detach().cpu().double().requires_grad_() for x in (*inputs, *([] if sinks is None else [sinks]))]
    query, key, value = leaves[:3]
    sink = leaves[3] if case.sinks else None
    out = attention_by_sequence(query, key, value, case.bounds, rule.scale, rule.window, rule.softcap, sink)
    grads = torch.autograd.grad(
        (out * grad.cpu().double()).sum(), leaves, allow_unused=True, materialize_grads=True
    )  # fmt: skip
    return [x.detach().to(grad.device) for x in (out, _lse(case, query, key, sink), *grads)]


def _lse(case: Case, query: Tensor, key: Tensor, sinks: Tensor | None) -> Tensor:
    tokens, heads = query.shape[:2]
    scores = torch.einsum("ihd,jhd->hij", query, key.repeat_interleave(heads // key.shape[1], 1)) * case.rule.scale
    if case.rule.softcap is not None:
        scores = torch.tanh(scores / case.rule.softcap) * case.rule.softcap
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (j <= i) & (j > i - (case.rule.window or tokens))
    ends = torch.tensor(case.bounds[1:], dtype=torch.long)
    sequence = torch.bucketize(torch.arange(tokens), ends, right=True)
    scores = scores.masked_fill(~(seen & (sequence[:, None] == sequence)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(heads, tokens, 1)], -1)
    return scores.logsumexp(-1) if tokens else scores.new_empty(heads, 0)


if __name__ == "__main__":
    for name, far in cases(torch.device("cpu"), interpreted=True):
        print(f"{name}: {'as the truth' if far <= 1 else f'{far:.2f} tolerances away'}")
