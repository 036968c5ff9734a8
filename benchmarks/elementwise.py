"""A layer's element-wise ops: the C kernels beside plain torch, the same values, in turn, in one process.

    python benchmarks/elementwise.py [--tokens 2048] [--rounds 15]

A round times every op once on each side. The figures are medians over the rounds and quartiles; GB/s counts what an op
must read and write once, not what it does. Results of a call are new memory each time (but for the residual sum,
gains and dropout). Beside dropout, which draws nothing, stands torch's own. Writes benchmarks/results/elementwise.*
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import BENCHMARKS, surroundings, surroundings_text, table, threads, write_record
from topwork.common.seeds import hashed
from topwork.ops import dropout, gain, gated, norm, residual, rotary
from topwork.ops.dropout import Dropout

SHAPES = {
    "SmolLM2-135M": {"d": 576, "f": 1536, "heads": 12, "head_dim": 64},
    "Llama-3.2-1B": {"d": 2048, "f": 8192, "heads": 40, "head_dim": 64},
}
"""`heads` are those of queries and keys together, which are rotated."""
EPS = 1e-6

Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(threads())
    rows = [
        {"shape": name, **found}
        for name, shape in SHAPES.items()
        for found in measured(ops(given.tokens, **shape), given.rounds)
    ]
    record = {"tokens": given.tokens, "rounds": given.rounds, "rows": rows, "surroundings": surroundings()}
    write_record(BENCHMARKS / "results" / "elementwise", record, text(record))
    print(text(record))


def ops(tokens: int, d: int, f: int, heads: int, head_dim: int) -> dict[str, tuple[int, Call, Call]]:
    """Of each op the bytes that it must move, the kernel and the truth."""
    x, dy = drawn(tokens, d), drawn(tokens, d)
    weight = drawn(d)
    _, rstd = norm.rms_norm(x, weight, EPS)
    q, cos, sin = drawn(tokens, heads, head_dim), torch.randn(tokens, head_dim), torch.randn(tokens, head_dim)
    gate, up = drawn(tokens, 2 * f).split(f, 1)
    dh, into = drawn(tokens, f), drawn(tokens, 2 * f).split(f, 1)
    batch, branch = torch.randn(1, tokens, d), drawn(tokens, d)
    row, wide = 2 * tokens * d, 2 * tokens * f
    found: dict[str, tuple[int, Call, Call]] = {
        "norm": (
            2 * row, lambda: norm.rms_norm(x, weight, EPS), lambda: norm.rms_norm_reference(x, weight, EPS),
        ),
        "norm again": (
            2 * row, lambda: norm.rms_normalized(x, weight, rstd),
            lambda: norm.rms_normalized_reference(x, weight, rstd),
        ),
        "norm backward": (
            3 * row, lambda: norm.rms_norm_backward(dy, x, weight, rstd),
            lambda: norm.rms_norm_backward_reference(dy, x, weight, rstd),
        ),
        "rotary": (
            4 * q.numel() + 8 * cos.numel(), lambda: rotary.rotate_(q, cos, sin),
            lambda: rotary.rotate_reference_(q, cos, sin),
        ),
        "residual sum and branch": (
            6 * row, lambda: residual.add_and_round(batch, dy, 1.0, batch, branch),
            lambda: residual.add_and_round_reference(batch, dy, 1.0, batch, branch),
        ),
    }  # fmt: skip
    z, slopes, factor = drawn(tokens, 2 * f), drawn(tokens, 2 * f), 0.5 + torch.rand(2 * f)
    found["gain"] = (
        2 * 2 * wide, lambda: gain.multiply_(z, factor), lambda: gain.multiply_reference_(z, factor, None),
    )  # fmt: skip
    found["gain backward"] = (
        3 * 2 * wide, lambda: gain.gain_gradients_(z, slopes, factor),
        lambda: gain.gain_sums_reference_(z, slopes, factor, None, z),
    )  # fmt: skip
    given, out = Dropout(0.05, hashed("layer"), torch.randint(0, 2**32, (tokens,))), drawn(tokens, 2 * f)
    found["dropout"] = (
        2 * 2 * wide, lambda: dropout.drop(z, given, out), lambda: torch.nn.functional.dropout(z, 0.05),
    )  # fmt: skip
    for kind in gated.KINDS:
        found[kind] = (
            3 * wide, lambda kind=kind: gated.gated(gate, up, kind),
            lambda kind=kind: gated.gated_reference(gate, up, kind),
        )  # fmt: skip
        found[f"{kind} backward"] = (
            5 * wide, lambda kind=kind: gated.gated_backward(dh, gate, up, kind, into),
            lambda kind=kind: gated.gated_backward_reference(dh, gate, up, kind),
        )  # fmt: skip
    return found


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def measured(calls: dict[str, tuple[int, Call, Call]], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each side: lower quartile, median, upper quartile."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(rounds + 1):  # the first round warms up
        for name, (_, *sides) in calls.items():
            for times, call in zip(seconds[name], sides):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
    rows = []
    for name, sides in seconds.items():
        native, truth = (statistics.quantiles(times[1:], n=4) for times in sides)
        rows.append(
            {
                "op": name,
                "native_ms": [round(1e3 * value, 4) for value in native],
                "torch_ms": [round(1e3 * value, 4) for value in truth],
                "ratio": round(truth[1] / native[1], 2),
                "native_gb_per_second": round(calls[name][0] / native[1] / 1e9, 1),
            }
        )
    return rows


def text(record: dict[str, Any]) -> str:
    """The record for people."""

    def told(three: list[float]) -> str:
        return f"{three[1]:.2f} ({three[0]:.2f}–{three[2]:.2f})"

    rows = [
        [
            f"{row['shape']}: {row['op']}", told(row["native_ms"]), told(row["torch_ms"]), f"{row['ratio']:.1f} ×",
            f"{row['native_gb_per_second']:.0f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    parts = [
        "# A layer's element-wise ops: C kernels and plain torch",
        f"bf16, {record['tokens']} tokens. Medians of {record['rounds']} rounds, quartiles in brackets. GB/s of what "
        "must be read and written once; a call's result is new memory, which costs the kernel's side its page faults; "
        "the residual sum, gains and dropout have it already. Beside dropout stands torch's own, which draws.",
        table(["op", "C, ms", "torch, ms", "torch / C", "C, GB/s"], rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
