"""The tokenizer of a base model, with the context length that the model really has: what is known without weights."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from topwork.common.errors import ModelError
from topwork.common.os_errors import why
from topwork.common.paths import plain_path
from topwork.common.telling import doing
from topwork.models.auto import auto_class
from topwork.models.config import ModelConfig
from topwork.models.source import Source, find_source
from topwork.models.structures.values import CONTEXT

ABSURD_LENGTH = 10**9
"""transformers writes 1e30 where a tokenizer does not know its model's context."""


def open_tokenizer(
    config: ModelConfig, log: Callable[[str], None] = lambda _: None
) -> tuple[PreTrainedTokenizerBase, int]:
    """A recipe's tokenizer, and the longest sequence that its base will take (`Base.context_length`), without weights.

    Raises ModelError.
    """
    source = find_source(config, log)
    doing(log, f"opening the tokenizer of {source.name}")
    known = load_config(source, config.trust_remote_code)
    auto_class(known)  # what cannot be run is told before rows are read
    return load_tokenizer(source, config.trust_remote_code, config), usable_length(known)


def load_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """The base's config.json. Raises ModelError where it is none that transformers reads."""
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoConfig.from_pretrained(source.folder, **options)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{source.name} could not be read as a causal language model: {why(error)}") from error


def load_tokenizer(
    source: Source, trust_remote_code: bool, asked: ModelConfig | None = None
) -> PreTrainedTokenizerBase:  # fmt: skip
    """The base's tokenizer, or the one that is `asked` for, with its new tokens; where it states no usable
    `model_max_length`, the model's context length stands there.

    Raises ModelError for a base without a readable tokenizer, for one that is asked for and gives the base's tokens
    other ids, and for new tokens that the base has rows for.
    """
    tokenizer = _own_tokenizer(source, trust_remote_code)
    if asked is not None and asked.tokenizer_name_or_path is not None:
        tokenizer = _other_tokenizer(asked, tokenizer)
    if asked is not None and asked.new_tokens:
        _add_tokens(tokenizer, asked.new_tokens, load_config(source, trust_remote_code))
    return tokenizer


def _own_tokenizer(source: Source, trust_remote_code: bool, has_config: bool = True) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
        if has_config and tokenizer.model_max_length > ABSURD_LENGTH:
            tokenizer.model_max_length = context_length(AutoConfig.from_pretrained(source.folder, **options))
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"the tokenizer of {source.name!r} cannot be loaded: {why(error).splitlines()[0]}. Expected tokenizer.json "
            "(or a tokenizer model) beside config.json; check the name, the network, or copy the base's tokenizer "
            "files there"
        ) from error
    return tokenizer


def _other_tokenizer(asked: ModelConfig, own: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Raises ModelError where it is not the base's with further tokens."""
    named = str(asked.tokenizer_name_or_path)
    tokenizer = _own_tokenizer(Source(named, plain_path(named), None), asked.trust_remote_code, has_config=False)
    theirs = tokenizer.get_vocab()
    moved = next((token for token, at in own.get_vocab().items() if theirs.get(token, at) != at), None)
    if moved is not None:
        raise ModelError(
            f"model.tokenizer_name_or_path {named} calls {moved!r} token {theirs[moved]}, which is "
            f"{own.get_vocab()[moved]} in the base's own tokenizer; give the base's with further tokens behind its own"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, own.model_max_length)
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], config: PreTrainedConfig) -> None:
    """Raises ModelError for a token that there is a row for already."""
    known, rows = tokenizer.get_vocab(), int(config.get_text_config().vocab_size)
    there = {token: known[token] for token in tokens if known.get(token, rows) < rows}
    if there:
        token, at = next(iter(there.items()))
        raise ModelError(
            f"model.new_tokens has {token!r}, which the tokenizer has already: it is token {at}, and the base has rows "
            f"for {rows}. Leave it out; adapter.trainable_token_indices: [{at}] trains its row"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    broken = next((t for t in tokens if "\ufffd" in str(tokenizer.decode(tokenizer.convert_tokens_to_ids([t])))), None)
    if broken is not None:  # what reads bytes as letters takes some letters for bytes when it writes
        raise ModelError(
            f"model.new_tokens has {broken!r}, which this tokenizer would write as "
            f"{tokenizer.decode(tokenizer.convert_tokens_to_ids([broken]))!r}; spell it in ASCII"
        )


def context_length(hf_config: Any) -> int:
    """How many tokens a model can attend to, from its transformers config (a multimodal one's text part).

    Raises ModelError for a config that states none.
    """
    text_config = hf_config.get_text_config()
    for field in CONTEXT:
        length = getattr(text_config, field, None)
        if isinstance(length, int) and 0 < length <= ABSURD_LENGTH:
            return length
    raise ModelError(
        f"the config of this {text_config.model_type!r} model states no context length, expected one of "
        f"{', '.join(CONTEXT)}; set max_position_embeddings in its config.json"
    )


def usable_length(hf_config: Any) -> int:
    """How long a sequence may be: the context, or less where a longer one would change the positions of its neighbours
    in a batch (longrope). Raises ModelError as `context_length` does."""
    rope = getattr(hf_config.get_text_config(), "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # one for each layer type, or one
    steady = [r["original_max_position_embeddings"] for r in ropes if r.get("rope_type") == "longrope"]
    return min([context_length(hf_config), *steady])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
