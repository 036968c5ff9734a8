"""What the process takes beside all that training asks for: measured, since nothing tells it beforehand.

`python benchmarks/planned.py --process` prints these figures for the machine at hand.
"""

IMPORTS_BYTES = 440 << 20
"""Python with torch, transformers and tokenizers imported, their libraries' pages included."""
TOKEN_BYTES = 950
"""Of a tokenizer's entry."""
TRAINING_BYTES = 40 << 20
"""Compiled kernels, threads' heaps, autograd's small things."""
HOLES_BYTES = 24 << 20
"""Freed memory that the C library keeps."""


def process_bytes(vocabulary: int) -> int:
    """Of a process that trains, beside what it trains."""
    return IMPORTS_BYTES + TRAINING_BYTES + TOKEN_BYTES * vocabulary
