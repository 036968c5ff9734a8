"""Whether a base and its adapter fit into memory, to choose between 16 and 4 bits: by what training itself plans with
(`training/memory.py`) where the base's structure is known; where its size alone is, by an estimate from sizes."""

from topwork.adapters.config import AdapterConfig, FullConfig, LoraConfig
from topwork.adapters.sizes import tensor_sizes
from topwork.plan.advice.rule import Case
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory import Member, Setup, largest_pass

GIB = 1 << 30
NF4_BYTES = 4.127 / 8
"""A parameter in NF4 with double quantization."""
LINEAR_SHARE = 0.85
"""Of a base's parameters, those in linear layers."""
TRAINED_SHARE = 0.005
"""Of a base's parameters, those that LoRA trains at the usual rank: 41.9 million of 8 billion."""
ADAPTER_BYTES, FULL_BYTES = 16, 4 + 4 + 2.03
"""A trained parameter of an adapter: itself, its gradient and two moments, in fp32. Of a base that is trained whole,
beside its 16 bits: the same with moments in 8 bits."""
PASS_BYTES = 2 * GIB
"""A small pass, and the process."""
LONGEST = 1024
"""Where nobody said."""


def fits(case: Case, four_bit: bool = False, full: bool = False) -> bool | None:
    """Whether a run fits, layers checkpointed as far as need be; None where the memory or the base is not known."""
    facts = case.facts
    if facts.memory_bytes is None or (facts.structure is None and facts.parameters is None):
        return None
    if facts.structure is None:
        return _estimated_bytes(facts.parameters or 0, four_bit, full) <= facts.memory_bytes
    adapter: AdapterConfig = FullConfig() if full else LoraConfig(r=case.value("adapter.r", 16))
    member = Member(adapter, "adamw_8bit" if full else "adamw", tensor_sizes(facts.structure, adapter))
    dtype = str(case.value("model.dtype", "bfloat16"))
    quantization = QuantizationConfig(load_in_4bit=four_bit)
    setup = Setup(facts.structure, dtype, quantization, (member,), facts.device)
    longest = min(facts.longest or LONGEST, int(case.value("data.max_length", facts.longest or LONGEST)))
    return largest_pass(setup, facts.memory_bytes, 1.0, longest) is not None


def _estimated_bytes(parameters: int, four_bit: bool, full: bool) -> float:
    linear = parameters * LINEAR_SHARE
    weights = linear * (NF4_BYTES if four_bit else 2) + (parameters - linear) * 2
    trained = parameters * FULL_BYTES if full else parameters * TRAINED_SHARE * ADAPTER_BYTES
    return weights + trained + PASS_BYTES
