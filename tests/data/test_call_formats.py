"""How templates write calls, found by asking them; and what else a prompt for generation may be given."""

from typing import Any

import pytest

from data import tool_templates
from data.calls_cases import ASKED, CALLED, TOOLS
from data.family_tokenizers import FAMILIES, build_tokenizer
from topwork.common.errors import DataError
from topwork.data.chat import calls
from topwork.data.chat.calls import HERMES, CallFormat, in_text, with_short_ids
from topwork.data.chat.rendering import TemplateRejects
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message

LLAMA = CallFormat("", '{"name": "', '", "parameters": ', "}", "", None)
MISTRAL = CallFormat("[TOOL_CALLS] ", '{"name": "', '", "arguments": ', "}", "", ", ", listed=True, short_ids=True)


def template(family: str, jinja: str | None = None) -> ChatTemplate:
    return ChatTemplate(build_tokenizer(family), jinja)


@pytest.mark.parametrize(
    ("family", "jinja", "expected"),
    [
        ("qwen2_5", None, HERMES),
        ("qwen3", None, HERMES),
        ("smollm2", "chatml", HERMES),
        ("qwen3", tool_templates.HERMES, HERMES),
        ("llama3", tool_templates.LLAMA, LLAMA),
        ("mistral_v3", tool_templates.MISTRAL, MISTRAL),
        ("qwen3", tool_templates.XML, None),
        *((family, None, None) for family in FAMILIES if not family.startswith("qwen")),
    ],
)
def test_the_format_of_calls_is_found(family: str, jinja: str | None, expected: CallFormat | None) -> None:
    found = template(family, jinja).calls
    if jinja == tool_templates.HERMES:  # its calls are asked for name first, whatever their history looks like
        assert found is not None
        assert (found.opens, found.closes, found.head) == (HERMES.opens, HERMES.closes, HERMES.head)
    else:
        assert found == expected


def test_a_template_that_forgets_results_has_no_format() -> None:
    half = tool_templates.LLAMA.replace("({'output': message.content} | tojson)", "''")
    assert half != tool_templates.LLAMA
    assert template("llama3", half).calls is None
    deaf = tool_templates.LLAMA.replace("tool | tojson(indent=4)", "''")
    assert template("llama3", deaf).calls is None


def test_in_text_says_what_chatml_would() -> None:
    """The same words where both can say it."""
    knows = template("smollm2", "chatml")
    for system in ((), (Message("system", "Be brief."),)):
        messages = [*system, *CALLED]
        told = in_text(messages, TOOLS)
        assert all(message.role != "tool" and "tool_calls" not in message.extra for message in told)
        expected = knows.renderer.render(messages, TOOLS, True)
        # chatml opens the user's turn with a line before each result
        assert knows.renderer.render(told, None, True) == expected.replace("user\n\n<tool_resp", "user\n<tool_resp")


def test_results_that_follow_each_other_are_one_turn() -> None:
    two = [*CALLED, Message("tool", "more", None, {"tool_call_id": "b"})]
    told = in_text(two, None)
    assert [message.role for message in told] == ["user", "assistant", "user"]
    assert told[-1].content.count("<tool_response>") == 2
    assert in_text([ASKED], None) == [ASKED]


def test_short_ids_stay_the_same_for_the_same_call() -> None:
    known = template("mistral_v3", tool_templates.MISTRAL)
    short = with_short_ids(CALLED)
    assert short[1].extra["tool_calls"][0]["id"] == short[2].extra["tool_call_id"]
    assert known.prompt_ids(CALLED) == known.prompt_ids(short)
    with pytest.raises(TemplateRejects, match="length 9"):
        known.renderer.render(CALLED, None, True)
    assert CALLED[2].extra["tool_call_id"] == "call_0123456789abcdef"  # a copy
    nine = Message("tool", "x", None, {"tool_call_id": "abcDEF123"})
    assert with_short_ids([nine]) == [nine]


def test_variables_reach_the_template() -> None:
    known, asked = template("qwen3"), [ASKED]
    assert known.prompt_ids(asked) == known.prompt_ids(asked, None, {"enable_thinking": True})
    thoughtless = known.prompt_ids(asked, None, {"enable_thinking": False})
    assert known.tokenizer.decode(thoughtless).endswith("<think>\n\n</think>\n\n")
    for name in ("tools", "chat_template", "add_generation_prompt", "tokenize", "messages", "eos_token", "self"):
        with pytest.raises(DataError, match=f"variable '{name}' is not to be set"):
            known.prompt_ids(asked, None, {name: "x"})


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "llama3", "gemma", "mistral"])
def test_the_last_message_is_gone_on_with(family: str) -> None:
    known, started = template(family), Message("assistant", "Yes. No")
    text = known.tokenizer.decode(known.prompt_ids([ASKED, started], goes_on=True))
    assert text.endswith("Yes. No")
    prompt = known.tokenizer.decode(known.prompt_ids([ASKED]))
    if family not in ("qwen3", "mistral"):  # which put something between
        assert text == prompt + "Yes. No"
    for messages, told in (([ASKED], "user's"), ([], "not there"), (CALLED[:2], "assistant's")):
        with pytest.raises(DataError, match=rf"goes on with the assistant's text, and the last message is.*{told}"):
            known.prompt_ids(messages, goes_on=True)


def test_messages_that_are_no_text_or_too_deep() -> None:
    known = template("qwen3")
    with pytest.raises(DataError, match="half a surrogate pair"):
        known.prompt_ids([Message("user", "\ud800")])
    deep: Any = {}
    for _ in range(3000):
        deep = {"a": deep}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": deep}}
    with pytest.raises(DataError, match="too deep"):
        known.prompt_ids([ASKED, Message("assistant", "", None, {"tool_calls": [call]}), ASKED])


def test_what_a_template_complains_of_is_told_in_brief() -> None:
    shouting = template("qwen3", "{{ raise_exception(messages[0].content * 1000) }}")
    with pytest.raises(DataError) as refused:
        shouting.prompt_ids([ASKED])
    assert len(str(refused.value)) < 1000


def test_whether_system_messages_are_taken() -> None:
    assert template("qwen3").takes_system
    assert not template("gemma").takes_system
    assert not template("mistral_v3", tool_templates.MISTRAL).takes_system
    assert calls.call_format(template("gemma").renderer) is None
