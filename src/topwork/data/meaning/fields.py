"""The names of things: the fields of each format, and what files call them."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache

FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "tools", "system"),
    "sharegpt": ("conversations", "tools", "system"),
    "alpaca": ("instruction", "output", "input", "system", "history", "tools", "tool_calls", "reasoning"),
    "prompt_completion": ("prompt", "completion", "input", "system", "history", "tools", "tool_calls", "reasoning"),
    "text": ("text",),
}
"""What `data.columns` may name, by format."""
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction",), ("output", "tool_calls")),
    "prompt_completion": (("prompt",), ("completion", "tool_calls")),
    "text": (("text",),),
}
"""Without which a format cannot be read: of each group, one."""

_TALKS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns", "contents")
_ANSWERS = ("completion", "response", "answer", "output", "target", "solution")
KNOWN_AS: dict[str, tuple[str, ...]] = {
    "messages": _TALKS,
    "conversations": ("conversations", "conversation", *_TALKS),
    "instruction": ("instruction", "instructions"),
    "output": ("output", "response", "completion", "answer", "target"),
    "prompt": ("prompt", "question", "query", "problem", "input"),
    "completion": _ANSWERS,
    "text": ("text",),
    "input": ("input", "context", "material", "passage"),
    "system": ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction"),
    "history": ("history", "chat_history"),
    "tools": ("tools", "functions"),
    "tool_calls": ("tool_calls", "function_calls"),
    "reasoning": ("reasoning", "thinking", "reasoning_content", "cot", "chain_of_thought", "thought", "complex_cot"),
}
"""What files call a field, the first that is there; capital letters and spaces do not matter."""
TOGETHER = (
    ("source", "target"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("user_message", "assistant_message"),
    ("user_message", "assistant_response"),
)
"""Names of a question and its answer that mean so only beside each other."""
STANDARD = {"prompt": "completion", "instruction": "output", "input": "output"}
"""The answer's name that goes with a question's, beside which others are no rivals."""
LABELS = (
    "label", "labels", "label_text", "label_name", "category", "intent", "class", "sentiment", "emotion", "summary",
    "translation", "tag", *_ANSWERS,
)  # fmt: skip
"""What files call the answer to a `text`."""

_MATERIAL = {
    "context", "passage", "document", "doc", "article", "evidence", "background", "material", "input", "paragraph",
    "story", "snippet", "excerpt", "body", "fact", "knowledge", "table", "schema", "premise", "hypothesis", "choice",
    "option", "question", "query", "problem", "instruction", "prompt",
}  # fmt: skip
_ABOUT = {
    "id", "uid", "uuid", "idx", "index", "type", "len", "length", "count", "num", "number", "url", "link", "name",
    "title", "lang", "language", "date", "time", "hash", "source", "token", "score", "format", "category", "level",
    "path", "filename", "filepath", "repo", "repository", "license", "domain", "dataset", "subset", "split",
}  # fmt: skip
_ANSWERED = {
    "explanation",
    "rationale",
    "solution",
    "reasoning",
    "cot",
    "thought",
    "step",
    "proof",
    "equation",
    "answer",
}
_NEAR = 0.8  # how alike a misspelt name is
_QUESTION = ("question", "prompt", "query", "instruction", "problem", "source", "input", "request", "ask")
_ANSWER = (
    "answer",
    "response",
    "output",
    "completion",
    "target",
    "label",
    "reply",
    "summary",
    "translation",
    "solution",
)


_UNSEEN = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060"))  # a BOM, and letters without a width


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    seen = unicodedata.normalize("NFKC", name).translate(_UNSEEN)
    return re.sub(r"[\s\-]+", "_", seen.strip().casefold())


def plain(name: object) -> str:
    """A column's name without capital letters and what does not show, and with one way of parting words."""
    return _plain(str(name))


def called(name: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are this one: the one that is written exactly so, else all that differ from it in capital
    letters and white space alone."""
    names = list(names)
    return [name] if name in names else [other for other in names if plain(other) == plain(name)]


def first_called(known: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of the names that is called as the first of the known ones is; None where there is none."""
    names = list(names)
    return next((found[0] for name in known if (found := called(name, names))), None)


def said_of(name: str, mapping: Mapping[str, str]) -> str | None:
    """What a mapping says of a name, whatever its capital letters; what it says of exactly this one first."""
    if name in mapping or not mapping:
        return mapping.get(name)
    return next((value for key, value in mapping.items() if plain(key) == plain(name)), None)


def _words(name: str) -> list[str]:
    parts = re.split(r"[\s_\-.]+|(?<=[a-z])(?=[A-Z])", name.strip())
    return [word for part in parts if part for word in (part.lower(), part.lower().removesuffix("s"))]


def is_material(name: str) -> bool:
    """Whether a column's name says that it is a part of the question: context, choices; not context_id."""
    words = _words(name)
    return bool(_MATERIAL & set(words)) and words[-1] not in _ABOUT


def is_about(name: str) -> bool:
    """Whether a column's name says that it is about the row and none of its text: id, source, url."""
    return bool(_ABOUT & set(_words(name)))


def explains(name: str) -> bool:
    """Whether a column's name says that it is about the answer."""
    return bool(_ANSWERED & set(_words(name)))


def sounds_like(names: Iterable[str], question: bool) -> list[str]:
    """The names that have a question's (or an answer's) word in them."""
    wanted = _QUESTION if question else _ANSWER
    return [
        name
        for name in names
        if not is_about(name)
        and (any(word in plain(name) for word in wanted) or get_close_matches(plain(name), wanted, 1, _NEAR))
    ]
