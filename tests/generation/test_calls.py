"""What a model says to text and calls, the same however it is cut."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.data.chat.calls import HERMES, CallFormat
from topwork.generation.calls import CallParser, Delta, Said, together

MISTRAL = CallFormat("[TOOL_CALLS] ", '{"name": "', '", "arguments": ', "}", "", ", ", listed=True, short_ids=True)
LLAMA = CallFormat("", '{"name": "', '", "parameters": ', "}", "", None)
FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}
KNOWN = ("get_weather", "now")

PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{", "}", "[", "]", '"', "name", "arguments", '"name": "now"',
    '"arguments": {"a": "}\\"<"}', '{"name": "now", "arguments": {"x": 1}}', '{"name":"get_weather","parameters":null}',
    '{"arguments": {"k":[1,{"z":"]"}]}, "name": "now"}', '"parameters": "{\\"a\\": 1}"', " ", "\n", "Hello", ",", ":",
    ";", "null", "<", "\\", "é👍",
]  # fmt: skip


def read(form: CallFormat, pieces: list[str], most: int | None = None) -> tuple[list[Delta], CallParser]:
    parser, deltas = CallParser(form, KNOWN, most), []
    for piece in pieces:
        deltas += parser.add(piece)
    return deltas + parser.finish(), parser


def plain(said: Said) -> tuple[str, list[tuple[str, str]]]:
    return said.text, [(call.name, call.arguments) for call in said.calls]


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(PIECES), max_size=14), st.sampled_from([None, None, 1]),
    st.data(),
)  # fmt: skip
def test_however_it_is_cut_it_says_the_same(name: str, made: list[str], most: int | None, data: st.DataObject) -> None:
    form, whole = FORMATS[name], "".join(made)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(whole)])]
    deltas, parser = read(form, data.draw(st.sampled_from([pieces, list(whole)])), most)
    said = together(deltas)
    assert plain(said) == plain(together(read(form, [whole], most)[0]))
    assert parser.called == bool(said.calls)
    assert most is None or len(said.calls) <= most
    begun = -1
    for delta in deltas:  # OpenAI's order: a call's head first, in turn, then its arguments alone
        if delta.id is not None:
            assert (delta.call, delta.text, delta.arguments) == (begun + 1, "", "")
            assert delta.name in KNOWN
            begun += 1
        elif delta.call is not None:
            assert (delta.call, delta.text, delta.name) == (begun, "", None)
            assert delta.arguments
        else:
            assert delta.text
    if not any(mark in whole for mark in ("{", "[TOOL_CALLS]", "<tool_call>")):
        assert said == Said(whole, ())


CALL, OTHER = '{"name": "get_weather", "arguments": {"city": "Bern"}}', '{"name": "now", "parameters": {}}'
BERN, NOW = ("get_weather", '{"city": "Bern"}'), ("now", "{}")
SAID: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [BERN]),
    (
        "hermes",
        f"Let me see.\n\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{OTHER}</tool_call>",
        "Let me see.",
        [BERN, NOW],
    ),
    ("hermes", f"<tool_call>{CALL}</tool_call>\nDone", "\nDone", [BERN]),
    ("hermes", f"<tool_call>[{CALL}, {OTHER}]</tool_call>", "", [BERN, NOW]),
    ("hermes", f"<tool_call>{CALL}", "", [BERN]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"arguments": {"city": "Bern"}, "name": "get_weather"}</tool_call>', "", [BERN]),
    ("hermes", '<tool_call>{"type": "function", "name": "now", "arguments": null}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("now", '{"a": 1}')]),
    ("hermes", f"<tool_call>{CALL}}}</tool_call>", "", [BERN]),
    ("hermes", f"<tool_call>{CALL[:-1]}</tool_call>", "", [BERN]),
    ("hermes", f"<tool_call>{CALL[:-6]}", "", [("get_weather", '{"city": "B')]),
    (
        "hermes",
        '<tool_call>{"name": "unknown", "arguments": {}}',
        '<tool_call>{"name": "unknown", "arguments": {}}',
        [],
    ),
    ("hermes", "a <tool_call> is a tag", "a <tool_call> is a tag", []),
    ("hermes", "  a < b <tool", "  a < b <tool", []),
    ("hermes", f'<tool_call>{CALL}</tool_call>\n<tool_call>\n{{"', "", [BERN]),
    ("hermes", 'So: <tool_call>{"na', 'So: <tool_call>{"na', []),
    ("hermes", CALL, "", [BERN]),
    ("hermes", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("hermes", f"It is {CALL}", f"It is {CALL}", []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", [BERN, NOW]),
    ("mistral", f"[TOOL_CALLS]{CALL}", "", [BERN]),
    ("mistral", f"[{CALL}]", "", [BERN]),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("mistral", f"Well [TOOL_CALLS] [{CALL}]", "Well", [BERN]),
    ("llama", OTHER, "", [NOW]),
    ("llama", f"\n{CALL}; {OTHER}", "", [BERN, NOW]),
    ("llama", f"{CALL}\n{OTHER}\nDone", "\nDone", [BERN, NOW]),
    ("llama", '{"name": "now"}', '{"name": "now"}', []),
    ("llama", '{"name": "now", "value": 3}', '{"name": "now", "value": 3}', []),
    ("llama", f"<tool_call>{CALL}</tool_call>", f"<tool_call>{CALL}</tool_call>", []),
]


@pytest.mark.parametrize(("name", "text", "shown", "calls"), SAID)
def test_what_is_said(name: str, text: str, shown: str, calls: list[tuple[str, str]]) -> None:
    assert plain(together(read(FORMATS[name], [text])[0])) == (shown, calls)
    assert plain(together(read(FORMATS[name], list(text))[0])) == (shown, calls)


def test_pieces_come_as_soon_as_they_can() -> None:
    parser = CallParser(HERMES, KNOWN)
    assert parser.add("So: ") == [Delta("So:")]
    assert parser.add('<tool_call>\n{"name": "get_weather", ') == []
    assert not parser.called
    head, first = parser.add('"arguments": {"ci')
    assert (head.call, head.name, head.arguments, first) == (0, "get_weather", "", Delta(call=0, arguments='{"ci'))
    assert re.fullmatch("call_[a-zA-Z0-9]{24}", head.id or "")
    assert parser.called
    assert parser.add('ty": "Be') == [Delta(call=0, arguments='ty": "Be')]
    assert parser.add('rn"}}') == [Delta(call=0, arguments='rn"}')]
    assert parser.add("\n</tool_") == parser.add("call>") == parser.finish() == []
    parser = CallParser(HERMES, KNOWN)
    assert parser.add('{"na') == []
    assert parser.add('me": "Bob') == []
    assert parser.add('", "') == [Delta('{"name": "Bob"'), Delta(', "')]


def test_ids_are_the_formats() -> None:
    deltas, _ = read(MISTRAL, [f"[TOOL_CALLS] [{CALL}, {CALL}]"])
    first, second = together(deltas).calls
    assert first.id != second.id
    assert re.fullmatch("[a-zA-Z0-9]{9}", first.id)


def test_after_the_last_call_there_is_no_more() -> None:
    parser = CallParser(HERMES, KNOWN, 1)
    deltas = parser.add(f"<tool_call>{CALL}</tool_call>")
    assert parser.ended
    assert parser.add(f"<tool_call>{OTHER}</tool_call> and more") == parser.finish() == []
    assert plain(together(deltas)) == ("", [BERN])


def test_without_tools_all_is_text() -> None:
    parser = CallParser(HERMES, ())
    assert parser.add(f"<tool_call>{CALL}") == [Delta(f"<tool_call>{CALL}")]
    assert parser.finish() == []
    assert not parser.called
