"""Variables that a recipe sets in a template, and prompt and completion that are read as they are."""

from pathlib import Path
from typing import Any

import pytest
from family_tokenizers import build_tokenizer, sentencepiece_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from learned_text import chat, check_prompts, learned, said, shown, text, user
from thinking_templates import R1_OPENS

from topwork.common.errors import DataError
from topwork.data.chat.chosen import with_variables
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.data.conversations import Message

TURNS = (user("hi"), said("hello"), user("bye"), said("ciao"))


def of(tokenizer: Any, stored: Path | None = None, **data: Any) -> ChatTemplate:
    return ChatTemplate.from_config(tokenizer, DataConfig(train="a.jsonl", **data), stored)


def bare(family: str = "mistral", adds_bos: bool = True) -> Any:
    tokenizer = build_tokenizer(family, "", adds_bos)
    tokenizer.chat_template = None
    return tokenizer


# Variables


def test_an_empty_think_block_is_prompt_where_thinking_is_off(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("qwen3")
    template = of(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert learned(template, *TURNS) == ["hello<|im_end|>", "ciao<|im_end|>"]
    first, second = template.encode(chat(*TURNS))
    assert shown(template, first).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n⟦hello<|im_end|>⟧")
    assert shown(template, second).endswith(
        "bye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦ciao<|im_end|>⟧"
    )
    check_prompts(template, *TURNS)
    # a run's stored template has them too, for whoever reads it; what a request says goes before
    stored = tmp_path / "chat_template.jinja"
    stored.write_text(template.jinja or "", "utf-8")
    again = of(tokenizer, stored, chat_template_kwargs={"enable_thinking": False})
    assert again.jinja == template.jinja
    assert again.prompt_ids(TURNS[:1]) == template.prompt_ids(TURNS[:1])
    assert again.prompt_ids(TURNS[:1], None, {"enable_thinking": True}) == ChatTemplate(tokenizer).prompt_ids(TURNS[:1])
    others = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], chat_template=template.jinja, add_generation_prompt=True, tokenize=False
    )
    assert others.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5", "gemma3", "mistral_v3", "smollm2", "llama3", "phi3"])
@pytest.mark.parametrize("head", ["", "\n", "  {% set a = 1 %}\n", "{# x #}\n", " \n x"])
def test_the_template_is_else_what_it_was(family: str, head: str) -> None:
    tokenizer = build_tokenizer(family)
    jinja = head + tokenizer.chat_template + "{% if topping is defined and topping == 2 %}!{% endif %}"
    before, after = ChatTemplate(tokenizer, jinja), ChatTemplate(tokenizer, jinja, variables={"topping": 1})
    for messages, prompt in ((TURNS, False), (TURNS[:1], True)):
        assert before.renderer.render(messages, None, prompt) == after.renderer.render(messages, None, prompt)
    two = ChatTemplate(tokenizer, jinja, variables={"topping": 2})
    assert two.renderer.render(TURNS, None, False) == before.renderer.render(TURNS, None, False) + "!"


LETTERS = st.text(st.sampled_from("a'\"\\\n{%}é\U0001f642"), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-4, 4) | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab'", max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(VALUES)
def test_any_value_arrives(value: Any) -> None:
    tokenizer = build_tokenizer("qwen3")
    jinja = "{% for m in messages %}{{ m.content }}{% endfor %}{{ given | tojson }}"
    template = ChatTemplate(tokenizer, jinja, variables={"given": value})
    asked = ChatTemplate(tokenizer, jinja)
    assert template.renderer.render(TURNS, None, False) == asked.renderer.render(TURNS, None, False, {"given": value})


def test_a_variable_that_the_template_never_reads() -> None:
    tokenizer = build_tokenizer("qwen3")
    told = r"chat_template_kwargs sets 'enable_thinkng', which .*never reads; did you mean 'enable_thinking'"
    with pytest.raises(DataError, match=told):
        of(tokenizer, chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(DataError, match="never reads, nor any other"):
        of(build_tokenizer("gemma"), chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(DataError, match=r"text 'False', .* without quotes: \{enable_thinking: false\}"):
        of(tokenizer, chat_template_kwargs={"enable_thinking": "False"})
    with pytest.raises(DataError, match="variable 'messages' is not to be set"):
        of(tokenizer, chat_template_kwargs={"messages": []})
    with pytest.raises(DataError, match="this model has none"):
        of(bare(), chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(DataError, match="no valid Jinja: line 1"):
        of(tokenizer, chat_template="{% for %}", chat_template_kwargs={"a": 1})
    assert with_variables(tokenizer, None, {}) is None


# Raw


@pytest.mark.parametrize("separator", ["", "\n", "\n\n### Answer:\n", " ", "'}} \\ é"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompt_and_completion_as_they_are(separator: str, adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = bare(adds_bos=adds_bos)
    template = of(tokenizer, separator=separator)
    messages = (user("Hi there "), said(" Hello!\n"))
    (item,) = template.encode(chat(*messages))
    bos = "<s>" if adds_bos else ""
    assert tokenizer.decode(item.tokens) == f"{bos}Hi there {separator} Hello!\n</s>"
    check_prompts(template, *messages)
    assert template.prompt_ids(messages[:1]) == tokenizer("Hi there " + separator)["input_ids"]
    between = f", separator {separator!r}" if separator else ""
    assert template.reading == f"prompt and completion one after the other as they are{between}"
    # by name it is the same, and so it is when a run is opened again
    assert of(tokenizer, chat_template="raw", separator=separator).jinja == template.jinja
    stored = tmp_path / "chat_template.jinja"
    stored.write_text(template.jinja or "", "utf-8", newline="")
    again = of(tokenizer, stored, separator=separator)
    assert again.prompt_ids(messages[:1]) == template.prompt_ids(messages[:1])
    assert again.reading == template.reading
    assert set(again.renderer.end_ids) == {tokenizer.eos_token_id}


def test_raw_reading_with_sentencepiece() -> None:
    tokenizer = sentencepiece_tokenizer()
    template = of(tokenizer, separator="\n")
    messages = (user("Lily"), said("the dog"))
    (item,) = template.encode(chat(*messages))
    assert item.tokens == [*tokenizer("Lily\nthe dog")["input_ids"], tokenizer.eos_token_id]
    assert shown(template, item).endswith("Lily\n⟦the dog</s>⟧")


def test_several_turns_are_not_read_raw() -> None:
    for messages in (TURNS, (Message("system", "x"), *TURNS[:2])):
        with pytest.raises(DataError, match=r"no chat template.*chatml, plain .*raw .*FILE"):
            of(bare()).encode(chat(*messages))
    with pytest.raises(DataError, match="a prompt and its completion are all that is read raw"):
        of(bare(), chat_template="raw").encode(chat(*TURNS))
    with pytest.raises(DataError, match=r"data\.fold_system: true"):
        of(bare(), chat_template="raw").encode(chat(Message("system", "x"), *TURNS[:2]))
    template = of(bare())
    template.encode(chat(*TURNS[:2]))
    with pytest.raises(DataError, match="all that is read raw"):
        template.prompt_ids(TURNS[:3])


def test_the_first_survey_settles_whether_rows_are_read_raw() -> None:
    template = of(bare())
    template.survey([chat(*TURNS), chat(*TURNS[:2])])
    with pytest.raises(DataError, match="no chat template"):
        template.encode(chat(*TURNS[:2]))
    template = of(bare())
    template.survey([text("a")])
    template.survey([chat(*TURNS[:2])])
    assert template.encode(chat(*TURNS[:2]))


def test_a_chat_template_goes_before_raw_reading() -> None:
    template = of(build_tokenizer("smollm2"))
    template.encode(chat(*TURNS[:2]))
    assert template.reading == ""
    with pytest.raises(DataError, match=r"data\.separator .*set data\.chat_template: raw, or leave"):
        of(build_tokenizer("smollm2"), separator="\n")
    assert of(build_tokenizer("smollm2"), chat_template="raw", separator="\n").reading.endswith(r"separator '\n'")
    only_text = of(bare())
    only_text.encode(text("Hi"))
    assert only_text.jinja is None


def test_a_prompt_that_spells_special_tokens_raw() -> None:
    tokenizer = bare()
    template = of(tokenizer)
    (item,) = template.encode(chat(user("a</s>"), said("b</s>")))
    assert item.tokens.count(tokenizer.eos_token_id) == 1
    template = of(tokenizer, split_special_tokens=False)
    (item,) = template.encode(chat(user("<s>a"), said("b</s>")))
    assert tokenizer.decode(item.tokens) == "<s>ab</s>"
    assert item.tokens.count(tokenizer.eos_token_id) == item.tokens.count(tokenizer.bos_token_id) == 1


def test_all_options_reach_the_template() -> None:
    template = of(build_tokenizer("gemma"), merge_turns=True, fold_system=True, thinking="inline", lost_text="allow")
    messages = (Message("system", "s"), user("a"), user("b"), said("c", thinking="t"))
    assert "s\n\na\n\nb" in template.tokenizer.decode(template.prompt_ids(messages[:3]))
    assert learned(template, *messages) == ["<think>\nt\n</think>\n\nc<end_of_turn>"]
    assert of(build_tokenizer("mistral"), chat_template=R1_OPENS).jinja == R1_OPENS


def test_of_a_tokenizers_several_templates_tools_take_theirs() -> None:
    plain = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tools = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}" + plain
    own = build_tokenizer("mistral", template={"default": plain + "\n", "tool_use": tools + "\n"})
    renderer = ChatTemplate(own).renderer
    assert renderer.render([Message("user", "x")], None, False) == "<s><user>x"
    tool = {"type": "function", "function": {"name": "sky", "parameters": {}}}
    assert renderer.render([Message("user", "x")], [tool], False) == "[sky]<s><user>x"
    for taken in (None, [tool]):
        asked = own.apply_chat_template([{"role": "user", "content": "x"}], tools=taken, tokenize=False)
        assert renderer.render([Message("user", "x")], taken, False) == asked
