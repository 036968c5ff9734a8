"""A base's tokenizer from its files alone, without transformers: as much of one as turning rows into tokens needs, so
that `topwork plan` counts them in a blink. Training opens the real one (`models/tokenizer.py`)."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from topwork.common.cache import cache_root
from topwork.common.hub import is_hub_id
from topwork.common.paths import is_there, plain_path
from topwork.models.config import ModelConfig
from topwork.models.gguf import converted_folder
from topwork.models.light_template import compile_template
from topwork.models.source import ALIASES, embedded_file

_FILE, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_folder(model: ModelConfig) -> Path | None:
    """Where the files of a base's tokenizer are on this machine; None where that is nowhere, or where the repository's
    own code would have to be run. Nothing is asked for, converted or waited for."""
    given = plain_path(model.tokenizer_name_or_path or model.model_name_or_path)
    if model.trust_remote_code:
        return None
    if given in ALIASES:
        embedded = embedded_file(ALIASES[given]) if model.revision is None else None
        return _with_tokenizer(converted_folder(embedded, cache_root())) if embedded else _cached(ALIASES[given], model)
    path = Path(given)
    if given and is_there(path):
        return _with_tokenizer(converted_folder(path, cache_root()) if path.suffix.lower() == ".gguf" else path)
    return _cached(given, model) if is_hub_id(given) else None


def _with_tokenizer(folder: Path | None) -> Path | None:
    return folder if folder is not None and (folder / _FILE).is_file() else None


def _cached(hub_id: str, model: ModelConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, _FILE, revision=model.revision)
    return Path(found).parent if isinstance(found, str) else None


class LightTokenizer:
    """What `data/chat` asks of a tokenizer, from a folder with a tokenizer.json.

    special_tokens_map  the named tokens (bos_token, eos_token …) that the folder's files give
    chat_template       Jinja, several of them by their names, or None
    """

    is_fast = True

    def __init__(self, folder: Path, new_tokens: Sequence[str] = ()) -> None:
        """With `new_tokens` beside its own. Raises OSError, ValueError or what `tokenizers` raises for files that are
        no tokenizer's."""
        from tokenizers import AddedToken, Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(str(folder / _FILE))
        if new_tokens:
            self.backend_tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        config = _json(folder / _CONFIG)
        given = {**_json(folder / "special_tokens_map.json"), **config}
        self.special_tokens_map = {name: text for name in _NAMED if (text := _text(given.get(name))) is not None}
        self.chat_template = _template(folder, config)
        extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or ()
        more = extra.values() if isinstance(extra, Mapping) else extra
        self._extra = [text for each in more if (text := _text(each)) is not None]

    @cached_property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens that stand beside the vocabulary, by their ids."""
        found: Mapping[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return found

    @cached_property
    def all_special_tokens(self) -> list[str]:
        """The named tokens and the further special ones, each once."""
        named = dict.fromkeys([*self.special_tokens_map.values(), *self._extra])
        return [text for text in named if self._id(text) is not None]

    @property
    def all_special_ids(self) -> list[int]:
        """Of `all_special_tokens`."""
        return [index for text in self.all_special_tokens if (index := self._id(text)) is not None]

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends one."""
        return self.special_tokens_map.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Its id."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return self._id(self.eos_token)

    def _id(self, token: str | None) -> int | None:
        found: int | None = None if token is None else self.backend_tokenizer.token_to_id(token)
        return found

    def __call__(self, text: str) -> dict[str, list[int]]:
        """A plain text's ids, with what the tokenizer puts around it."""
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

    def compiled_template(self, jinja: str) -> Any:
        """A chat template, compiled."""
        return compile_template(jinja)

    def apply_chat_template(
        self, conversation: Any, tools: Any = None, documents: Any = None, chat_template: Any = None,
        add_generation_prompt: Any = False, continue_final_message: Any = False, tokenize: Any = True,
        sanitize_control_tokens: Any = False, padding: Any = False, truncation: Any = False, max_length: Any = None,
        return_tensors: Any = None, return_dict: Any = True, return_assistant_tokens_mask: Any = False,
        tokenizer_kwargs: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Its parameters are the names that a template's variables must not have; nothing is put to a model here."""
        raise NotImplementedError


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    return found if isinstance(found, dict) else {}


def _text(token: Any) -> str | None:
    """A token as a file has it: a text, or an object with its content."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) and content else None


def _template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    several = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    own = (folder / _TEMPLATE).read_text("utf-8") if (folder / _TEMPLATE).is_file() else config.get("chat_template")
    if isinstance(own, list):  # as older files have several
        return {str(each["name"]): str(each["template"]) for each in own}
    if several and own is not None:
        return {"default": str(own), **several}
    return own
