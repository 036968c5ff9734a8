"""Thinking is learned, put where it can be, left out on request, or refused; it never vanishes."""

from typing import Any, Literal

import pytest
from family_tokenizers import build_tokenizer
from learned_text import chat, check_prompts, learned, said, shown, user
from thinking_templates import NAMED, R1_OLDER, R1_OPENS

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate, Reading
from topwork.data.chat.thinking import DROPPED, KEYS, ThinkingForm, parts, thinking_form, without_thinking

Q = user("2+3?")
THOUGHT = "two and three make five"
INLINE = f"<think>\n{THOUGHT}\n</think>\n\n5"
Mode = Literal["learn", "inline", "drop"]


def made(family: str, jinja: str | None = None, thinking: Mode = "learn", **more: Any) -> ChatTemplate:
    return ChatTemplate(build_tokenizer(family), jinja, False, Reading(thinking=thinking, **more))


@pytest.mark.parametrize(
    ("family", "jinja", "form"),
    [
        ("smollm2", None, ThinkingForm(None, False)),
        ("qwen3", None, ThinkingForm("reasoning_content", False)),
        ("mistral", R1_OPENS, ThinkingForm(None, True)),
        ("mistral", R1_OLDER, ThinkingForm(None, True)),
        ("smollm2", NAMED.replace("KEY", "thinking"), ThinkingForm("thinking", False)),
        ("gemma", None, ThinkingForm(None, False)),
    ],
)
def test_the_form_is_found(family: str, jinja: str | None, form: ThinkingForm) -> None:
    assert thinking_form(made(family, jinja).renderer) == form


@pytest.mark.parametrize("key", KEYS)
def test_a_field_of_any_name_goes_where_the_template_looks(key: str) -> None:
    """Whatever the rows call it, and whatever the template does."""
    messages = (Q, said("5", **{key: THOUGHT}))
    assert learned(made("qwen3"), *messages) == [f"{INLINE}<|im_end|>"]
    for name in KEYS:
        template = made("smollm2", NAMED.replace("KEY", name))
        assert learned(template, *messages) == [f"<think>{THOUGHT}</think>5<|im_end|>"]
        check_prompts(template, *messages)
    with pytest.raises(DataError, match=r"leaves out the answer's thinking; set data\.thinking: inline"):
        made("smollm2").encode(chat(*messages))


@pytest.mark.parametrize("family", ["smollm2", "gemma", "llama3", "mistral", "phi4", "no_end"])
def test_a_template_that_knows_no_thinking(family: str) -> None:
    messages = (Q, said("5", reasoning_content=THOUGHT))
    with pytest.raises(DataError, match=r"train.jsonl:1: .*thinking; set data\.thinking: inline, .* or drop"):
        made(family).encode(chat(*messages))
    (inline,) = learned(made(family, thinking="inline"), *messages)
    assert inline.startswith(INLINE)
    check_prompts(made(family, thinking="inline"), *messages)
    template = made(family, thinking="drop")
    (item,) = template.encode(chat(*messages))
    assert item.notes == (DROPPED,)
    assert item.tokens == made(family).encode(chat(Q, said("5")))[0].tokens
    (item,) = made(family, lost_text="allow").encode(chat(*messages))
    assert item.notes == ("the chat template leaves out the answer's thinking",)


def test_what_stands_in_the_answer_is_learned_as_it_is() -> None:
    for family in ("smollm2", "gemma", "qwen3"):
        (answer,) = learned(made(family), Q, said(INLINE))
        assert answer.startswith(INLINE)


def test_an_answer_that_the_template_would_strip_follows_the_opened_thinking() -> None:
    """R1's: the prompt ends in <think>, which the answer does not say again."""
    template = made("mistral", R1_OPENS)
    end = f"{THOUGHT}\n</think>\n\n5</s>"
    for content in (INLINE, f"<think>{THOUGHT}\n</think>\n\n5", f"{THOUGHT}\n</think>\n\n5"):
        (item,) = template.encode(chat(Q, said(content)))
        assert shown(template, item) == f"<s>[U]2+3?[A]<think>\n⟦{end}⟧"
        check_prompts(template, Q, said(content))
    assert learned(template, Q, said("5", reasoning=THOUGHT)) == [end]
    older = made("mistral", R1_OLDER)
    assert shown(older, older.encode(chat(Q, said(INLINE)))[0]) == f"<s>[U]2+3?[A]⟦{INLINE}</s>⟧"
    assert learned(older, Q, said("5", thinking=THOUGHT)) == [f"{INLINE}</s>"]


def test_earlier_turns_lose_their_thinking_as_they_do_in_generation() -> None:
    template = made("mistral", R1_OPENS)
    messages = (Q, said(INLINE), user("sure?"), said("<think>\nyes\n</think>\n\nSure."))
    first, second = template.encode(chat(*messages))
    assert shown(template, first).endswith(f"[A]<think>\n⟦{THOUGHT}\n</think>\n\n5</s>⟧")
    assert shown(template, second) == ("<s>[U]2+3?[A]\n\n5</s>[U]sure?[A]<think>\n⟦yes\n</think>\n\nSure.</s>⟧")
    check_prompts(template, *messages)
    qwen = made("qwen3")
    messages = (Q, said("5", thinking=THOUGHT), user("sure?"), said("Sure.", reasoning="yes"))
    assert learned(qwen, *messages) == [f"{INLINE}<|im_end|>", "<think>\nyes\n</think>\n\nSure.<|im_end|>"]
    assert "make five" not in shown(qwen, qwen.encode(chat(*messages))[1])
    check_prompts(qwen, *messages)


def test_thinking_before_a_call() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    for template in (made("mistral", R1_OLDER), made("mistral", R1_OPENS)):
        for answer in (said(f"<think>\n{THOUGHT}\n</think>\n\n", tool_calls=[call]),
                       said("", tool_calls=[call], reasoning_content=THOUGHT)):  # fmt: skip
            (text,) = learned(template, Q, answer)
            assert text.removeprefix("<think>\n") == f'{THOUGHT}\n</think>\n\n[C]add{{"a": 2}}</s>'
            check_prompts(template, Q, answer)
    (text,) = learned(made("qwen3"), Q, said("", tool_calls=[call], thinking=THOUGHT))
    assert text.startswith(f"<think>\n{THOUGHT}\n</think>\n\n<tool_call>")


def test_an_answer_without_thinking_where_the_prompt_opens_it() -> None:
    with pytest.raises(
        DataError, match=r"opens an answer's thinking \('<think>\\n'\) when generating, and this answer"
    ):
        made("mistral", R1_OPENS).encode(chat(Q, said("5")))
    with pytest.raises(DataError, match="opens an answer's thinking"):
        made("mistral", R1_OPENS, "drop").encode(chat(Q, said(INLINE)))


def test_an_answer_with_thinking_where_the_prompt_says_that_there_is_none() -> None:
    template = ChatTemplate(build_tokenizer("qwen3"), variables={"enable_thinking": False})
    for answer in (said(INLINE), said("5", thinking=THOUGHT)):
        with pytest.raises(DataError, match=r"set data\.thinking: drop, or leave out data\.chat_template_kwargs"):
            template.encode(chat(Q, answer))


def test_left_out_on_request() -> None:
    for content in (INLINE, f"{THOUGHT}\n</think>\n\n5", "<think>a</think>5"):
        template = made("smollm2", thinking="drop")
        (item,) = template.encode(chat(Q, said(content, thinking="more")))
        assert shown(template, item).endswith("assistant\n⟦5<|im_end|>⟧")
        assert item.notes == (DROPPED,)
    with pytest.raises(DataError, match="thinking alone"):
        made("smollm2", thinking="drop").encode(chat(Q, said("<think>\nhm\n</think>\n")))
    history = (Q, said(INLINE), user("sure?"))
    template = made("smollm2", thinking="drop")
    assert "five" not in template.tokenizer.decode(template.prompt_ids(history))


def test_a_field_beside_the_same_words_in_the_answer_is_said_once() -> None:
    (answer,) = learned(made("smollm2"), Q, said(INLINE, reasoning_content=THOUGHT))
    assert answer == f"{INLINE}<|im_end|>"
    (answer,) = learned(made("qwen3"), Q, said("5", reasoning_content=THOUGHT, thinking=THOUGHT))
    assert answer == f"{INLINE}<|im_end|>"
    (answer,) = learned(made("qwen3"), Q, said("5", reasoning_content="a", thinking="b"))
    assert answer == "<think>\na\n\nb\n</think>\n\n5<|im_end|>"


def test_what_is_no_thinking() -> None:
    for value in ("", None, []):
        assert learned(made("smollm2"), Q, said("5", reasoning_content=value)) == ["5<|im_end|>"]
    with pytest.raises(DataError, match="reasoning is of type dict, expected text"):
        made("smollm2").encode(chat(Q, said("5", reasoning={"a": 1})))
    with pytest.raises(DataError, match="leaves out the answer's thinking"):  # which spells what the answer does
        made("smollm2").encode(chat(Q, said("5", reasoning_content="5")))
    assert learned(made("smollm2"), user(f"say {INLINE}"), said("no")) == ["no<|im_end|>"]


def test_everything_is_learned_with_its_thinking() -> None:
    for template in (made("mistral", R1_OPENS), made("mistral", R1_OLDER)):
        (item,) = template.encode(chat(Q, said(INLINE)), "all")
        assert template.tokenizer.decode(item.tokens) == f"<s>[U]2+3?[A]{INLINE}</s>"


def test_thinking_and_the_rest() -> None:
    assert parts(INLINE) == ([f"\n{THOUGHT}\n"], ["", "\n\n5"])
    assert parts("a<think>b</think>c<think>d</think>e") == (["b", "d"], ["a", "c", "e"])
    assert parts("b</think>c") == (["b"], ["", "c"])
    assert parts("<think>never closed") == ([], ["<think>never closed"])
    assert without_thinking("a <think>b</think> c") == "a c"
    assert without_thinking("b\n</think>\n\nc") == "c"


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma"])
def test_thinking_that_was_cut_off_is_no_answer(family: str) -> None:
    for content in ("<think>\nTwo and", "\n<think>"):
        with pytest.raises(DataError, match="begins with <think> and never ends it, as one that was cut off"):
            made(family).encode(chat(Q, said(content)))
    (answer,) = learned(made(family), Q, said("Write <think> before it."))
    assert answer.split("<think>")[-1].startswith(" before it.")
    first, last = said("<think>\nTwo and", 0.0), said("5")
    assert len(made(family).encode(chat(Q, first, Q, last))) == 1
    with pytest.raises(DataError, match=r"the last answer, which data\.train_on learns alone, has the weight 0"):
        made(family).encode(chat(Q, last, Q, said("6", 0.0)), "last_answer")
