"""What the process takes beside all that training asks for: measured, since nothing tells it beforehand. Training,
which is such a process, reads its own size instead (`run/fit.py`).

`python benchmarks/planned.py --process` prints what each recorded run's process had before its first step; these are
of torch 2.13 (CPU) and transformers 5.23 on x86-64. The other figures here were set from a few runs of that record, and
its table says from which.
"""

IMPORTS_BYTES = 461 << 20
"""Python with torch, transformers, tokenizers and Topwork imported, their libraries' pages included, rows read."""
TOKENIZER_SHARE = 6.3
"""Bytes that a tokenizer takes for each of its tokenizer.json's, in which an entry with its merges has about
ENTRY_BYTES."""
ENTRY_BYTES = 72
KERNELS_BYTES = 16 << 20
"""What a process grows by in its first steps that no formula tells: products' kernels that oneDNN compiles for the
shapes of a pass (128 are kept, `common/devices.py`), pages of libraries that are first looked at. Set from what four
LoRA runs of SmolLM2 had beside their parts."""
HEAP_TOP_BYTES = 12 << 20
"""Free memory that the C library's heap keeps. Two runs alike differed by up to 43 MiB; glibc gives its top back from
M_TRIM_THRESHOLD on, which grows to 64 MiB, and that this is the cause was not looked into."""
HEAP_SHARE = 0.4
"""Holes beside what is kept in the C library's heap, where it is taken among what is needed for a moment (decision 12
has what a heap does then). Set from two runs, GPT-2 in bf16 and fp32, which had 0.35 and 0.40: the larger,
since a plan may rather ask for too much. What is kept in a pass's own blocks has none."""
EXPERTS_HEAP_SHARE = 1.0
"""The same where layers have experts: how many rows each is given changes with every pass, so that what one leaves free
seldom fits the next. Set from one run (Qwen3-MoE's shape over words of its whole vocabulary), which had about as much
in holes as is kept."""
GRADIENTS_SHARE = 0.2
"""Of what layers keep in that heap, how much the gradients of modules that are trained whole take again as layers go
backward. SmolLM2's and GPT-2's runs had 0.2 to 0.5; in a step's second pass the gradients stand there already."""
HEAD_COPIES = 2
"""Chunks of logits that a packed head takes beside the one it has: SmolLM2's in NF4 took two more, in int8 one. What
holds them was not looked into; it may be a copy that a product makes which sums over the whole vocabulary."""

CUDA_CONTEXT_BYTES = 400 * 10**6
"""Of a GPU's memory before the first tensor: driver and kernels, "around 400MB" with CUDA's lazy loading (pytorch issue
109888, a maintainer on 2023-09-23). Not measured here; it grows with the kernels that a run loads."""
CUDA_ALLOCATOR_BYTES = (20 + 2 + 32) << 20
"""What torch's allocator has beside tensors, where its segments grow: the last large and the last small segment (20 and
2 MiB: kLargeBuffer, kSmallBuffer of CUDACachingAllocator.cpp), and cuBLAS's workspace (8.5 MB in PyTorch's forum, topic
178671; 32 MiB on Hopper, from memory, not re-read). Holes that passes of many lengths leave are not in it."""


def process_bytes(vocabulary: int, tokenizer_bytes: int | None = None) -> int:
    """Of a process that has read its rows and is about to train, without base and adapters; `tokenizer_bytes` as in
    `Setup`."""
    file = ENTRY_BYTES * vocabulary if tokenizer_bytes is None else tokenizer_bytes
    return IMPORTS_BYTES + int(TOKENIZER_SHARE * file)
