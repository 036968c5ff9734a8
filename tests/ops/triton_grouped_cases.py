"""The Triton kernel of grouped products beside its truth: compiled on a GPU, interpreted on the CPU.

`python triton_grouped_cases.py`, with TRITON_INTERPRET=1, prints one line for each case. The interpreter has to be
asked for before triton is imported anywhere, hence a process of its own.
"""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from reference.measure import relative
from topwork.ops.grouped import Product
from topwork.ops.triton import grouped

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 1, 1), (5, 7, 3), (70, 16, 130), (70, 130, 16), (16, 90, 65), (90, 16, 65), (0, 4, 4), (4, 4, 0)]
"""m, n, k: the six products of low-rank terms in small, and the odd ones."""
LONG = [(16, 40, 2049), (5, 7, 9300)]
"""More rows than a piece has, and than the most pieces of the least length have."""
TYPES = [
    *((x, x, x) for x in TOLERANCE),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float32, torch.float32),
]
"""Of left, right and out."""


def cases(device: torch.device, interpreted: bool) -> Iterator[tuple[str, float]]:
    """(name, distance from the truth in tolerances): all shapes in one call, for each type and layout, and for two of
    the types each way to write."""
    torch.manual_seed(0)
    layouts = list(product((False, True), (False, True)))
    for dtype, right_dtype, out_dtype in TYPES:
        ways = product((0, 1), (0, 3)) if (dtype, right_dtype, out_dtype) in TYPES[::4] else [(1, 3)]
        for (left_turned, right_turned), (beta, gap) in product(layouts, ways):

            def matrix(rows: int, columns: int, turned: bool, dtype: torch.dtype, gap: int) -> torch.Tensor:
                shape = (columns, rows) if turned else (rows, columns)
                x = torch.randn(shape[0], shape[1] + 2 * gap).to(device, dtype)[:, gap : gap + shape[1]]
                return x.t() if turned else x

            products, expected = [], []
            shapes = [*SHAPES, *LONG] if left_turned and not right_turned else SHAPES
            for m, n, k in shapes:
                left, right = matrix(m, k, left_turned, dtype, gap), matrix(k, n, right_turned, right_dtype, gap)
                out = matrix(m, n, False, out_dtype, gap)
                value = 0.5 * left.double() @ right.to(dtype).double()
                expected.append(value + out.double() if beta else value)
                products.append(Product(left, right, out, 0.5, beta))
            grouped.staged([products])[0]()
            # the interpreter cuts fp32 off to bf16 where the GPU rounds to the nearest
            tolerance = TOLERANCE[out_dtype] * (2 if interpreted and out_dtype == torch.bfloat16 else 1)
            for given, value, shape in zip(products, expected, shapes):
                far = relative(given.out, value, 1e-30) / tolerance if value.numel() else 0.0
                turns = f"{left_turned:d}{right_turned:d}"
                yield f"{shape} {dtype} by {right_dtype} into {out_dtype} turned {turns} beta {beta} gap {gap}", far


if __name__ == "__main__":
    for name, far in cases(torch.device("cpu"), interpreted=True):
        print(f"{name}: {'as the truth' if far <= 1 else f'{far:.2f} tolerances away'}")
