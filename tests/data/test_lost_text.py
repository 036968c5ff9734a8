"""Nothing of a row vanishes in the template; and what a template does not take is refused with the way out."""

from typing import Any

import pytest
from family_tokenizers import build_tokenizer
from learned_text import chat, check_prompts, learned, said, shown, user

from topwork.common.errors import DataError
from topwork.data.chat import complete
from topwork.data.chat.template import ChatTemplate, Reading
from topwork.data.chat.turns import CUT, FIRST, OTHERWISE
from topwork.data.conversations import Message

ALLOW = Reading(lost_text="allow")
SHORTENS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{{- (m.content[:12] if m.role == 'assistant' else m.content) + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FORGETS = """{% for m in messages %}{% if m.role != 'assistant' or loop.last %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_an_answer_that_the_template_shortens() -> None:
    tokenizer = build_tokenizer("smollm2")
    messages = (user("x"), said("a rather long answer"))
    with pytest.raises(DataError, match=r"train.jsonl:1: .*leaves out the answer's text, or changes it"):
        ChatTemplate(tokenizer, SHORTENS).encode(chat(*messages))
    # nothing of it is left to learn, so that is not to be allowed either
    with pytest.raises(DataError, match="leaves out the answer's text"):
        ChatTemplate(tokenizer, SHORTENS, False, ALLOW).encode(chat(*messages))
    assert learned(ChatTemplate(tokenizer, SHORTENS), user("x"), said("  short ")) == ["  short <|im_end|>"]


def test_the_letters_of_markup_prove_nothing() -> None:
    """An answer "end" does not stand in `<|im_end|>`."""
    template = ChatTemplate(build_tokenizer("smollm2"), SHORTENS.replace("[:12]", "[:0]"))
    for content in ("end", "im", "|", "a"):
        with pytest.raises(DataError, match="leaves out the answer's text"):
            template.encode(chat(user("x"), said(content)))


def test_an_earlier_answer_that_the_template_forgets() -> None:
    tokenizer = build_tokenizer("smollm2")
    messages = (user("x"), said("one"), user("y"), said("two"))
    with pytest.raises(DataError, match="leaves out an earlier answer's text"):
        ChatTemplate(tokenizer, FORGETS).encode(chat(*messages))
    template = ChatTemplate(tokenizer, FORGETS, False, ALLOW)
    found = template.encode(chat(*messages))
    assert found[-1].notes == ("the chat template leaves out an earlier answer's text",)
    assert learned(template, *messages) == ["one<|im_end|>", "two<|im_end|>"]
    check_prompts(template, *messages)


def test_white_space_and_spelling_are_no_loss() -> None:
    content = ' \n Say "é\\n"\t\U0001f642 \n'
    for family in ("smollm2", "gemma", "mistral_v3", "llama3"):
        (text,) = learned(ChatTemplate(build_tokenizer(family)), user("x"), said(content))
        assert content.strip() in text
    quoted = "{% for m in messages %}{{ '<|im_start|>' ~ (m.content | tojson ESCAPED) ~ '<|im_end|>' }}{% endfor %}"
    for escaped in ("", "(ensure_ascii=True)"):
        jinja = quoted.replace(" ESCAPED", escaped)
        message = Message("assistant", content)
        text = ChatTemplate(build_tokenizer("smollm2"), jinja).renderer.render([user("x"), message], None, False)
        assert complete.missing(message, text) == []
    assert complete.missing(said("five"), "four") == [complete.TEXT]


@pytest.mark.parametrize("family", ["gemma", "gemma3", "mistral"])
def test_several_turns_of_one_role(family: str) -> None:
    tokenizer = build_tokenizer(family)
    messages = (user("hi"), user("is it open?"), said("yes"), said("until six"))
    with pytest.raises(DataError, match=r"must alternate.*set data\.merge_turns: true"):
        ChatTemplate(tokenizer).encode(chat(*messages))
    with pytest.raises(DataError, match=r"set data\.merge_turns: true"):
        ChatTemplate(tokenizer).prompt_ids(messages[:2])
    merged = ChatTemplate(tokenizer, None, False, Reading(merge_turns=True))
    (text,) = learned(merged, *messages)
    assert text.startswith("yes\n\nuntil six")
    assert "hi\n\nis it open?" in shown(merged, merged.encode(chat(*messages))[0])
    if family != "gemma3":
        with pytest.raises(DataError, match=r"data\.merge_turns: true.*and data\.fold_system: true"):
            ChatTemplate(tokenizer).encode(chat(Message("system", "s"), *messages))


def test_an_assistant_who_speaks_first() -> None:
    """Read and not learned where the template takes it, cut where it does not; later answers are learned."""
    messages = (said("Welcome."), user("a room?"), said("Two coins."))
    template = ChatTemplate(build_tokenizer("smollm2"), "chatml")
    (item,) = template.encode(chat(*messages))
    assert shown(template, item) == (
        "<|im_start|>assistant\nWelcome.<|im_end|>\n<|im_start|>user\na room?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Two coins.<|im_end|>⟧"
    )
    assert item.notes == (FIRST,)
    for family in ("gemma", "mistral", "gemma3"):
        template = ChatTemplate(build_tokenizer(family))
        (item,) = template.encode(chat(*messages))
        assert item.notes == (CUT,)
        assert item.tokens == template.encode(chat(*messages[1:]))[0].tokens
        with pytest.raises(DataError, match=r"it wants the user to begin"):
            template.prompt_ids(messages[:2])
    with pytest.raises(DataError, match="nothing that it answers"):
        ChatTemplate(build_tokenizer("smollm2")).encode(chat(messages[0]))


GENERATION = """{% for m in messages %}{{ '[' + m.role + ']' }}{% if m.role == 'assistant' %}
{%- generation %}BODY{% endgeneration %}AFTER{% else %}{{ m.content + '[end]' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


@pytest.mark.parametrize(
    ("body", "after", "notes"),
    [
        ("{{ m.content + eos_token }}", "", ()),
        ("{{ m.content }}", "{{ eos_token }}", ()),  # the end is what generation has to say all the same
        ("{{ m.content[:2] }}", "{{ m.content[2:] + eos_token }}", (OTHERWISE,)),
    ],
)
def test_generation_marks(body: str, after: str, notes: tuple[str, ...]) -> None:
    jinja = GENERATION.replace("BODY", body).replace("AFTER", after)
    template = ChatTemplate(build_tokenizer("mistral"), jinja)
    messages = (user("hi"), said("hello"), user("bye"), said("ciao"))
    (item,) = template.encode(chat(*messages))
    assert shown(template, item) == "[user]hi[end][assistant]⟦hello</s>⟧[user]bye[end][assistant]⟦ciao</s>⟧"
    assert item.notes == notes
    check_prompts(template, *messages)


def test_an_end_that_is_an_added_token_of_the_answer_is_no_end_of_the_turn() -> None:
    """</tool_call> at the end of an answer does not end it, where the template writes no end."""
    tokenizer = build_tokenizer("no_end")
    tokenizer.add_tokens(["</tool_call>"])
    template = ChatTemplate(tokenizer)
    assert learned(template, user("x"), said("a</tool_call>")) == ["a</tool_call></s>"]


def test_a_tool_that_is_no_function_of_a_name() -> None:
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"description": "nameless"}}]
    assert learned(ChatTemplate(build_tokenizer("qwen3")), user("x"), said("y"), tools=tools)[0].endswith("y<|im_end|>")
