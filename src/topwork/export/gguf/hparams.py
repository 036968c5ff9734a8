"""A config.json's values as the keys that llama.cpp reads, and what of them it cannot be told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from topwork.common.errors import ModelError
from topwork.export.gguf.families import Family, family_of
from topwork.export.gguf.rope import Rope, rope_of

Value = bool | int | float | str | list[Any]


@dataclass(frozen=True)
class Hparams:
    """What llama.cpp is told of a model beside its weights.

    family   the model's
    blocks   how many layers
    keys     by key, without the architecture before it (`attention.head_count`); the type says how it is stored
    factors  tensors that scale the rotary frequencies, by their name in the file; fp32
    notes    what the file does not do as the model does, for people
    """

    family: Family
    blocks: int
    keys: dict[str, Value]
    factors: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def hparams_of(values: Mapping[str, Any]) -> Hparams:
    """Of a config.json's `values`, what they leave out filled in as transformers does. Raises ModelError for what
    llama.cpp would compute otherwise."""
    family = family_of(values)
    config = _whole(values)
    heads, blocks = int(config.num_attention_heads), int(config.num_hidden_layers)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    _check(config, family, head)
    rope = rope_of(config, family, head)
    window, length, notes = _window(config, family, rope)
    keys: dict[str, Value] = {
        "block_count": blocks,
        "context_length": length,
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.num_key_value_heads or heads),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
        **rope.keys,
        **window,
        **_softcaps(config, family),
    }
    return Hparams(family, blocks, keys, rope.factors, (*rope.notes, *notes))


def _whole(values: Mapping[str, Any]) -> Any:
    """transformers' config object: defaults filled in, rotary parameters in one form whatever wrote the file."""
    from transformers import AutoConfig

    rest = {key: value for key, value in values.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(values["model_type"], **rest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"the model's config.json cannot be read: {error}") from error


def _check(config: Any, family: Family, head: int) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in (family.activation, "gelu_new" if family.activation != "silu" else "swish"):
        _refuse(family, f"the activation {activation!r}", f"{family.activation!r} alone")
    width = head * config.num_attention_heads
    if family.square and width != config.hidden_size:
        _refuse(family, f"heads of {head} that make {width} of {config.hidden_size}", "hidden size ÷ heads")
    if getattr(config, "use_bidirectional_attention", None):
        _refuse(family, "attention to what comes after (use_bidirectional_attention)", "causal attention alone")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        fixed = config.num_hidden_layers == family.fixed_scale
        expected = config.hidden_size // config.num_attention_heads if fixed else head
        if scalar != expected:
            _refuse(family, f"query_pre_attn_scalar {scalar}", f"{expected} for these sizes")


def _refuse(family: Family, given: str, known: str) -> None:
    raise ModelError(
        f"this model has {given}, and llama.cpp's {family.architecture!r} computes {known}: it would read the file and "
        "answer with another model. Export it as hf or vllm instead"
    )


def _softcaps(config: Any, family: Family) -> dict[str, Value]:
    """Gemma 2 is always capped in llama.cpp, the other families never are."""
    found: dict[str, Value] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if (value is not None) != (family.architecture == "gemma2"):
            _refuse(family, f"{name} {value}", "with a cap" if value is None else "none")
        if value is not None:
            found[name] = float(value)
    return found


def _window(config: Any, family: Family, rope: Rope) -> tuple[dict[str, Value], int, tuple[str, ...]]:
    """The keys of layers that slide, the context that the file may state, and what is to be told of it."""
    length = int(config.max_position_embeddings)
    slides = _sliding(config)
    if not any(slides):
        return {}, length, ()
    window = int(config.sliding_window)
    if family.window_period is None:
        if window >= length:
            return {}, length, ()
        told = (
            f"llama.cpp's {family.architecture!r} has no sliding window: the file states a context of {window} tokens "
            f"instead of {length}, within which it computes what this model does"
        )
        return {}, window, (told,)
    period = _period(slides, family.window_period)
    if period is None:
        _refuse(family, f"layers that slide in no pattern ({slides})", "every n-th layer that attends to everything")
    keys: dict[str, Value] = {"attention.sliding_window": window, **rope.sliding}
    if period != family.window_period:
        keys["attention.sliding_window_pattern"] = int(period or 0)
    return keys, length, ()


def _sliding(config: Any) -> list[bool]:
    if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
        return [False] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    return [kind == "sliding_attention" for kind in kinds] if kinds else [True] * config.num_hidden_layers


def _period(slides: list[bool], usual: int) -> int | None:
    """n, where the layers i with i % n = n - 1 are those that do not slide; the usual one where it fits."""
    for period in (usual, *range(1, len(slides) + 2)):
        if all(slide == (number % period < period - 1) for number, slide in enumerate(slides)):
            return period
    return None
