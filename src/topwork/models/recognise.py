"""Which decoder layers are made fast: chosen by structure and by trial, never by a family's name.

Which norms a layer has says how it is wired (`WIRINGS`), its linear layers' names say what they are, and what its
attention asks for is seen when it runs. Then the fast layer must give what the plain one gives, in fp32, for random
vectors at the first and the last positions that the model knows. (Not for its own hidden states: a few large values in
them can hide what attention adds.) What does not stays plain: attention or MLP with the norm before it, or all of it.
Layers of the same classes and settings are tried once.
"""

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from topwork.common.heap import trim_heap
from topwork.models.fast import FastLayer
from topwork.models.joined import let_go_of_file
from topwork.models.layer_parts import ACTIVATIONS, AttentionPart, MlpPart, Norm, Wiring
from topwork.models.text_part import text_model
from topwork.ops.attention import flat_attention
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import Batch, batch_of
from topwork.ops.context import running
from topwork.ops.norm import rms_norm
from topwork.ops.self_attention import Heads
from topwork.quantization.linear import packed_modules

WIRINGS = (
    Wiring("input_layernorm", None, "post_attention_layernorm", None),  # llama and most others
    Wiring("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Wiring(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # olmo2
    Wiring("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # glm4
)
QUERIES_KEYS_VALUES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
HEAD_NORMS = ("q_norm", "k_norm")
TOLERANCE = 2e-5
"""The largest difference from the plain layer in fp32, relative to what the layer adds to its input: rounding makes
1e-6 of it."""
CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
"""What a module raises that is not what it looks like; it then stays plain."""

Parts = tuple[dict[str, Norm], AttentionPart | None, MlpPart | None]


def make_fast(model: PreTrainedModel, log: Callable[[str], None] = print) -> None:
    """Put fast layers in the places of those that can be; says which parts stay plain."""
    places = _places(model)
    family = model.config.get_text_config().model_type
    if not places:
        log(f"{family}: none of its layers is built as llama's are, so it runs on plain modules, slower")
        return
    tried: dict[Hashable, Parts | None] = {}
    for (layers, at), seen in zip(places, _seen(model, [layers[at] for layers, at in places])):
        plain, kind = layers[at], _kind(layers[at])
        if kind not in tried:
            tried[kind] = _tried(plain, seen)
        parts, wiring = tried[kind], _wiring(plain)
        if parts is not None and wiring is not None:
            layers[at] = fast = FastLayer(plain, wiring, *parts)
            fast.join_weights()
            trim_heap()  # of what was joined: else all layers' weights would be held twice
    _let_go_of_the_file(model)
    _tell_neighbours(places)
    told = Counter(part for layers, at in places for part in _plain_parts(layers[at]))
    if told:
        parts_told = ", ".join(f"{part} in {count} of {len(places)} layers" for part, count in sorted(told.items()))
        log(f"{family}: runs on plain modules, slower: {parts_told}")


def is_fast(model: PreTrainedModel) -> bool:
    """Whether all of its decoder layers are fast in every part."""
    layers = [module for module in text_model(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    return bool(layers) and not any(map(_plain_parts, layers))


def _plain_parts(layer: nn.Module) -> list[str]:
    return layer.plain_parts if isinstance(layer, FastLayer) else [f"all of it ({type(layer).__name__})"]


def _tell_neighbours(places: Sequence[tuple[nn.ModuleList, int]]) -> None:
    """A layer before another fast one hands on fp32, and the model's last one computes only what is wanted of it."""
    for layers, at in places:
        layer = layers[at]
        if isinstance(layer, FastLayer):
            layer.before_another = at + 1 < len(layers) and isinstance(layers[at + 1], FastLayer)
            layer.is_last = at + 1 == len(layers) and all(own is layers for own, _ in places)


def _let_go_of_the_file(model: nn.Module) -> None:
    """Weights lie in a mapped file as they were read; once some have been joined elsewhere the others follow, or the
    whole file would stay resident beside them."""
    joined = {id(weight) for layer in model.modules() if isinstance(layer, FastLayer) for weight in layer.joined()}
    packed = {id(module.weight) for module in packed_modules(model).values()}  # made anew when they were packed
    for parameter in model.parameters() if joined else ():
        if id(parameter) not in joined | packed and parameter.device.type == "cpu":
            before, parameter.data = parameter.data, parameter.data.clone()
            let_go_of_file([before])


def _places(model: PreTrainedModel) -> list[tuple[nn.ModuleList, int]]:
    """Where layers of a known wiring stand."""
    lists = [module for module in text_model(model).modules() if isinstance(module, nn.ModuleList)]
    return [(layers, at) for layers in lists for at, layer in enumerate(layers) if _wiring(layer) is not None]


def _wiring(layer: nn.Module) -> Wiring | None:
    """None too where a layer has tensors of its own, which no wiring says what to do with."""
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if not isinstance(layer, GradientCheckpointingLayer) or own:
        return None
    children = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
    return next((wiring for wiring in WIRINGS if wiring.children == children), None)


def _kind(layer: nn.Module) -> Hashable:
    """What makes two layers the same but for their weights: classes, settings, and functions put on an instance."""

    def settings(module: nn.Module) -> tuple[Any, ...]:
        plain = (bool, int, float, str, type(None))
        own = {name: value for name, value in vars(module).items() if name != "layer_idx"}
        return tuple(
            (name, value if isinstance(value, plain) else id(value))
            for name, value in sorted(own.items())
            if isinstance(value, plain) or (callable(value) and not isinstance(value, nn.Module))
        )

    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in layer.named_parameters())
    return shapes, tuple((path, type(module), settings(module)) for path, module in layer.named_modules())


@dataclass
class _Seen:
    """How a plain layer was called. More than one argument by position is a way of calling that no fast layer has."""

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    others: dict[str, Any] = field(default_factory=dict)
    by_position: int = 0


def _batch(model: PreTrainedModel) -> Batch:
    """Two short sequences, one of them at the last positions that the model knows."""
    config = model.config.get_text_config()
    tokens = torch.randint(0, config.vocab_size, (8,), generator=torch.Generator().manual_seed(0)).to(model.device)
    last = int(getattr(config, "max_position_embeddings", None) or 8)
    positions = torch.cat([torch.arange(5), torch.arange(max(0, last - 3), max(3, last))])
    return replace(batch_of(list(tokens.split([5, 3]))), positions=positions.to(model.device))


def _seen(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[_Seen]:
    """How each layer is called in a short pass."""
    batch = _batch(model)
    seen = [_Seen() for _ in layers]
    with torch.no_grad(), _hooked(layers, seen), running(batch):
        model.base_model(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False)
    return seen


@contextmanager
def _hooked(layers: Sequence[nn.Module], seen: Sequence[_Seen]) -> Iterator[None]:
    def noting(one: _Seen) -> Callable[..., None]:
        def note(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            one.others, one.by_position = dict(named), len(given)
            one.hidden = given[0] if given else one.others.pop("hidden_states")

        return note

    handles = [layer.register_forward_pre_hook(noting(one), with_kwargs=True) for layer, one in zip(layers, seen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Watch:
    """In a key-value cache's place for one call: attends as ever, and keeps what was asked for."""

    bounds: tuple[int, ...]
    asked: tuple[AttentionRule, Tensor | None, Heads] | None = None

    def attend(
        self, _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None
    ) -> Tensor:
        """[T, H, D] of q [T, H, D], k and v [T, H_kv, D]."""
        self.asked = rule, sinks, Heads(q.shape[1], k.shape[1], q.shape[2])
        return flat_attention(q, k, v, self.bounds, rule, sinks)


def _tried(plain: nn.Module, seen: _Seen) -> Parts | None:
    """The parts of the fastest layer that gives what the plain one gives; None where none does."""
    wiring = _wiring(plain)
    if wiring is None or seen.by_position > 1:
        return None
    exact, others = copy.deepcopy(plain).float(), _in_fp32(seen.others)
    hidden = torch.randn(seen.hidden.shape, generator=torch.Generator().manual_seed(0)).to(seen.hidden.device)
    batch = batch_of(list(hidden[0, :, 0].split([5, 3])))
    watch = _Watch(batch.cu_seqlens)
    try:
        with torch.no_grad(), running(batch, watch):
            expected = exact(hidden, **others)
    except CANNOT:
        return None
    if not isinstance(expected, Tensor) or watch.asked is None:
        return None
    norms = {name: norm for name, module in exact.named_children() if (norm := norm_of(module)) is not None}
    attentions = _attention_parts(exact.get_submodule("self_attn"), *watch.asked)
    mlps = _mlp_parts(exact.get_submodule("mlp"))
    for attention, mlp in product(
        [*(attentions if wiring.before_attention in {None, *norms} else []), None],
        [*(mlps if wiring.before_mlp in {None, *norms} else []), None],
    ):
        if (attention or mlp) and _same(
            FastLayer(exact, wiring, norms, attention, mlp), batch, hidden, others, expected
        ):
            return norms, attention, mlp
    return None


def _in_fp32(value: Any) -> Any:
    """Tensors of floats in it, however deep."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_fp32(inner) for key, inner in value.items()}
    return type(value)(_in_fp32(inner) for inner in value) if type(value) in (tuple, list) else value


def _same(layer: FastLayer, batch: Batch, hidden: Tensor, others: dict[str, Any], expected: Tensor) -> bool:
    """Whether a fast layer gives what the plain one did, but for rounding."""
    try:
        with torch.no_grad(), running(batch):
            out = layer(hidden, **others)
    except CANNOT:
        return False
    return bool((out - expected).norm() <= TOLERANCE * (expected - hidden).norm())


def norm_of(module: nn.Module) -> Norm | None:
    """What an RMS norm does, found by trying; None where it is none."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            expected = module(x)
            for unit_offset in (False, True):
                y, _ = rms_norm(x, weight, eps, unit_offset)
                if torch.allclose(y, expected, rtol=2e-2 if y.dtype != torch.float32 else 1e-5, atol=1e-5):
                    return Norm(type(module), eps, unit_offset)
    except CANNOT:
        pass
    return None


def _attention_parts(
    attention: nn.Module, rule: AttentionRule, sinks: Tensor | None, heads: Heads
) -> list[AttentionPart]:
    """The ways in which this attention can be meant: with rotary positions, or without (SmolLM 3's every fourth)."""
    inputs = next((names for names in QUERIES_KEYS_VALUES if all(hasattr(attention, name) for name in names)), None)
    if inputs is None or not hasattr(attention, "o_proj"):
        return []
    norms = {name: norm_of(getattr(attention, name)) for name in HEAD_NORMS if hasattr(attention, name)}
    known = {name: norm for name, norm in norms.items() if norm is not None}
    named = {name for name, own in attention.named_parameters(recurse=False) if own is sinks}
    if len(known) not in (0, len(HEAD_NORMS)) or len(known) != len(norms) or (sinks is not None and not named):
        return []
    sinks_name = min(named) if named else None
    return [AttentionPart(inputs, heads, rule, rotary, known, sinks_name) for rotary in (True, False)]


def _mlp_parts(mlp: nn.Module) -> list[MlpPart]:
    inputs = next((names for names in GATE_UP if all(hasattr(mlp, name) for name in names)), None)
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if inputs is None or function is None or not hasattr(mlp, "down_proj"):
        return []
    x = torch.linspace(-6, 6, 101)
    try:
        with torch.no_grad():
            return [
                MlpPart(inputs, kind) for kind, known in ACTIVATIONS.items() if torch.allclose(known(x), function(x))
            ]
    except CANNOT:
        return []
