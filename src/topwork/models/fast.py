"""Decoder layers made fast: where a layer is built as llama's is, one class runs it through the ops that go backward by
hand (`ops/project.py`, `ops/self_attention.py`).

A layer is chosen by its structure, never by its family's name: which norms it has says how it is wired (`WIRINGS`), its
linear layers' names say what they are, and what its attention asks for is seen in one short pass. Then the fast layer
must give what the plain one gave on that pass, or the part that differs stays plain: attention or MLP with the norm
before it. Adapters may come and go at any time: what a linear layer is made of is asked in every pass, and what
is more than frozen weights with LoRA terms runs on plain modules.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from topwork.ops.attention import AttentionRule, flat_attention
from topwork.ops.norm import rms_norm
from topwork.ops.project import Gated, RmsNorm, normed, project, projection_of
from topwork.ops.self_attention import HeadNorm, Heads, SelfAttention, rotated_parts, self_attention
from topwork.ops.stream import Stream, active_stream, stream_of

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""The largest difference from the plain layer, relative to what the layer adds to its input, that rounding explains."""


@dataclass(frozen=True)
class Wiring:
    """The norms of a layer: before and after its attention, before and after its MLP."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None

    @property
    def children(self) -> frozenset[str]:
        """The modules that a layer wired so consists of."""
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return frozenset({"self_attn", "mlp", *filter(None, norms)})


WIRINGS = (
    Wiring("input_layernorm", None, "post_attention_layernorm", None),  # llama and most others
    Wiring("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Wiring(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),  # olmo2
    Wiring("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # glm4
)
QUERIES_KEYS_VALUES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu,
}  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """An RMS norm that was recognised, by what it does; `kind` is its class, which an adapter around it changes."""

    kind: type
    eps: float
    unit_offset: bool


@dataclass(frozen=True)
class AttentionPart:
    """How a layer's attention is made: its input projections, what is between them and o_proj, rotary or not."""

    inputs: tuple[str, ...]
    how: SelfAttention
    rotary: bool
    head_norms: Norm | None = None

    def fits(self, attention: nn.Module) -> bool:
        """Whether its modules are still what they were: an adapter may have put its own in their places."""
        if not all(hasattr(attention, name) for name in self.inputs):
            return False
        if self.head_norms is None:
            return True
        return all(_is_still(_bare(module), self.head_norms) for module in _head_norms(attention))


@dataclass(frozen=True)
class MlpPart:
    """How a gated MLP is made."""

    inputs: tuple[str, ...]
    activation: str


class FastLayer(GradientCheckpointingLayer):
    """A decoder layer with the same modules at the same places as the plain one it stands for."""

    self_attn: nn.Module
    mlp: nn.Module

    def __init__(
        self, plain: nn.Module, wiring: Wiring, norms: dict[str, Norm], attention: AttentionPart | None,
        mlp: MlpPart | None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, module in plain.named_children():
            self.add_module(name, module)
        for name, value in vars(plain).items():
            if not name.startswith("_") and not callable(value):
                setattr(self, name, value)  # what transformers asks a layer about (its kind of attention, its number)
        self.wiring, self.norms = wiring, norms
        self.attention_part, self.mlp_part = attention, mlp
        self.multiplier = float(getattr(plain, "residual_multiplier", 1.0))
        self.is_last = False
        self.train(plain.training)

    @torch.no_grad()
    def join_weights(self) -> None:
        """Put the dense weights of each group behind one another in memory, where they are seen as one
        (`ops/project.py`). They stay the parameters that they are."""
        for group in self._dense_groups():
            together = torch.cat(group).split([len(weight) for weight in group])
            for weight, rows in zip(group, together):
                weight.data = rows

    def joined(self) -> list[Tensor]:
        """The weights that `join_weights` moves."""
        return [weight for group in self._dense_groups() for weight in group]

    def _dense_groups(self) -> Iterator[list[Tensor]]:
        parts = ((self.self_attn, self.attention_part), (self.mlp, self.mlp_part))
        for parent, names in [(parent, part.inputs) for parent, part in parts if part is not None]:
            group = [parent.get_submodule(name) for name in names]
            if len(group) > 1 and all(type(linear) is nn.Linear for linear in group):
                yield [linear.weight for linear in group]  # type: ignore[misc]

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **others: Any
    ) -> Tensor:
        """[1, T, d] -> [1, T, d], the last layer only the rows that the stream wants; the rest as transformers hands
        it on. Between fast layers x is in fp32: what sixty sums round off would be half of a gradient's error."""
        dtype, stream = self._dtype(), active_stream()
        x = hidden_states[0].to(torch.promote_types(dtype, torch.float32))
        part, attention, given = self.attention_part, _bare(self.self_attn), x.to(dtype)
        if part is not None and part.fits(attention):
            y = self._heads(given, position_embeddings, attention, part)
        else:
            part, n = None, self._normed(given, self.wiring.before_attention)
            y = attention(hidden_states=n[None], position_embeddings=position_embeddings, **others)[0][0]
        if self.is_last and stream.wanted is not None:
            x, y, stream = x[stream.wanted], y[stream.wanted], stream.narrowed()
        with stream.active():
            if part is not None:
                y = self._projected(y, None, attention, ("o_proj",))
            x = self._sum(x, self._normed(y, self.wiring.after_attention))
            return self._sum(x, self._normed(self._mlp(x.to(dtype)), self.wiring.after_mlp))[None]

    def _dtype(self) -> torch.dtype:
        """What the layer multiplies in; asked each time, since a model may be cast."""
        name = self.wiring.before_attention or self.wiring.after_attention
        return getattr(self, str(name)).weight.dtype

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        """x + multiplier * y in the stream's type. (A sum of two types is slow in torch, hence the copy.)"""
        if y.dtype == x.dtype:
            return torch.add(x, y, alpha=self.multiplier)
        y = y.to(x.dtype)
        return (y if self.multiplier == 1 else y.mul_(self.multiplier)).add_(x)

    def _heads(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attention: nn.Module, part: AttentionPart
    ) -> Tensor:
        """The attention's output before its last projection [T, H * D]."""
        buffer = self._projected(x, self.wiring.before_attention, attention, part.inputs)
        turns = (rotary[0][0], rotary[1][0]) if part.rotary and rotary is not None else None
        stream = active_stream()
        if stream.cache is None:
            return self_attention(buffer, turns, stream.bounds, part.how)
        q, k, v = rotated_parts(buffer, turns, part.how)
        return stream.cache.attend(attention, q, k, v, part.how.rule, part.how.sinks).flatten(1)

    def _mlp(self, x: Tensor) -> Tensor:
        part, before, mlp = self.mlp_part, self.wiring.before_mlp, _bare(self.mlp)
        if part is None or not all(hasattr(mlp, name) for name in part.inputs):
            y = mlp(self._normed(x, before)[None])
            return (y[0] if isinstance(y, tuple) else y)[0]
        buffer = self._projected(x, before, mlp, part.inputs)
        linear = _bare(mlp.get_submodule("down_proj"))
        down = projection_of(linear)
        if down is not None:
            return project(buffer, (down,), Gated(part.activation))
        gate, up = buffer.chunk(2, -1)
        return linear(ACTIVATIONS[part.activation](gate) * up)

    def _projected(self, x: Tensor, before: str | None, parent: nn.Module, names: Sequence[str]) -> Tensor:
        """Linear layers side by side after a norm. Where one is more than a frozen weight with LoRA terms, they run
        as modules."""
        modules = [_bare(parent.get_submodule(name)) for name in names]
        group = [projection_of(module) for module in modules]
        if None in group:
            n = self._normed(x, before)
            return torch.cat([module(n) for module in modules], -1)
        norm = self._norm(before)
        if norm is None:
            return project(self._normed(x, before), group)  # type: ignore[arg-type]
        return project(x, group, norm)  # type: ignore[arg-type]

    def _normed(self, x: Tensor, name: str | None) -> Tensor:
        if name is None:
            return x
        norm = self._norm(name)
        return getattr(self, name)(x[None])[0] if norm is None else normed(x, norm)

    def _norm(self, name: str | None) -> RmsNorm | None:
        """A norm that is still what was recognised; None where there is none, or where it runs as a module."""
        found = self.norms.get(name) if name else None
        if name is None or found is None:
            return None
        module = _bare(getattr(self, name))
        return RmsNorm(module.weight, found.eps, found.unit_offset) if _is_still(module, found) else None  # type: ignore[arg-type]


def _bare(module: nn.Module) -> nn.Module:
    """The base's own module, where an adapter stands around it and no token of this pass goes through that."""
    tell = getattr(module, "idle_base", None)
    base = tell() if tell is not None else None
    return module if base is None else base


def _is_still(module: nn.Module, norm: Norm) -> bool:
    """No adapter has put a module of its own there, and it is frozen."""
    return type(module) is norm.kind and not module.weight.requires_grad  # type: ignore[union-attr]


def make_fast(model: PreTrainedModel, report: Callable[[str], None] = print) -> None:
    """Put fast layers in the places of those that can be; says which parts stay plain."""
    places = _places(model)
    family = model.config.get_text_config().model_type
    if not places:
        report(f"{family}: none of its layers is built as llama's are, so it runs on plain modules, slower")
        return
    plain: Counter[str] = Counter()
    for (layers, at), seen in zip(places, _seen(model, [layers[at] for layers, at in places])):
        fast = _fitting(layers[at], seen)
        if fast is not None:
            layers[at] = fast
            fast.join_weights()
        plain.update(_plain_parts(layers[at]))
    _let_go_of_the_file(model)
    layers, at = places[-1]
    last = layers[at]
    if isinstance(last, FastLayer) and at == len(layers) - 1 and all(own is layers for own, _ in places):
        last.is_last = True
    if plain:
        told = ", ".join(f"{part} in {count} of {len(places)} layers" for part, count in sorted(plain.items()))
        report(f"{family}: runs on plain modules, slower: {told}")


def _let_go_of_the_file(model: nn.Module) -> None:
    """Weights lie in a mapped file as they were read; once some have been joined elsewhere the others follow, or the
    whole file would stay resident beside them."""
    joined = {id(weight) for layer in model.modules() if isinstance(layer, FastLayer) for weight in layer.joined()}
    for parameter in model.parameters() if joined else ():
        if id(parameter) not in joined and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def is_fast(model: nn.Module) -> bool:
    """Whether all of its decoder layers are fast in every part."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return bool(layers) and not any(map(_plain_parts, layers))


@dataclass
class _Seen:
    """One call of a plain layer: what it was given, what it asked of attention, what came out."""

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    others: dict[str, Any] = field(default_factory=dict)
    asked: tuple[AttentionRule, Tensor | None, Heads] | None = None
    out: Any = None


@dataclass(frozen=True)
class _Watch:
    """In a key-value cache's place for one pass: attends as ever, and keeps what each attention module asked for."""

    bounds: tuple[int, ...]
    by_module: dict[nn.Module, _Seen]

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None
    ) -> Tensor:
        """[T, H, D] of q [T, H, D], k and v [T, H_kv, D]."""
        if module in self.by_module:
            self.by_module[module].asked = rule, sinks, Heads(q.shape[1], k.shape[1], q.shape[2])
        return flat_attention(q, k, v, self.bounds, rule, sinks)


def _places(model: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Where layers of a known wiring stand."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [(layers, at) for layers in lists for at, layer in enumerate(layers) if _wiring(layer) is not None]


def _wiring(layer: nn.Module) -> Wiring | None:
    if not isinstance(layer, GradientCheckpointingLayer):
        return None
    children = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
    return next((wiring for wiring in WIRINGS if wiring.children == children), None)


def _seen(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[_Seen]:
    """How each layer was called in a short pass of two sequences."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (8,), generator=torch.Generator().manual_seed(0)).to(model.device)
    stream = stream_of(list(tokens.split([5, 3])))
    seen = [_Seen() for _ in layers]
    watch = _Watch(stream.bounds, {layer.self_attn: one for layer, one in zip(layers, seen)})  # type: ignore[misc]
    watched = Stream(stream.tokens, stream.positions, stream.bounds, stream.segments, cache=watch)
    with torch.no_grad(), _hooked(layers, seen), watched.active():
        model.base_model(input_ids=watched.tokens[None], position_ids=watched.positions[None], use_cache=False)
    return seen


@contextmanager
def _hooked(layers: Sequence[nn.Module], seen: Sequence[_Seen]) -> Iterator[None]:
    def before(one: _Seen) -> Callable[..., None]:
        def note(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            one.others = dict(named)
            one.hidden = given[0] if given else one.others.pop("hidden_states")

        return note

    def after(one: _Seen) -> Callable[..., None]:
        def note(_module: nn.Module, _given: Any, out: Any) -> None:
            one.out = out

        return note

    handles = [layer.register_forward_pre_hook(before(one), with_kwargs=True) for layer, one in zip(layers, seen)]
    handles += [layer.register_forward_hook(after(one)) for layer, one in zip(layers, seen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fitting(plain: nn.Module, seen: _Seen) -> FastLayer | None:
    """The fastest layer that gives what the plain one gave."""
    wiring = _wiring(plain)
    if wiring is None or not isinstance(seen.out, Tensor) or seen.asked is None:
        return None
    norms = {name: norm for name, module in plain.named_children() if (norm := norm_of(module)) is not None}
    known = {None, *norms}
    attentions = _attention_parts(plain.self_attn, seen) if wiring.before_attention in known else []  # type: ignore[arg-type]
    mlps = _mlp_parts(plain.mlp) if wiring.before_mlp in known else []  # type: ignore[arg-type]
    for attention, mlp in product([*attentions, None], [*mlps, None]):
        if attention is None and mlp is None:
            break
        layer = FastLayer(plain, wiring, norms, attention, mlp)
        if _same(layer, seen):
            return layer
    return None


def _same(layer: FastLayer, seen: _Seen) -> bool:
    """Whether a fast layer gives what the plain one did, but for rounding."""
    stream = stream_of(list(seen.hidden[0].split([5, 3])))
    try:
        with torch.no_grad(), stream.active():
            out = layer(seen.hidden, **seen.others)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    apart, added = ((x - seen.out).float().norm() for x in (out, seen.hidden))
    rounding = torch.finfo(seen.out.dtype).eps * seen.out.float().norm()
    return bool(apart <= TOLERANCE.get(seen.out.dtype, 1e-4) * added + rounding)


def norm_of(module: nn.Module) -> Norm | None:
    """What an RMS norm does, found by trying; None where it is none."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = module(x)
        for unit_offset in (False, True):
            y, _ = rms_norm(x, weight, eps, unit_offset)
            if torch.allclose(y, expected, rtol=2e-2 if y.dtype != torch.float32 else 1e-5, atol=1e-5):
                return Norm(type(module), eps, unit_offset)
    return None


def _attention_parts(attention: nn.Module, seen: _Seen) -> list[AttentionPart]:
    """The ways in which this attention can be meant: with rotary positions, or without (SmolLM 3's every fourth)."""
    inputs = next((names for names in QUERIES_KEYS_VALUES if all(hasattr(attention, name) for name in names)), None)
    if inputs is None or not hasattr(attention, "o_proj") or seen.asked is None:
        return []
    rule, sinks, heads = seen.asked
    found = [(module, norm_of(module)) for module in _head_norms(attention)]
    if any(norm is None for _, norm in found):
        return []
    norms = [HeadNorm(module.weight, norm.eps, norm.unit_offset) for module, norm in found if norm]  # type: ignore[arg-type]
    how = SelfAttention(heads, rule, (norms[0], norms[1]) if norms else None, sinks)
    kind = found[0][1] if found else None
    return [AttentionPart(inputs, how, rotary, kind) for rotary in (True, False)]


def _head_norms(attention: nn.Module) -> list[nn.Module]:
    return [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]


def _mlp_parts(mlp: nn.Module) -> list[MlpPart]:
    inputs = next((names for names in GATE_UP if all(hasattr(mlp, name) for name in names)), None)
    function = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    if inputs is None or function is None or not hasattr(mlp, "down_proj"):
        return []
    x = torch.linspace(-6, 6, 101)
    return [MlpPart(inputs, kind) for kind, known in ACTIVATIONS.items() if torch.allclose(known(x), function(x))]


def _plain_parts(layer: nn.Module) -> list[str]:
    """Names of what runs on plain modules in a layer, with their classes."""
    if not isinstance(layer, FastLayer):
        return [f"all of it ({type(layer).__name__})"]
    parts = ((layer.attention_part, "attention", layer.self_attn), (layer.mlp_part, "MLP", layer.mlp))
    return [f"{name} ({type(module).__name__})" for part, name, module in parts if part is None]
