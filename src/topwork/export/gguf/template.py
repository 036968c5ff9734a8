"""The chat template, and the tokens that end an answer: what llama.cpp must know to stop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topwork.common.errors import ModelError
from topwork.data.chat.template import ChatTemplate, stop_ids

_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


@dataclass(frozen=True)
class Ends:
    """The template's text (None where there is none), the keys that name it and the ids, and these ids."""

    keys: dict[str, Any]
    ids: frozenset[int]
    notes: tuple[str, ...] = ()


def ends_of(tokenizer: Any, template: str | None, generation: Mapping[str, Any]) -> Ends:
    """Of a tokenizer with `template` (Jinja; None for its own), and generation_config.json's values.

    The tokenizer's EOS comes first, then the token that closes the template's turn, then what else generation stops at.
    Raises DataError for a template that is no Jinja.
    """
    chat = ChatTemplate(tokenizer, template)
    listed = generation.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    wanted = [tokenizer.eos_token_id, *sorted(stop_ids(chat)), *listed]
    ids = list(dict.fromkeys(int(number) for number in wanted if number is not None))
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the chat template has a token that ends an answer, so llama.cpp would never "
            "stop; set the tokenizer's eos_token"
        )
    keys: dict[str, Any] = dict(zip(_KEYS, ids))
    if chat.jinja is not None:
        keys["tokenizer.chat_template"] = chat.jinja
    left = ids[len(_KEYS) :]
    told = f"a GGUF file names three ids that end an answer; {', '.join(map(str, left))} are left out"
    return Ends(keys, frozenset(ids), (told,) if left else ())
