"""What the process takes beside all that training asks for: measured, since nothing tells it beforehand. Training,
which is such a process, reads its own size instead (`run/fit.py`).

`python benchmarks/planned.py --process` prints these figures for the machine at hand; these are of torch 2.13 (CPU) and
transformers 5.23 on x86-64.
"""

IMPORTS_BYTES = 461 << 20
"""Python with torch, transformers, tokenizers and Topwork imported, their libraries' pages included, rows read."""
TOKEN_BYTES = 450
"""Of a tokenizer's entry, with its merges."""
KERNELS_BYTES = 16 << 20
"""Products' kernels that oneDNN compiles for the shapes of a pass (128 are kept, `common/devices.py`), and pages of
libraries that are first looked at while a pass runs."""
HEAP_TOP_BYTES = 12 << 20
"""Free memory at the top of the C library's heap: glibc gives it back from twice the largest block on that it ever
unmapped, 64 MiB at most (M_TRIM_THRESHOLD); runs alike end with 0 to 50 MiB of it."""
HEAP_SHARE = 0.35
"""Holes beside what is kept in the C library's heap, where it is taken among what is needed for a moment: measured for
plain layers, which are kept so (decision 12 has what a heap does then). What is kept in a pass's own blocks has
none."""
HEAD_COPIES = 2
"""Chunks of logits that a product with a packed head copies for itself on its way back: it sums over the whole
vocabulary, a panel of few columns at a time."""


def process_bytes(vocabulary: int) -> int:
    """Of a process that has read its rows and is about to train, without base and adapters."""
    return IMPORTS_BYTES + TOKEN_BYTES * vocabulary
