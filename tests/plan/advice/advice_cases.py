"""Facts by name, of every kind that a rule speaks of."""

from typing import Any

from topwork.models.structure import Module, Structure
from topwork.plan.advice.facts import Facts

GIB = 1 << 30


def llama(hidden: int = 576, layers: int = 30, inner: int = 1536, family: str = "llama", **more: Any) -> Structure:
    """A llama without biases; of these sizes and 49,152 tokens SmolLM2-135M, but that its head is not tied."""
    vocabulary = more.pop("vocabulary", 49152)
    linear = [("q_proj", hidden, hidden), ("k_proj", hidden // 3, hidden), ("v_proj", hidden // 3, hidden),
              ("o_proj", hidden, hidden), ("gate_proj", inner, hidden), ("up_proj", inner, hidden),
              ("down_proj", hidden, inner)]  # fmt: skip
    modules = [Module("model.embed_tokens", "embedding", vocabulary, hidden, vocabulary * hidden)]
    for number in range(layers):
        for name, rows, columns in linear:
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            path = f"model.layers.{number}.{part}.{name}"
            modules.append(Module(path, "linear", rows, columns, rows * columns))
    modules.append(Module("lm_head", "linear", vocabulary, hidden, vocabulary * hidden))
    return Structure(
        family, tuple(modules), "model.embed_tokens", "lm_head", layers, hidden, 9, 3, hidden // 9, inner, vocabulary,
        more.pop("context_length", 8192), "bfloat16", True, layers, {},
    )  # fmt: skip


SMALL = llama()
LARGE = llama(4096, 4, 14336, vocabulary=32000)
"""As wide as an 8B, and not as deep."""

FACTS: dict[str, Facts] = {
    "nothing but a task": Facts("instruction"),
    "few": Facts("extraction", rows=20, structure=SMALL, memory_bytes=8 * GIB),
    "changing": Facts("instruction", rows=500, goals=frozenset({"changing-knowledge"})),
    "cited": Facts("instruction", rows=500, goals=frozenset({"citations"})),
    "new": Facts("instruction", rows=500, goals=frozenset({"new-facts"})),
    "cheap": Facts("instruction", rows=500, goals=frozenset({"cost"})),
    "intents": Facts("classification", rows=10_003, tokens_per_row=60, learned_share=0.08, longest=200, measured=True,
                     structure=SMALL, memory_bytes=8 * GIB, held_out=True),
    "tickets": Facts("extraction", rows=1_200, tokens_per_row=150, longest=300, structure=SMALL, memory_bytes=8 * GIB),
    "persona": Facts("chat-style", rows=150, tokens_per_row=60, longest=109, turns=True, structure=SMALL),
    "short": Facts("reasoning", rows=96, structure=SMALL, decided={"training.num_train_epochs": 1, "adapter.r": 16}),
    "books": Facts("continued-pretraining", rows=4_000, tokens_per_row=900, longest=9_000, kind="text", documents=True,
                   structure=SMALL, memory_bytes=8 * GIB),
    "a shelf": Facts("continued-pretraining", rows=40_000, tokens_per_row=900, kind="text", structure=SMALL),
    "a library": Facts("continued-pretraining", rows=2_000_000, tokens_per_row=900, kind="text", structure=SMALL,
                       memory_bytes=24 * GIB),
    "calls": Facts("tool-calls", rows=400, writes_calls=False, structure=SMALL),
    "lines": Facts("extraction", rows=1_000, kind="text", structure=SMALL),
    "a large base": Facts("instruction", rows=50_000, tokens_per_row=400, longest=1_500, structure=LARGE,
                          memory_bytes=3 * GIB, device="cuda"),
    "whole": Facts("instruction", rows=5_000, structure=SMALL, decided={"adapter.method": "full"}),
}  # fmt: skip
"""What somebody could come with."""
