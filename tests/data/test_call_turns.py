"""Calls as each template takes them, in training as in generation."""

import json
from typing import Any

import pytest
from family_tokenizers import FAMILIES, build_tokenizer
from learned_text import chat, check_prompts, learned, said, shown, user
from tool_templates import HERMES, LLAMA, MISTRAL, XML

from topwork.common.errors import DataError
from topwork.data.chat.call_turns import SPLIT, CallNeeds, call_needs
from topwork.data.chat.calls import with_short_ids
from topwork.data.chat.template import ChatTemplate, Reading
from topwork.data.conversations import Message

GLUED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[U]' + m.content }}
{%- elif m.tool_calls %}{{- '[A]' }}{% for c in m.tool_calls %}
{{- '[C]' + c.function.name + '\n' + c.function.arguments + '[/C]' }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'tool' %}{{- '[T]' + m.content }}{% else %}{{- '[A]' + m.content + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '[A]' }}{% endif %}"""
"""R1's with tools: arguments are glued on as text."""
PRINTED = GLUED.replace("+ c.function.arguments +", "~ c.function.arguments ~")
"""An object comes out as Python writes it."""

TOOLS = [{"type": "function", "function": {"name": "sky", "description": "d", "parameters": {"type": "object"}}}]


def call(city: str, **more: Any) -> dict[str, Any]:
    return {**more, "type": "function", "function": {"name": "sky", "arguments": {"city": city}}}


def result(text: str, **more: Any) -> Message:
    return Message("tool", text, None, more)


ONE = (
    user("sky?"),
    said("", tool_calls=[call("Orlen", id="call_1")]),
    result("clear", tool_call_id="call_1"),
    said("It is clear."),
)
TWO = (
    user("sky?"),
    said("", tool_calls=[call("Orlen", id="a"), call("Brask", id="b")]),
    result("rain", tool_call_id="b"),
    result("clear", tool_call_id="a"),
    said("Clear, rain."),
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "jinja", "needs"),
    [
        ("qwen2_5", None, CallNeeds()),
        ("qwen3", None, CallNeeds()),
        ("smollm2", "chatml", CallNeeds()),
        ("qwen3", HERMES, CallNeeds()),
        ("qwen3", XML, CallNeeds()),
        ("llama3", LLAMA, CallNeeds(one=True)),
        ("mistral_v3", MISTRAL, CallNeeds(ids=True, short_ids=True)),
        ("mistral", GLUED, CallNeeds(as_text=True)),
        ("mistral", PRINTED, CallNeeds(as_text=True)),
        *((family, None, CallNeeds()) for family in FAMILIES if not family.startswith("qwen")),
    ],
)
def test_what_a_template_wants_of_calls(family: str, jinja: str | None, needs: CallNeeds) -> None:
    assert call_needs(ChatTemplate(build_tokenizer(family), jinja).renderer) == needs


@pytest.mark.parametrize("jinja", [GLUED, PRINTED])
@pytest.mark.parametrize("given", [{"city": "Orlén"}, '{"city": "Orlén"}'])
def test_arguments_as_text(jinja: str, given: Any) -> None:
    template = ChatTemplate(build_tokenizer("mistral"), jinja)
    asked = {"type": "function", "function": {"name": "sky", "arguments": given}}
    messages = (user("sky?"), said("", tool_calls=[asked]), result("clear"), said("Yes."))
    assert learned(template, *messages) == ['[C]sky\n{"city": "Orlén"}[/C]</s>', "Yes.</s>"]
    check_prompts(template, *messages)


@pytest.mark.parametrize("given", [{"city": "Orlen"}, '{"city": "Orlen"}', '{"city":"Orlen"}'])
def test_arguments_as_an_object(given: Any) -> None:
    template = ChatTemplate(build_tokenizer("qwen2_5"))
    asked = {"type": "function", "function": {"name": "sky", "arguments": given}}
    (text,) = learned(template, user("sky?"), said("", tool_calls=[asked]))
    assert text == '<tool_call>\n{"name": "sky", "arguments": {"city": "Orlen"}}\n</tool_call><|im_end|>'


def test_ids_of_nine_are_made_and_agree() -> None:
    template = ChatTemplate(build_tokenizer("mistral_v3"), MISTRAL)
    texts = learned(template, *ONE)
    short = with_short_ids(ONE)[2].extra["tool_call_id"]
    assert texts == [
        f'[TOOL_CALLS] [{{"name": "sky", "arguments": {{"city": "Orlen"}}, "id": "{short}"}}]</s>',
        " It is clear.</s>",
    ]
    (item,) = template.encode(chat(*ONE))
    assert f'"call_id": "{short}"' in shown(template, item)
    check_prompts(template, *ONE)
    (item,) = template.encode(chat(*TWO))  # the results' order is theirs
    ids = [each["id"] for each in with_short_ids(TWO)[1].extra["tool_calls"]]
    text = shown(template, item)
    assert text.index(f'rain, "call_id": "{ids[1]}"') < text.index(f'clear, "call_id": "{ids[0]}"')


def test_ids_that_rows_leave_out() -> None:
    template = ChatTemplate(build_tokenizer("mistral_v3"), MISTRAL)
    bare = (
        user("sky?"), said("", tool_calls=[call("Orlen"), call("Brask")]), result("clear"), result("rain"), said("Yes"),
        user("more?"), said("", tool_calls=[call("Orlen")]), result("snow"), said("No."),
    )  # fmt: skip
    (item,) = template.encode(chat(*bare))
    text = shown(template, item)
    first, second, third = [part[:9] for part in text.split('"id": "')[1:]]
    assert len({first, second, third}) == 3
    for said_, id_ in (("clear", first), ("rain", second), ("snow", third)):
        assert f'{said_}, "call_id": "{id_}"' in text
    check_prompts(template, *bare)


def test_one_call_a_turn() -> None:
    """Llama 3.1's: two calls in one turn become two turns, each with its own result."""
    template = ChatTemplate(build_tokenizer("llama3"), LLAMA)
    (item,) = template.encode(chat(*TWO, tools=TOOLS))
    heads = shown(template, item).split("⟦", 1)[1]
    assert heads == (
        '{"name": "sky", "parameters": {"city": "Orlen"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"output": "clear"}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "sky", "parameters": {"city": "Brask"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n{"output": "rain"}<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Clear, rain.<|eot_id|>⟧"
    )
    assert item.notes == (SPLIT,)
    assert item.tokens[: len(template.prompt_ids(TWO[:-1], TOOLS))] == template.prompt_ids(TWO[:-1], TOOLS)
    without = tuple(
        Message(m.role, m.content, None, {k: v for k, v in m.extra.items() if k == "tool_calls"}) for m in TWO
    )
    assert "rain" in shown(template, template.encode(chat(*without, tools=TOOLS))[0])


def test_calls_that_cannot_be_put_one_after_another() -> None:
    template = ChatTemplate(build_tokenizer("llama3"), LLAMA)
    with pytest.raises(DataError, match=r"one call a turn, and a turn has 2 with 1 results.*chatml"):
        template.encode(chat(*TWO[:3], TWO[4], tools=TOOLS))
    with pytest.raises(DataError, match="a turn has 2 with 0 results"):
        template.encode(chat(*TWO[:2], tools=TOOLS))


def test_text_beside_a_call() -> None:
    """Learned where the template writes it, refused by name where it does not, left out on request."""
    beside = (
        user("sky?"),
        said("Let me look.", tool_calls=[call("Orlen", id="a")]),
        result("clear", tool_call_id="a"),
        said("Yes."),
    )
    assert learned(ChatTemplate(build_tokenizer("qwen2_5")), *beside)[0].startswith("Let me look.\n<tool_call>")
    tokenizer = build_tokenizer("llama3")
    with pytest.raises(DataError, match=r"leaves out the answer's text beside a tool call; set data\.lost_text: allow"):
        ChatTemplate(tokenizer, LLAMA).encode(chat(*beside, tools=TOOLS))
    template = ChatTemplate(tokenizer, LLAMA, False, Reading(lost_text="allow"))
    (item,) = template.encode(chat(*beside, tools=TOOLS))
    assert item.notes[0] == "the chat template leaves out the answer's text beside a tool call"
    assert learned(template, *beside, tools=TOOLS)[0] == '{"name": "sky", "parameters": {"city": "Orlen"}}<|eot_id|>'
    # beside a call that is not learned itself it is history, and may not vanish either
    quiet = (beside[0], Message("assistant", "Let me look.", 0.0, beside[1].extra), *beside[2:])
    with pytest.raises(DataError, match="leaves out an earlier answer's text beside a tool call"):
        ChatTemplate(tokenizer, LLAMA).encode(chat(*quiet, tools=TOOLS))


def test_tools_that_a_template_leaves_out_though_it_writes_calls() -> None:
    template = ChatTemplate(build_tokenizer("mistral"), GLUED)
    assert learned(template, *ONE)[0].startswith("[C]sky")
    with pytest.raises(DataError, match=r"leaves out the tools, sky among them; data\.chat_template: chatml"):
        template.encode(chat(*ONE, tools=TOOLS))


def test_calls_whose_arguments_the_template_forgets() -> None:
    forgetful = HERMES.replace("(call.function.arguments | tojson)", "'{}'")
    assert forgetful != HERMES
    with pytest.raises(DataError, match=r"leaves out the tool call sky; data\.chat_template: chatml"):
        ChatTemplate(build_tokenizer("qwen3"), forgetful).encode(chat(*ONE))
    nested = {"a": [{"b": 'quote " and \\ and é\n'}, 1.5, True, None], "c": ""}
    asked = {"type": "function", "function": {"name": "sky", "arguments": nested}}
    for jinja in (None, HERMES):
        (text,) = learned(ChatTemplate(build_tokenizer("qwen3"), jinja), user("x"), said("", tool_calls=[asked]))
        assert json.dumps(nested, ensure_ascii=False) in text
    (text,) = learned(ChatTemplate(build_tokenizer("mistral"), GLUED), user("x"), said("", tool_calls=[asked]))
    assert json.dumps(nested, ensure_ascii=False) in text
