"""What an answer has to obey, by llguidance: JSON, a schema, a regular expression, one of some texts, tool calls."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.common.errors import RequestError
from topwork.data.chat.calls import CallFormat
from topwork.generation.text import pieces_of

LARGEST_GRAMMAR = 65_536
"""Bytes of a schema, a pattern or a list of choices: what is compiled in well under a second."""
LEXER_STATES = 32_768
"""Of one answer; one takes 1 to 2 kB."""
COMPILED = 32
"""Grammars that are kept compiled for the requests to come."""

Schema = Mapping[str, Any] | bool

_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\r\t]{1,64}", "coerce_one_of": True}
"""White space ends: a small model that may go on with it often does."""
_ONE_OF = "oneOf not fully supported"
"""Begins what is said of a oneOf that is held as an anyOf; whether more than one holds, `check_json` tells."""


class Grammars:
    """Makes constraints for one tokenizer. May be used from several threads; a constraint belongs to one request.

    vocabulary  columns of the logits, which may be more than the tokenizer has tokens
    stop_ids    (of each method) the tokens that end an answer: they may come when it is complete, not before

    All methods raise RequestError for what cannot be held, in bounded time. Needs the extra `serve`.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._compiled = lru_cache(COMPILED)(self._compile)
        self._special = frozenset(pieces_of(tokenizer).special)

    def json_object(self, stop_ids: Collection[int]) -> "Grammar":
        """Any JSON object."""
        return self.json_schema({"type": "object"}, stop_ids)

    def json_schema(self, schema: Schema, stop_ids: Collection[int]) -> "Grammar":
        """JSON by a schema, its properties in the schema's order; one with keywords that cannot be held is refused by
        their name."""
        return self._made(_guidance().LLMatcher.grammar_from_lark(f"start: {_json_rule(schema)}"), stop_ids)

    def regex(self, pattern: str, stop_ids: Collection[int]) -> "Grammar":
        """Text that a regular expression (Rust's, without look-around and references) matches whole."""
        return self._made(_guidance().LLMatcher.grammar_from_regex(_text(pattern, "the pattern")), stop_ids)

    def choice(self, options: Sequence[str], stop_ids: Collection[int]) -> "Grammar":
        """One of these texts."""
        if not options or not all(options):
            raise RequestError("the choices are none, or one is empty; give some texts")
        either = " | ".join(_literal(_text(option, "a choice")) for option in dict.fromkeys(options))
        return self._made(_guidance().LLMatcher.grammar_from_lark(f"start: {either}"), stop_ids)

    def calls(
        self, form: CallFormat, tools: Mapping[str, Schema], stop_ids: Collection[int], several: bool, free: bool
    ) -> "Grammar":
        """Calls of these functions (name: its arguments' schema): one, or `several`; `free`: amid any text, or none."""
        bodies = [
            f"body_{number}: {_literal(name + form.middle)} arguments_{number}" for number, name in enumerate(tools)
        ]
        arguments = [f"arguments_{number}: {_json_rule(schema)}" for number, schema in enumerate(tools.values())]
        either = " | ".join(f"body_{number}" for number in range(len(tools)))
        call = f"call: {_literal(form.head)} ({either}) {_literal(form.tail)}"
        if form.listed:
            more = f" ({_literal(form.between or ', ')} call)*" if several else ""
            calls, between = f'"[" call{more} "]"', None
        else:
            calls, between = "call", form.between
        rest = self._marked(form.opens.removeprefix(form.opens.rstrip()))
        opens, closes = self._marked(form.opens.rstrip()), self._marked(form.closes)
        once = f"{rest} {calls} {closes}"
        if free:
            special = opens.startswith("<")
            trigger = f"opened: TEXT {opens}" if special else f"opened[lazy]: TEXT {opens}"
            start = f"start: marked* ending\nending: TEXT\nTEXT: /(.|\\n)*/\n{trigger}\nmarked: opened {once}"
        else:
            more = f" ({_literal(between)} {opens} {once})*" if several and between is not None else ""
            start = f"start: {opens} {once}{more}"
        lark = "\n".join([start, call, *bodies, *arguments])
        spelled = {
            token for name, token in pieces_of(self._tokenizer).names.items() if name in form.opens + form.closes
        }
        return self._made(_guidance().LLMatcher.grammar_from_lark(lark), stop_ids, spelled)

    def _marked(self, text: str) -> str:
        """A text of which some may be special tokens, which no other tokens spell."""
        special = {name: token for name, token in pieces_of(self._tokenizer).names.items() if name in text}
        if not special:
            return _literal(text)
        cut = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
        return " ".join(f"<[{special[part]}]>" if part in special else _literal(part) for part in cut if part)

    def _made(self, grammar: str, stop_ids: Collection[int], spelled: Collection[int] = ()) -> "Grammar":
        forbidden = self._special - set(spelled)
        return Grammar(self._compiled(grammar).deep_copy(), self._guided, self._vocabulary, stop_ids, forbidden)

    def _compile(self, grammar: str) -> Any:
        """Raises RequestError for what cannot be held at all: an error, or nothing that could come first."""
        if len(grammar) > 2 * LARGEST_GRAMMAR:
            raise _too_large("the grammar")
        guidance = _guidance()
        limits = guidance.LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        wrong, said = guidance.LLMatcher.validate_grammar_with_warnings(grammar, self._guided, limits=limits)
        if wrong or any(not each.startswith(_ONE_OF) for each in said):
            raise _refused(next(each for each in said if wrong or not each.startswith(_ONE_OF)))
        matcher = guidance.LLMatcher(self._guided, grammar, log_level=0, limits=limits)
        first = None if matcher.is_error() else matcher.deep_copy()
        if first is None or not any(first.compute_bitmask()) or first.is_error():
            raise _refused((first or matcher).get_error() or "nothing obeys it")
        return matcher

    @cached_property
    def _guided(self) -> Any:
        """llguidance's form of the tokenizer; made once, in some tenths of a second."""
        from llguidance.hf import from_tokenizer

        try:
            most = max(self._vocabulary, len(self._tokenizer))
            return from_tokenizer(self._tokenizer, n_vocab=most, eos_token=self._tokenizer.eos_token_id)
        except ValueError as error:
            raise RequestError(f"answers by this model cannot be held to a form: {error}"[:300]) from error


class Grammar:
    """One answer's constraint."""

    def __init__(
        self, matcher: Any, guided: Any, vocabulary: int, stop_ids: Collection[int], special: Collection[int]
    ) -> None:
        self._matcher, self._guided = matcher, guided
        self._stop_ids = frozenset(token for token in stop_ids if 0 <= token < vocabulary)
        self._ends = _bits(vocabulary, self._stop_ids)
        self._ordinary = ~(_bits(vocabulary, special) | self._ends)
        self._now: NDArray[np.int32] | None = None

    @property
    def error(self) -> str | None:
        """Why nothing may come any more, where the form grew beyond its limits."""
        return _told(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed(self) -> NDArray[np.int32]:
        """A bit for each token; stop tokens may come when the form is complete. None at all after an error."""
        if self._now is None:
            self._now = self._text()
            if not self._matcher.is_error() and self._matcher.is_accepting():
                self._now |= self._ends
        return self._now

    def accept(self, token: int) -> None:
        """This token came. Raises ValueError for one that was not allowed."""
        if token in self._stop_ids:
            return
        self._now = None
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not one of those that the constraint allows")

    @property
    def complete(self) -> bool:
        """Whether nothing but a stop token may follow."""
        if self._matcher.is_error() or not self._matcher.is_accepting():
            return False
        return self._matcher.is_stopped() or not (self.allowed() & ~self._ends).any()

    def _text(self) -> NDArray[np.int32]:
        """What may come of the form itself."""
        words, bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32), np.zeros_like(self._ordinary)
        if self._matcher.is_error():
            return bits
        bits[: len(words)] = words[: len(bits)]
        bits &= self._ordinary
        if bits.any() or self._matcher.is_accepting():
            return bits
        # llguidance means a text that has to come to be a special token where it is spelled like one (`<|im_end|>`)
        spelled = self._guided.tokenize_bytes(self._matcher.compute_ff_bytes()[:1])
        return _bits(32 * len(bits), spelled[-1:]) if spelled else bits


def _bits(vocabulary: int, tokens: Collection[int]) -> NDArray[np.int32]:
    flags = np.zeros(32 * -(-vocabulary // 32), np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)


def check_json(text: str, schema: Schema) -> str | None:
    """Why a finished text is no JSON that obeys the schema; None where it does. Patterns are not looked at again: the
    grammar holds them, and Python's regular expressions may take for ever."""
    import jsonschema
    import referencing.exceptions

    try:
        value = json.loads(text, parse_constant=_no_number)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        held = {"pattern": _held, "patternProperties": _held, "additionalProperties": _additional(kind)}
        checker = jsonschema.validators.extend(kind, held)
        error = jsonschema.exceptions.best_match(checker(schema, registry=referencing.Registry()).iter_errors(value))
    except RecursionError:
        return "it is nested too deep"
    except ValueError as problem:
        return f"it is no JSON: {problem}"[:_LONGEST]
    except (jsonschema.exceptions.SchemaError, referencing.exceptions.Unresolvable, TypeError) as problem:
        return f"the schema cannot be read: {problem}"[:_LONGEST]
    if error is None:
        return None
    return f"at {error.json_path}: {error.message}"[:_LONGEST]


def _held(*_: Any) -> Iterator[Any]:
    """No errors of a keyword that the grammar holds."""
    return iter(())


def _additional(kind: Any) -> Any:
    """Further properties, where no pattern says which are further."""
    checked = kind.VALIDATORS["additionalProperties"]
    return lambda validator, value, instance, schema: (
        iter(()) if "patternProperties" in schema else checked(validator, value, instance, schema)
    )


_LONGEST = 300


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "answers that obey a form (JSON, a schema, a pattern, required tools) need llguidance: pip install "
            "'topwork[serve]'"
        ) from error
    return llguidance


def _json_rule(schema: Schema) -> str:
    """Lark for JSON by a schema, which is a document of its own: its references stay its own."""
    if schema is False:
        raise RequestError("the schema is false, which nothing obeys; give one that allows something")
    if schema is not True and not isinstance(schema, Mapping):
        raise RequestError(f"the schema is of type {type(schema).__name__}; expected an object")
    document = {**({} if schema is True else schema), "x-guidance": _OPTIONS}  # over one that came with it
    try:
        written = json.dumps(document, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        told = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the schema is no JSON: {told}"[:_LONGEST]) from error
    return f"%json {_text(written, 'the schema')}"


def _text(text: str, what: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds half a surrogate pair at character {error.start}, which is no text"
        ) from error
    if size > LARGEST_GRAMMAR:
        raise _too_large(what)
    return text


def _too_large(what: str) -> RequestError:
    return RequestError(f"{what} is larger than {LARGEST_GRAMMAR} bytes; give a smaller one")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _refused(said: str) -> RequestError:
    keys = re.search(r"Unimplemented keys: \[(.*?)\]", said)
    if keys:
        names = ", ".join(re.findall(r'"([^"]*)"', keys[1]))[:100]
        return RequestError(
            f"the schema's {names} cannot be held while an answer is written; leave it out of the schema"
        )
    return RequestError(f"this form cannot be held while an answer is written: {_told(said)}")


def _told(said: str) -> str:
    """What llguidance says, without its places in a text that nobody saw."""
    if "NoExtension" in said:
        return "nothing obeys it"
    errors = re.findall(r"^error: (.*)", said, re.MULTILINE)
    first = next((line for line in said.splitlines() if line.strip()), "unknown error")
    return (errors[-1] if errors else re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first))[
        :_LONGEST
    ]
