"""What a base and its adapter need of memory, to choose between 16 and 4 bits.

An estimate, from sizes alone, of the least that a run takes: every layer checkpointed, one row a pass. Where the base's
structure is known `topwork plan` computes it part by part.
"""

from topwork.plan.advice.rule import Case

GIB = 1 << 30
NF4_BYTES = 4.127 / 8
"""A parameter in NF4 with double quantization."""
LINEAR_SHARE = 0.85
"""Of a base's parameters, those in linear layers, where only its size is known."""
ADAPTER_BYTES = 16
"""A trained parameter: itself, its gradient and two moments, in fp32."""
PROCESS_BYTES = GIB
"""Python, libraries, and what allocators hold."""


def needed_bytes(case: Case, four_bit: bool) -> int | None:
    """The least that training an adapter takes; None where the base's size is not known."""
    facts = case.facts
    total = facts.structure.parameters if facts.structure is not None else facts.parameters
    hidden = facts.hidden
    if total is None or hidden is None:
        return None
    linear = _linear(case, total)
    weights = linear * (NF4_BYTES if four_bit else 2) + (total - linear) * 2
    trained = (facts.trained_per_rank or total // 300) * case.value("adapter.r", 16)
    tokens = facts.longest or 1024
    layers = facts.structure.layers if facts.structure is not None else max(1, hidden // 128)
    inner = facts.structure.inner if facts.structure is not None else 4 * hidden
    kept = 2 * hidden * layers * tokens + 2 * (8 * hidden + 5 * inner) * tokens
    return round(weights + ADAPTER_BYTES * trained + kept + PROCESS_BYTES)


def full_bytes(case: Case) -> int | None:
    """The least that full fine-tuning takes with 8-bit moments: weights, fp32 masters, gradients, moments."""
    bare = needed_bytes(case, four_bit=False)
    facts = case.facts
    total = facts.structure.parameters if facts.structure is not None else facts.parameters
    return None if bare is None or total is None else bare + round(total * (4 + 4 + 2.03))


def _linear(case: Case, total: int) -> int:
    structure = case.facts.structure
    if structure is None:
        return round(total * LINEAR_SHARE)
    return sum(m.parameters for m in structure.modules if m.kind == "linear" and m.path != structure.head)
