"""Bytes that are held from step to step: the base as it is held, adapters, their gradients and optimizer states."""

import re
from collections.abc import Iterable, Mapping, Sequence

from topwork.adapters.config import LoraConfig
from topwork.adapters.methods.factored_places import inner_rank
from topwork.models.structure import Module, Structure
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory_setup import Member, Setup

NESTED_BLOCK = 256
"""Constants that share one, with double quantization (`ops/packed.py`)."""
CODE_MAP_BYTES = 4 * 256
"""The map that says what the bytes of such constants stand for; the layers share one."""
STATE_BLOCK, SMALLEST_8BIT = 256, 4096
"""Values that share a constant in an 8-bit state, and the least that a tensor has of them (`optimizers.py`)."""


def base_bytes(setup: Setup) -> tuple[int, int]:
    """(weights, constants) of the base as it is held; tied weights once, biases and norms with the weights."""
    structure, packed = setup.structure, packed_layers(setup.structure, setup.quantization)
    weights = constants = 0
    for module in structure.modules:
        dense = module.parameters
        if module.path in packed and module.parameters:
            codes, own = packed_bytes(module, packed[module.path])
            weights, constants, dense = weights + codes, constants + own, module.parameters - module.weights
        weights += dense * setup.value_bytes
    return weights, constants + (CODE_MAP_BYTES if setup.quantization.load_in_4bit else 0)


def packed_layers(structure: Structure, wanted: QuantizationConfig) -> Mapping[str, QuantizationConfig]:
    """The linear layers that quantizing packs, by path, each with how: all but the head, what reads pictures and what
    is skipped, and the head as `quantization.head` says. An embedding that is tied to a packed head is read from its
    weight."""
    if not wanted.active:
        return {}
    skipped = wanted.llm_int8_skip_modules
    chosen = {
        module.path: wanted
        for module in structure.by_path.values()
        if module.kind == "linear" and module.path != structure.head and not _named(module.path, skipped)
    }
    if wanted.head != "16bit" and structure.head is not None:
        own = QuantizationConfig(load_in_8bit=wanted.head == "int8", load_in_4bit=wanted.head == "nf4")
        chosen[structure.head] = own
        if structure.tied and structure.embedding is not None:
            chosen[structure.embedding] = own
    return chosen


def packed_bytes(module: Module, wanted: QuantizationConfig) -> tuple[int, int]:
    """(codes, constants) of one weight, but for the map that all share."""
    if wanted.load_in_8bit:
        return module.weights, 4 * module.rows
    blocks = -(-module.weights // wanted.block_size)
    constants = blocks + 4 * -(-blocks // NESTED_BLOCK) if wanted.bnb_4bit_use_double_quant else 4 * blocks
    return -(-module.weights // 2), constants


def adapter_bytes(member: Member, structure: Structure) -> int:
    """Its fp32 masters, and what it holds beside them: what it began as (PiSSA, OLoRA), the squares of its rows'
    lengths (DoRA), the factors that a pass makes of what is learned (VeRA, LoHa, LoKr)."""
    values = member.values
    if member.adapter.keeps_beginnings:
        values *= 2
    modules = [structure.by_path[path] for path in member.sizes if path in structure.by_path]
    if isinstance(member.adapter, LoraConfig) and member.adapter.use_dora:
        values += sum(module.rows for module in modules)
    elif not isinstance(member.adapter, LoraConfig):
        values += sum(rank(member, module) * (module.rows + module.columns) for module in modules)
    return 4 * values


def rank(member: Member, module: Module) -> int:
    """Of the factors of a member's part at a module; with what it began as twice. 0 where there is none, or a whole
    copy."""
    sizes = member.sizes.get(module.path, ())
    if not sizes or not module.columns or module.path in member.whole:
        return 0
    if not isinstance(member.adapter, LoraConfig):
        return inner_rank(member.adapter, module.columns, module.rows)
    if len(sizes) < 2:
        return 0
    r = (sizes[0] + sizes[1]) // (module.rows + module.columns)  # of A and B; vectors follow
    return 2 * r if member.adapter.keeps_beginnings else r


def state_bytes(optim: str, sizes: Iterable[int], parameter_bytes: int = 4) -> int:
    """What the optimizer keeps for trained tensors of `sizes` values, each of `parameter_bytes`.

    `adamw`: both moments in the parameters' dtype, 8 bytes a parameter in fp32. `adamw_8bit`: 2.03 bytes, on the
    device. `paged_adamw_8bit`: the same bytes, on the host, and on a GPU two windows of at most 2.03 * WINDOW bytes.

    SmolLM2-135M, r 16 on all linear layers (4,884,480 parameters; the 60 tensors of 3,072 stay in fp32): 39.1 MB or
    11.0 MB, little beside the base. All of it (134,515,008): 1,076 MB or 274 MB.
    """
    if optim == "adamw":
        return sum(size * 2 * parameter_bytes + 4 for size in sizes)
    return sum(_state_8bit(size) + 4 for size in sizes)


def _state_8bit(size: int) -> int:
    whole = -(-size // STATE_BLOCK) * STATE_BLOCK
    return 2 * whole + 8 * (whole // STATE_BLOCK) if size >= SMALLEST_8BIT else 8 * whole


def _named(path: str, patterns: Sequence[str]) -> bool:
    """As transformers' should_convert_module reads them: beginnings up to a dot, expressions, endings."""
    return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", path) or path.endswith(key) for key in patterns)
