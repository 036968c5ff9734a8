"""What is planned for a GPU, beside memory that other systems publish: nothing was run. They keep other things than
Topwork does, so the figures need not agree; where they differ the table says by what."""

from common import table

GIB = 2**30
TORCHTUNE, UNSLOTH = "torchtune's README, peak of tensors", "Unsloth's benchmarks page, longest context"
RUNS = (
    ("llama-3.1-8b", "QLoRA, 2 rows of 2,048, checkpointed", True, 4096, 2048, "full", 7.4),
    ("llama-3.1-8b", "LoRA, the same", False, 4096, 2048, "full", 16.2),
    ("llama-3.1-8b", "LoRA, not checkpointed", False, 4096, 2048, "off", 30.3),
    ("llama-3.2-3b", "LoRA, 2 rows of 4,096, checkpointed, offloaded", False, 8192, 4096, "full", 8.5),
    ("llama-3.2-3b", "QLoRA, the same", True, 8192, 4096, "full", 4.6),
)
"""torchtune's, as read on 2026-04-23; that its 30.3 GiB were not checkpointed is inferred from their size. r is 8."""
CONTEXTS = {8: 2972, 16: 40724, 24: 78475, 48: 191728, 80: 342733}
"""Unsloth's, by a card's GB: Llama 3.1 8B, QLoRA r 32 on all linear layers, one row a step."""


def peers_text() -> str:
    """For docs/planning-errors.md."""
    runs = []
    for model, setting, packed, tokens, longest, checkpointing, told in RUNS:
        tensors, held, layers = _planned(model, packed, tokens, longest, checkpointing == "full")
        runs.append([
            model, setting, f"{told:.1f}", f"{tensors / GIB:.1f}", f"{(tensors - held) / GIB:.1f}", f"{held / GIB:.1f}",
            str(layers),
        ])  # fmt: skip
    head = ["base", "run", "told GiB", "planned GiB", "of these not between layers", "between layers", "layers again"]
    contexts = [[f"{size} GB", f"{told:,}", f"{_longest(size * 10**9):,}"] for size, told in CONTEXTS.items()]
    return "\n\n".join([
        "## Beside what others publish",
        "Nothing here was run: planned for a GPU, without CUDA itself, beside what others tell of their own systems. "
        f"{TORCHTUNE}; {UNSLOTH}.",
        table(head, runs),
        "Topwork hands fp32 from layer to layer, 4 bytes a value where torchtune's layers hand on 2, and keeps it on "
        "the GPU where torchtune's 3B runs bring it to the host: that column is most of what Topwork is planned to "
        "take more.",
        table(["card", "Unsloth's longest row", "planned for Topwork"], contexts),
        "Unsloth keeps what lies between layers in the host's memory; Topwork keeps it on the GPU, so its rows are "
        "shorter, by more the larger the card is.",
    ])  # fmt: skip


def _planned(model: str, packed: bool, tokens: int, longest: int, again: bool) -> tuple[int, int, int]:
    """Bytes of tensors, those between checkpointed layers, and how many these are; every token is learned."""
    from topwork.training.memory import PassShape, peak
    from topwork.training.memory_layers import given_bytes
    from topwork.training.memory_process import CUDA_ALLOCATOR_BYTES, CUDA_CONTEXT_BYTES

    setup = _setup(model, packed, 8)
    layers = setup.structure.layers if again else 0
    planned = peak(setup, PassShape(tokens, tokens, longest), layers).bytes - CUDA_CONTEXT_BYTES - CUDA_ALLOCATOR_BYTES
    return planned, tokens * given_bytes(setup.structure, setup.value_bytes, layers), layers


def _longest(card_bytes: int) -> int:
    """Tokens of the longest row that fits, every layer checkpointed."""
    from topwork.training.memory import PassShape, peak

    setup, found = _setup("llama-3.1-8b", True, 32), 0
    for step in (1 << number for number in range(20, -1, -1)):
        tokens = found + step
        if peak(setup, PassShape(tokens, tokens, tokens), setup.structure.layers).bytes <= card_bytes:
            found = tokens
    return found


def _setup(model: str, packed: bool, r: int):  # type: ignore[no-untyped-def]
    from topwork.adapters.config import LoraConfig
    from topwork.adapters.sizes import tensor_sizes
    from topwork.models.config import ModelConfig
    from topwork.plan.base import structure_named
    from topwork.quantization.config import QuantizationConfig
    from topwork.training.memory import Member, Setup

    structure, adapter = structure_named(ModelConfig(model_name_or_path=model)), LoraConfig(r=r)
    member = Member(adapter, "adamw", tensor_sizes(structure, adapter))
    return Setup(structure, "bfloat16", QuantizationConfig(load_in_4bit=packed), (member,), "cuda")
