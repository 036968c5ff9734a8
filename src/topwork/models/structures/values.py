"""What a config.json says, with what its family's class says where it is silent. Free of torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from topwork.common.errors import ModelError, quoted

HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads")
VOCABULARY = ("vocab_size",)
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
HEAD_DIM = ("qk_rope_head_dim", "head_dim")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""What families call their sizes."""
UNBOUNDED = 1 << 30
"""The context of a model whose config states none: ALiBi's."""
MOST_LAYERS = 10_000
"""More are a slip of the pen, and would take for ever to lay out."""
LONG_ROPES = ("longrope", "su")
"""Names of rotary positions that are scaled otherwise in a long sequence than in a short one."""


class Values:
    """A config's values under any of their names; `defaults` are the family's. Sizes are positive whole numbers."""

    def __init__(self, family: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.family = family
        self.given = given
        self.defaults = defaults

    def get(self, *names: str) -> Any:
        """What is given under one of the names, else the family's; None where neither says anything, or where what is
        given says none."""
        given = [self.given[name] for name in names if name in self.given]
        found = given or [self.defaults[name] for name in names if name in self.defaults]
        return next((value for value in found if value is not None), None)

    def flag(self, *names: str) -> bool:
        """As `get`, for what is on or off."""
        return bool(self.get(*names))

    def size(self, *names: str, default: int | None = None) -> int:
        """As `get`. Raises ModelError for what is no positive whole number, and where nothing is known."""
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if value is None:
            raise self._silent([names[0]])
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            name = next(name for name in names if name in {**self.defaults, **self.given})
            raise ModelError(
                f"the config of this {self.family!r} model has {name}: {quoted(value)}, expected a positive whole "
                "number; correct its config.json"
            )
        return value

    @property
    def unstated(self) -> list[str]:
        """Sizes that no class can know, and neither the config nor the family says."""
        return [names[0] for names in (HIDDEN, LAYERS, HEADS, VOCABULARY) if self.get(*names) is None]

    def check_stated(self) -> None:
        """Raises ModelError where the config lacks what no class can know."""
        if missing := self.unstated:
            raise self._silent(missing)

    def _silent(self, missing: Sequence[str]) -> ModelError:
        return ModelError(
            f"the config of this {self.family!r} model says nothing of {', '.join(missing)}, without which its sizes "
            "cannot be told; was the whole config.json copied?"
        )

    @property
    def hidden(self) -> int:
        """The width of the residual stream; Bloom's and Falcon's older name goes before the newer."""
        return self.size("n_embed") if self.get("n_embed") is not None else self.size(*HIDDEN)

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.size(*HEADS)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys, and of values."""
        groups = self.size(*KEY_VALUE_HEADS, default=self.heads)
        latent = self.get("qk_rope_head_dim") is not None  # keys of all heads come from one vector
        if self.heads % groups and not latent:
            raise ModelError(
                f"the config of this {self.family!r} model has {self.heads} attention heads, which is no multiple "
                f"of its {groups} key/value heads; correct its config.json"
            )
        return groups

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        if self.get(*HEAD_DIM) is None and self.hidden % self.heads:
            raise ModelError(
                f"the config of this {self.family!r} model has hidden_size {self.hidden}, which is no multiple of its "
                f"{self.heads} attention heads, and states no head_dim; correct its config.json"
            )
        return self.size(*HEAD_DIM, default=self.hidden // self.heads)

    @property
    def inner(self) -> int:
        """The width of an MLP."""
        return self.size(*INNER)

    @property
    def vocabulary(self) -> int:
        """Entries of the embedding."""
        return self.size(*VOCABULARY)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        layers = self.size(*LAYERS)
        if layers > MOST_LAYERS:
            raise ModelError(f"the config of this {self.family!r} model has {layers:,} layers; correct its config.json")
        return layers

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return self.flag("tie_word_embeddings")


def widths(values: Values) -> dict[str, Any]:
    """The fields of a `Structure` that a config alone tells."""
    dtype = values.get("dtype", "torch_dtype") or "float32"
    return {
        "family": values.family,
        "layers": values.layers,
        "hidden": values.hidden,
        "heads": values.heads,
        "key_value_heads": values.key_value_heads,
        "head_dim": values.head_dim,
        "inner": _visited(values),
        "vocabulary": values.vocabulary,
        "context_length": _context(values),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _context(values: Values) -> int:
    """How long a sequence may be, as `models/tokenizer.py: usable_length` tells it: longrope's positions change beyond
    the length that they were first trained with."""
    rope = values.get("rope_parameters", "rope_scaling") or {}
    ropes = [inner for inner in rope.values() if isinstance(inner, dict)] or [rope]
    first = "original_max_position_embeddings"
    long = [each for each in ropes if each.get("rope_type", each.get("type")) in LONG_ROPES]
    steady = [each.get(first, values.get(first)) or UNBOUNDED for each in long]
    return min([values.size(*CONTEXT, default=UNBOUNDED), *steady])


def _visited(values: Values) -> int:
    """The width of all MLPs that a token goes through in a layer; four times the model's where a family states none."""
    inner = values.size(*INNER, default=4 * values.hidden)
    expert = values.size("moe_intermediate_size", default=inner)
    shared = values.get("shared_expert_intermediate_size") or expert * (values.get("n_shared_experts") or 0)
    return values.size("num_experts_per_tok", default=1) * expert + int(shared)
