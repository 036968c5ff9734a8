"""An optimizer step's rows as forward passes, and how large a pass may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from types import MappingProxyType

import torch
from transformers import PreTrainedConfig

from topwork.common.errors import RecipeError
from topwork.common.seeds import hashed
from topwork.data.batches import AdapterRows, collate_segments, pack, together
from topwork.ops.batch import Batch
from topwork.training.config import Checkpointing, TrainingConfig
from topwork.training.optimizers import state_bytes

LARGEST_PASS = {"cpu": 2048, "cuda": 16384}
"""Beyond these a larger pass is no faster."""

FAST_PASS = {"cpu": 512, "cuda": 4096}
"""Down to these a smaller pass is hardly slower, so that it comes before checkpointing."""

SMALLEST_PASS = 256
"""Where memory asks for less, less would not help: the weights themselves do not fit."""


def step_passes(
    groups: Sequence[AdapterRows],
    tokens_per_pass: int,
    device: torch.device,
    virtual: Mapping[str, int] = MappingProxyType({}),
    seeds: Mapping[str, int] | None = None,
    stretch: bool = False,
) -> list[Batch]:
    """The rows that each adapter brings, packed into as few passes as fit; its rows in a pass are one segment.
    `virtual` is how many tokens an adapter puts in front of each of its rows, by its name, and `seeds` decides what
    drops out in them, however they are packed. What alone is longer than a pass is DataError, or with `stretch` has a
    pass of its own."""
    rows = [(at, example) for at, (_, examples) in enumerate(groups) for example in examples]

    def by_adapter(indices: Sequence[int]) -> list[AdapterRows]:
        by_group = groupby(indices, lambda index: rows[index][0])  # rising, so that an adapter's stand together
        return [(groups[at][0], [rows[index][1] for index in own]) for at, own in by_group]

    extra = [virtual.get(str(name), 0) for name, _ in groups]
    lengths = [len(example.tokens) + extra[at] for at, example in rows]
    kept = together(groups)
    sizes = [sum(lengths[i] for i in own) for own in kept]
    budget = max([tokens_per_pass, *sizes]) if stretch else tokens_per_pass
    units = pack(sizes, budget, [rows[own[0]][0] for own in kept])
    packed = [[index for unit in numbers for index in kept[unit]] for numbers in units]
    batches = [collate_segments(by_adapter(indices)) for indices in packed]
    if seeds is not None:
        by_row = [hashed(seeds[str(name)], number) for name, examples in groups for number in range(len(examples))]
        batches = [batch.with_dropout_seeds([by_row[index] for index in own]) for batch, own in zip(batches, packed)]
    return [batch.to(device) for batch in batches]


LARGEST_ERROR = 1.4
"""How many times the estimate a pass may keep."""


@dataclass(frozen=True)
class PassPlan:
    """How large a pass may be, and how many layers are checkpointed for it."""

    tokens_per_pass: int
    checkpointed_layers: int


@dataclass(frozen=True)
class Memory:
    """What decides how much a pass may keep: the model's shape, whether its adapter drops out, how many of its layers
    can be checkpointed, whether they are fast ones, the free memory, and what the process will take of it beside a
    pass. Half of what is free is planned with, or less where that leaves too little for the rest: families that
    normalise more often than llama keep up to 1.4 times the estimate, and a backward pass has temporaries of its own.
    """

    config: PreTrainedConfig
    device: torch.device
    free_bytes: int
    checkpointable_layers: int = 0
    dropout: bool = False
    fast: bool = True
    beside_bytes: int = 0

    def holds(self, tokens: int, checkpointed_layers: int) -> bool:
        """Whether a pass of so many tokens fits."""
        planned = min(self.free_bytes / 2, (self.free_bytes - self.beside_bytes) / LARGEST_ERROR)
        return self._pass_bytes(tokens, checkpointed_layers) <= planned

    def needed_bytes(self, tokens: int, checkpointed_layers: int) -> int:
        """What training in passes of so many tokens takes at least."""
        return self.beside_bytes + self._pass_bytes(tokens, checkpointed_layers)

    def _pass_bytes(self, tokens: int, checkpointed_layers: int) -> int:
        return tokens * activation_bytes_per_token(self.config, checkpointed_layers, self.dropout, self.fast)


def plan_passes(asked_tokens: int | None, asked_layers: Checkpointing, longest: int, memory: Memory) -> PassPlan:
    """The token budget and the checkpointed layers, each as asked for or from free memory.

    Smaller passes come before checkpointing while they are as fast as large ones. Only then as few layers as fit are
    checkpointed; passes smaller still are for where even that leaves too little.
    """
    if asked_layers != "auto":
        every = memory.checkpointable_layers or _shape(memory.config).layers  # none: refused where it is switched on
        layers = {"off": 0, "full": every}.get(str(asked_layers), asked_layers)
        assert isinstance(layers, int)
        return PassPlan(_tokens(asked_tokens, longest, memory, layers, 1), layers)
    tokens = _tokens(asked_tokens, longest, memory, 0, FAST_PASS.get(memory.device.type, FAST_PASS["cpu"]))
    most = max(0, memory.checkpointable_layers - 1)  # the last layer would be wanted again at once, and saves nothing
    fitting = next((layers for layers in range(most + 1) if memory.holds(tokens, layers)), most)
    if fitting == most:
        tokens = min(tokens, _tokens(asked_tokens, longest, memory, fitting, 1))
    return PassPlan(tokens, fitting)


def trials_that_fit(
    needed_bytes: Sequence[int], asked_tokens: int | None, asked_layers: Checkpointing, memory: Memory
) -> int:
    """How many of the first adapters, of which each needs so much (`trial_bytes`), fit beside a pass; at least 1.

    The pass is as asked for, else the smallest, and checkpoints as many layers as it may.
    """
    most = max(0, memory.checkpointable_layers - 1)
    layers = {"off": 0, "auto": most, "full": memory.checkpointable_layers}.get(str(asked_layers), asked_layers)
    assert isinstance(layers, int)
    per_token = activation_bytes_per_token(memory.config, layers, memory.dropout, memory.fast)
    pass_bytes = (asked_tokens or SMALLEST_PASS) * per_token
    room = memory.free_bytes - max(2 * pass_bytes, memory.beside_bytes + LARGEST_ERROR * pass_bytes)
    return max(1, sum(total <= room for total in accumulate(needed_bytes)))


def trial_bytes(config: TrainingConfig, sizes: Sequence[int]) -> int:
    """What an adapter of trained tensors of so many values takes: fp32 weights, their gradients, optimizer state."""
    return 8 * sum(sizes) + state_bytes(config.optim, sizes)


def _tokens(asked: int | None, longest: int, memory: Memory, checkpointed_layers: int, least: int) -> int:
    """The token budget of a pass: what was asked for, or a power of two, not below `least`, that fits."""
    if asked is not None:
        check_longest(asked, longest)
        return asked
    budget = LARGEST_PASS.get(memory.device.type, LARGEST_PASS["cpu"])
    while budget > max(least, SMALLEST_PASS) and not memory.holds(budget, checkpointed_layers):
        budget //= 2
    return max(budget, longest)


def check_longest(tokens_per_pass: int | None, longest: int) -> None:
    """Raises RecipeError where the longest sequence, with its virtual tokens, is longer than the asked pass."""
    if tokens_per_pass is not None and longest > tokens_per_pass:
        raise RecipeError(
            f"training.tokens_per_pass is {tokens_per_pass}, and the longest sequence has {longest} tokens; a sequence "
            f"is not cut in two. Give at least {longest}, leave it out, or set data.max_length lower."
        )


def activation_bytes_per_token(
    config: PreTrainedConfig, checkpointed_layers: int = 0, dropout: bool = False, fast: bool = True
) -> int:
    """What a pass holds per token at its peak: what it keeps, and of checkpointed layers the one that is recomputed."""
    live = layer_bytes_per_token(config, dropout, fast) if checkpointed_layers else 0
    return kept_bytes_per_token(config, checkpointed_layers, dropout, fast) + live


def kept_bytes_per_token(
    config: PreTrainedConfig, checkpointed_layers: int = 0, dropout: bool = False, fast: bool = True
) -> int:
    """What is kept per token for the backward pass: a checkpointed layer's input, all of the others, the last norm."""
    shape = _shape(config)
    checkpointed = min(checkpointed_layers, shape.layers)
    whole = (shape.layers - checkpointed) * layer_bytes_per_token(config, dropout, fast)
    between = 4 if fast else shape.value_bytes
    return whole + checkpointed * between * shape.hidden + 4 * shape.hidden + 4


def layer_bytes_per_token(config: PreTrainedConfig, dropout: bool = False, fast: bool = True) -> int:
    """What a llama layer with LoRA on all of its linear layers keeps per token, but for its r values for each of them.

    A fast layer (`models/fast.py`), in the model's type: its input, q, k, v, the attention's output, what the MLP is
    given, gate and up; in fp32 a number for each norm and head. Dropout keeps nothing (DoRA with it runs plain).

    A plain one also keeps both norms' outputs, silu(gate) and its product with up, in fp32 what the norms were given;
    with dropout, in place of the linear layers' inputs, each one's dropped-out copy. Families without a gate keep less.
    """
    s = _shape(config)
    between = 2 * s.attention + 2 * s.key_value
    if fast:
        return s.value_bytes * (2 * s.hidden + between + 2 * s.inner) + 4 * s.heads + 8
    inputs = (5 * s.hidden + s.attention if dropout else 2 * s.hidden) + s.inner
    return s.value_bytes * (between + 3 * s.inner + inputs) + 8 * s.hidden + 8


@dataclass(frozen=True)
class _Shape:
    """Widths of a layer; `inner` is the MLP's, of all experts that a token visits."""

    layers: int
    heads: int
    hidden: int
    inner: int
    attention: int
    key_value: int
    value_bytes: int


def _shape(config: PreTrainedConfig) -> _Shape:
    text = config.get_text_config()

    def value(*names: str, default: int) -> int:
        return int(next((found for name in names if (found := getattr(text, name, None))), default))

    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    width = value("head_dim", default=hidden // heads)
    inner = value("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    return _Shape(
        layers=int(text.num_hidden_layers),
        heads=heads,
        hidden=hidden,
        inner=inner * value("num_experts_per_tok", default=1),
        attention=width * heads,
        key_value=width * value("num_key_value_heads", default=heads),
        value_bytes=4 if "float32" in str(getattr(text, "dtype", None)) else 2,
    )
