"""What autograd keeps of modules that run as transformers has them, and of adapters' parts that run as modules.

Of a token, in the base's type of e bytes; frozen weights keep nothing of what they multiply.

    LayerNorm        e d, and two numbers      RMS norm      4 d (what it was given, in fp32) and a number
    attention        e (2 H D + 2 K D) + 4 H   q, k, v, its output, the softmax's logarithms
    activation       e f, or more where it is written out in Python (gelu_new: 4 e f)
    gate * up        e 2 f, and the activation's
    experts          e (3 f + k d), and numbers that say who goes where
    adapted experts  e (2 f + d + k r), and such numbers (`ops/experts.py`)
    a part of LoRA   e in (its input, once for layers that share one; with dropout a copy each), e r, and casts of A, B
    DoRA, dropout    e out besides
    a copy           e in, and its weight in the base's type
"""

import re
from collections.abc import Collection

from topwork.adapters.config import LoraConfig
from topwork.models.structure import Module
from topwork.training.memory_held import rank
from topwork.training.memory_layers import GATES, Layer, Need, runs_modules
from topwork.training.memory_setup import Member, PassShape, Setup

WRITTEN_OUT = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3, "relu": 0}
"""Inner widths that an activation keeps beside what the next layer is given; 1 of others. What relu gives is what it
keeps."""
EXPERTS = {"gpt_oss": 6}
"""The same of experts' gated units, by family; 3 of others."""
ATTENTION_LAST = re.compile(r"attn(\.self)?\.(o_proj|out_proj|c_proj|dense)$|attention\.dense$")
"""What is given the attention's output, which the attention keeps itself."""
KERNEL_SIZES, SCORES_PER_BLOCK = range(16, 257, 16), 1 << 22
"""`ops/attention.py`'s and `attention_reference.py`'s."""
ATTENTION_INPUT = "attention"
STANDING = 6
"""Gradients of the widest rows that stand together while a plain layer goes backward. Estimated, not counted."""


def plain_layer(layer: Layer, tokens: int) -> Need:
    """A layer that runs on plain modules, whole."""
    (d, q, kv, f), e, s = layer.widths, layer.setup.value_bytes, layer.setup.structure
    kept = _norms(layer, tokens) + tokens * (e * (2 * q + 2 * kv) + 4 * s.heads)
    mlp = experts(layer, tokens) if layer.experts else Need(0, tokens * e * f * _inner(layer))
    kept += mlp.heap + sum(_parts(layer, member, tokens) for member in layer.setup.members)
    return Need(0, kept, 0, 0, max(mlp.passing, tokens * e * STANDING * max(f, q, d)))


def mixed_layer(layer: Layer, tokens: int, rows: int) -> Need:
    """A fast layer in which parts run as modules: the group they are in does, and what is around it stays fast."""
    (d, q, kv, f), e, s = layer.widths, layer.setup.value_bytes, layer.setup.structure
    saved = tokens * (e * (d + q) + 4 * s.heads) + rows * e * d
    kept = tokens * e * (q + 2 * kv) + rows * 2 * e * f + 4 * (tokens + rows)
    kept += sum(_parts(layer, member, tokens) for member in layer.setup.members)
    return Need(saved, kept, tokens * e * 2 * f, tokens * e * 2 * f, tokens * e * STANDING * f)


def written_out_attention(setup: Setup, shape: PassShape) -> int:
    """For a moment, where no kernel knows an attention and `ops/attention_reference.py` does it: scores of a block of
    query rows in fp32, masked and as shares, their gradient, and copies that products make; where there are several
    blocks those of the one before stand beside them. 12 bytes a score follow from the code; 20 and 32 in all were set
    so that stories260K's runs in bf16 (one block) and fp32 (several) come out."""
    s, window = setup.structure, setup.structure.config
    kernel = s.head_dim in KERNEL_SIZES and setup.dtype != "float16" and not window.get("attn_logit_softcapping")
    if kernel and s.family != "gpt_oss":
        return 0
    length = max(1, min(shape.longest, shape.tokens))
    sequences = max(1, shape.tokens // length)
    rows = max(1, min(length, SCORES_PER_BLOCK // (sequences * s.heads * length)))
    each = 20 if rows == length else 32
    return each * sequences * s.heads * rows * length


def experts(layer: Layer, tokens: int) -> Need:
    """An MLP of many experts, of which each token visits `k`; `f` is the width of those together."""
    (d, _, _, f), e, config = layer.widths, layer.setup.value_bytes, layer.setup.structure.config
    k = int(config.get("num_experts_per_tok") or 1)
    count = int(config.get("num_experts") or config.get("num_local_experts") or 1)
    passing = tokens * e * (STANDING * f + 3 * k * d)
    if ranks := _expert_ranks(layer):
        held = tokens * (e * (2 * f + d) + 8 * 5 * k + 4 * k + 4 * count + 4)
        return Need(tokens * e * (d + k * ranks), held, 0, 0, passing)
    width = EXPERTS.get(layer.setup.structure.family, 3)
    kept = tokens * (e * (width * f + k * d + k) + 8 * 4 * k + 4 * count + 4)
    return Need(tokens * e * d, kept, 0, 0, passing)


def _expert_ranks(layer: Layer) -> int:
    """Values that A of the experts' terms make of a row at both matrices: of several members the most."""
    held = [module for module in layer.modules.values() if any(one.experts > 1 for one in module.matrices)]
    found = [sum(_rank_inside(module, member.sizes.get(module.path, ())) for module in held)
             for member in layer.setup.members]  # fmt: skip
    return max(found, default=0)


def _rank_inside(module: Module, sizes: tuple[int, ...]) -> int:
    """Of A and B at one matrix after the other, which stand in `sizes`."""
    waiting, ranks = list(zip(sizes[::2], sizes[1::2])), 0
    for matrix in module.matrices:
        r = waiting[0][0] // (matrix.experts * matrix.inputs) if waiting else 0
        if r and waiting[0] == (r * matrix.experts * matrix.inputs, r * matrix.experts * matrix.outputs):
            ranks += r
            waiting = waiting[1:]
    return ranks


def _norms(layer: Layer, tokens: int) -> int:
    """Of its norms that go over whole rows; those of a first layer see what no gradient is asked of."""
    d, e = layer.widths[0], layer.setup.value_bytes
    norms = [module for module in layer.modules.values() if module.kind == "norm"]
    kept = [e * d + 2 * e if module.bias else 4 * d + 4 for module in norms if module.tensors[0] == d]
    return tokens * sum(kept[layer.number == 0 :])


def _inner(layer: Layer) -> int:
    config = layer.setup.structure.config
    name = str(config.get("hidden_act") or config.get("activation_function") or "gelu")
    return 3 if layer.group(GATES) else WRITTEN_OUT.get(name, 1)


def _parts(layer: Layer, member: Member, tokens: int) -> int:
    """What a member's parts keep: of several members each has its share of the tokens."""
    e, share = layer.setup.value_bytes, tokens // len(layer.setup.members)
    whole = [module for module in layer.modules.values() if _lies_in(module.path, member.whole)]
    copies = sum(_copy(module, share, e) for module in whole)
    chosen = [module for module in layer.modules.values() if module.path in member.sizes and module not in whole]
    linear = [module for module in chosen if module.kind == "linear"]
    shared = {_input_of(layer, module): module.columns for module in linear if not ATTENTION_LAST.search(module.path)}
    drops = member.adapter.dropout > 0
    widths = sum(module.columns for module in linear) if drops else sum(shared.values())
    if not isinstance(member.adapter, LoraConfig):
        return copies + share * e * (widths + sum(rank(member, module) for module in linear))
    doubled = sum(module.rows for module in linear) if runs_modules(member) else 0
    casts = sum(rank(member, module) * (module.rows + module.columns) for module in linear) if e == 2 else 0
    return copies + share * e * (widths + doubled + sum(rank(member, module) for module in linear)) + e * casts


def _lies_in(path: str, wholes: Collection[str]) -> bool:
    return path in wholes or any(path.startswith(f"{whole}.") for whole in wholes)


def _copy(module: Module, tokens: int, value_bytes: int) -> int:
    """A module that is trained whole; its weight is multiplied in the base's type."""
    cast = value_bytes * sum(module.tensors) if value_bytes == 2 else 0
    if module.kind == "linear":
        first = module.path.rpartition(".")[2] not in ("k_proj", "v_proj", "up_proj")  # which share another's input
        return cast + tokens * value_bytes * module.columns * first
    if module.kind == "norm":
        d = module.tensors[0]
        return cast + tokens * (2 * (4 * d + 4) + value_bytes * d)
    return cast


def _input_of(layer: Layer, module: Module) -> str:
    """Modules that are given the same. Where a layer has one norm, its attention and its MLP go side by side."""
    parent, _, name = module.path.rpartition(".")
    if name in ("q_proj", "k_proj", "v_proj"):
        return ATTENTION_INPUT
    if module.columns == layer.widths[0] and sum(one.kind == "norm" for one in layer.modules.values()) == 1:
        return ATTENTION_INPUT
    return f"{parent}.gate_proj" if name == "up_proj" else module.path
