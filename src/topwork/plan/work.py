"""The work of a training pass, in operations and bytes, from a base's structure alone. Free of torch.

    4 N T + 4 V d T_learned + 6 P T + 6 L d_attn T S         S = sum l^2 / sum l, over the sequences' lengths l

N       weights of the linear layers but the head: forward 2, the input's gradient 2; trained ones 2 more for their own
V d     the output head, which meets learned tokens alone
P       an adapter's parameters r (in + out): forward, the input's gradient, their own
d_attn  the width of all query heads: a token attends to half of its sequence, with two products forward, four backward

A checkpointed layer goes forward twice, a fast one without its last product. `benchmarks/floor.py` counts the same for
LoRA on every layer, and stays independent of this.
"""

from dataclasses import dataclass

from topwork.adapters.config import AdapterConfig, FullConfig, LoraConfig
from topwork.models.structure import Module, Structure
from topwork.training.memory import Member, PassShape, Setup

WALKS = 4.5
"""How often what a layer keeps is walked through beside its products: written, read forward and backward, its gradient
written and read. 0.42 MB a token and layer of an 8B shape (a count by hand) over the 94 kB that such a layer keeps."""

UPDATE_BYTES = 44
"""Of AdamW for each trained fp32 value: weight, gradient and two moments read, three of them written (28), the gradient
divided (8) and measured (4) and cleared (4)."""

UPDATE_BYTES_8BIT = 72
"""The same with 8-bit moments, whose fp32 form is written and read on the way."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one pass by what multiplies, and bytes that are moved beside them.

    base       products with the base's weights but the head's, and with trained copies of them
    recomputed  what checkpointed layers do once more
    walked     of element-wise passes
    unpacked   of making packed weights dense, forward, backward and once more in checkpointed layers
    """

    base: float
    head: float
    adapter: float
    attention: float
    recomputed: float
    walked_bytes: float
    unpacked_bytes: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.base + self.head + self.adapter + self.attention + self.recomputed


def pass_work(
    setup: Setup, shape: PassShape, checkpointed_layers: int = 0, attended: float | None = None, backward: bool = True
) -> Work:
    """Of a pass of training, or forward alone. `attended` is sum l^2 / sum l of its sequences; left out, all are as
    long as the longest. Members share a pass: its tokens are divided among them evenly."""
    base, tokens = setup.structure, shape.tokens
    times = 4.0 if backward else 2.0
    weights, head = linear_weights(base), head_weights(base)
    learning = _mean([_trains_layers(member.adapter) for member in setup.members]) if backward else 0.0
    head_learning = _mean([_trains_head(base, member.adapter) for member in setup.members]) if backward else 0.0
    parameters = _mean([lowrank_parameters(member, base) for member in setup.members])
    span = shape.longest if attended is None else attended
    attention = base.layers * base.heads * base.head_dim * tokens * span
    repeated = checkpointed_layers / max(1, base.layers) if backward else 0.0
    repeated_weights = weights - (last_products(base) if base.fast else 0)
    times_unpacked = (2.0 if backward else 1.0) + repeated * repeated_weights / max(1, weights)
    return Work(
        base=(times + 2.0 * learning) * weights * tokens,
        head=(times + 2.0 * head_learning) * head * shape.learned_tokens,
        adapter=(6.0 if backward else 2.0) * parameters * tokens,
        attention=(6.0 if backward else 2.0) * attention,
        recomputed=repeated * (2.0 * (repeated_weights + parameters) * tokens + 2.0 * attention),
        walked_bytes=(WALKS if backward else 1.5) * (1.0 + repeated / 3) * base.layers * kept_bytes(setup) * tokens,
        unpacked_bytes=times_unpacked * unpacking_bytes(setup),
    )


def update_bytes(setup: Setup) -> float:
    """What the members' optimizers move in one update of each."""
    return float(
        sum(
            member.values * (UPDATE_BYTES if member.optim == "adamw" else UPDATE_BYTES_8BIT) for member in setup.members
        )
    )


def linear_weights(base: Structure) -> float:
    """Weights that a token meets beside the head's; of experts held in one tensor those that it visits."""
    linear = sum(
        module.weights for module in base.by_path.values() if module.kind == "linear" and module.path != base.head
    )
    experts = sum(module.parameters for module in base.modules if _holds_experts(module))
    return linear + (experts * visited_share(base) if experts else 0.0)


def visited_share(base: Structure) -> float:
    """Of a layer's experts, how large a share a token goes through."""
    there = (
        base.config.get("num_experts") or base.config.get("num_local_experts") or base.config.get("n_routed_experts")
    )
    return float((base.config.get("num_experts_per_tok") or 1) / there) if there else 0.0


def head_weights(base: Structure) -> int:
    """The output head's, tied or not."""
    return base.by_path[base.head].weights if base.head is not None else base.vocabulary * base.hidden


def last_products(base: Structure) -> int:
    """Weights of the layers' last products, which no recomputation needs (`models/fast.py`)."""
    return sum(module.weights for module in base.by_path.values() if module.path.endswith(".mlp.down_proj"))


def lowrank_parameters(member: Member, base: Structure) -> float:
    """A LoRA's values that are multiplied for a token, of experts' those that it visits; other methods' vectors cost no
    product."""
    if not isinstance(member.adapter, LoraConfig):
        return 0.0
    saved = member.adapter.saved_modules
    own = {path: sum(sizes) for path, sizes in member.sizes.items() if path.rpartition(".")[2] not in saved}
    experts = sum(count for path, count in own.items() if path in base.by_path and _holds_experts(base.by_path[path]))
    return sum(own.values()) - experts * (1.0 - visited_share(base)) if experts else float(sum(own.values()))


def kept_bytes(setup: Setup) -> float:
    """What a layer keeps of a token in its base's type: inputs, queries, keys and values, attention's output, gate and
    up."""
    base = setup.structure
    attention, key_value = base.heads * base.head_dim, base.key_value_heads * base.head_dim
    return setup.value_bytes * (2 * base.hidden + 2 * attention + 2 * key_value + 2 * base.inner)


def unpacking_bytes(setup: Setup) -> float:
    """What making every packed weight dense once reads and writes."""
    if not setup.quantization.active:
        return 0.0
    packed = 1.0 if setup.quantization.load_in_8bit else 0.5
    return (packed + setup.value_bytes) * linear_weights(setup.structure)


def _holds_experts(module: Module) -> bool:
    return module.kind == "other" and module.path.endswith(".experts") and module.parameters > 0


def _trains_layers(adapter: AdapterConfig) -> float:
    return 1.0 if isinstance(adapter, FullConfig) else 0.0


def _trains_head(base: Structure, adapter: AdapterConfig) -> float:
    name = (base.head or "").rpartition(".")[2]
    return 1.0 if isinstance(adapter, FullConfig) or (name and name in adapter.saved_modules) else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
