"""The Triton kernel of row lengths beside its truth: compiled on a GPU, interpreted on the CPU.

`python triton_row_lengths_cases.py`, with TRITON_INTERPRET=1, prints one line for each case. The interpreter has to be
asked for before triton is imported anywhere, hence a process of its own.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.measure import relative
from topwork.ops.triton.row_lengths import row_lengths

SHAPES = [(1, 1), (5, 3), (33, 16), (70, 64), (40, 100), (3, 128), (0, 4)]
"""out, r."""


def cases(device: torch.device, interpreted: bool) -> Iterator[tuple[str, float]]:
    """(name, distance from float64 in tolerances)."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for outputs, r in SHAPES:
            for turned in (False, True):
                w, a, b = torch.randn(outputs, 24), torch.randn(r, 24) / 24**0.5, torch.randn(outputs, r) / r**0.5
                across = (w @ a.t()).to(dtype)
                across = across.t().contiguous().t() if turned else across
                given = [x.to(device) for x in (w.square().sum(1), b, across, a @ a.t())]
                squares, b64, p64, gram = (x.double() for x in given)
                truth = (squares + 0.5 * 2 * (b64 * p64).sum(1) + 0.25 * (b64 * (b64 @ gram)).sum(1)).sqrt()
                found = row_lengths(*given, 0.5)
                far = relative(found, truth, 1e-30) / 1e-6 if outputs else float(found.shape != (0,))
                yield f"{outputs, r} {dtype} turned {turned:d}", far
    zeros = [torch.zeros(shape, device=device) for shape in [(2,), (2, 4), (2, 4), (4, 4)]]
    nothing = row_lengths(*zeros, 1.0)
    yield "a row of nothing has a length to divide by", 0.0 if bool((nothing > 0).all()) else 2.0


if __name__ == "__main__":
    for name, far in cases(torch.device("cpu"), interpreted=True):
        print(f"{name}: {'as the truth' if far <= 1 else f'{far:.2f} tolerances away'}")
