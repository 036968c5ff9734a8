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
HEAP_SHARE = 0.03
"""Of what the C library gives and takes while a pass runs, what lies in holes that nothing fits. (What is kept in a
pass's own blocks has none.)"""


def process_bytes(vocabulary: int) -> int:
    """Of a process that has read its rows and is about to train, without base and adapters."""
    return IMPORTS_BYTES + TOKEN_BYTES * vocabulary
