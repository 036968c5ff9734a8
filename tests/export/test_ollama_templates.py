"""TEMPLATEs for Ollama: what is written renders in Go as the chat template does, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.family_tokenizers import TEMPLATES, build_tokenizer
from topwork.common.errors import RequestError
from topwork.data.chat.rendering import Renderer
from topwork.data.conversations import Message
from topwork.export.ollama.evaluator import GoError, form_text, ollama_text
from topwork.export.ollama.form import Around, TemplateForm, compare, talk, template_form
from topwork.export.ollama.go_template import go_string, go_template

BY_GO = json.loads((Path(__file__).parent / "go_templates.json").read_text("utf-8"))
"""What Go's own text/template makes of TEMPLATEs that are written here (tools/go_templates.go)."""
ODD = TemplateForm(
    begin="\u200b{{x}}\r\n", default="", system=Around('"""é😀\u200d', "\\"), joined=True, anywhere=False,
    user=Around("{", "}"), assistant=Around("}}", "\x07"), prompt="{{",
)  # fmt: skip
THOUGHT_AWAY = ("qwen3", "r1", "r1_old")
"""Templates that take the thinking out of earlier answers."""
NO_SYSTEM = ("gemma", "mistral", "mistral_tools", "mistral_v3", "r1_tools")
"""Templates that take no system message, or put it into another turn."""


def renderer(name: str) -> Renderer:
    """A shipped form of template, with SmolLM2's special tokens."""
    return Renderer(build_tokenizer("smollm2", None), (TEMPLATES / f"{name}.jinja").read_text("utf-8"))


def messages(case: dict[str, Any]) -> list[Message]:
    """A fixture's conversation."""
    return [Message(each["role"], each["content"]) for each in case["messages"]]


@pytest.mark.parametrize("case", BY_GO, ids=range(len(BY_GO)))
def test_our_evaluator_is_go(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(GoError, match="slice"):
            ollama_text(case["template"], messages(case))
    else:
        assert ollama_text(case["template"], messages(case)) == case["text"]


@pytest.mark.parametrize("name", ["smollm2", "llama2", "gemma", "llama3", "vicuna", "odd"])
def test_go_has_rendered_what_is_written_today(name: str) -> None:
    form = ODD if name == "odd" else template_form(renderer(name), form_text)
    assert go_template(form) in {case["template"] for case in BY_GO}


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_every_template_is_rendered_alike_or_refused(path: Path) -> None:
    ours = renderer(path.stem)
    if path.stem in THOUGHT_AWAY:
        with pytest.raises(RequestError, match="takes the thinking out of earlier answers"):
            template_form(ours, form_text)
        return
    form = template_form(ours, form_text)
    template, turns = go_template(form), ["Where is {it}?", 'In "B".', "And then?", "C", "Thanks!"]
    chats = [talk(*turns[:1]), talk(*turns[:3]), talk(*turns)]
    if path.stem not in NO_SYSTEM:
        chats += [talk(*turns[:1], system="Be brief."), talk(*turns, system="Be brief.")]
    for chat in chats:
        assert ollama_text(template, chat) == ours.render(chat, None, True)
    if path.stem in NO_SYSTEM:
        with pytest.raises(GoError, match="no system message"):
            ollama_text(template, talk("a", system="b"))


def test_a_default_system_message_is_written_only_where_there_is_none() -> None:
    ours = renderer("smollm2")
    form = template_form(ours, form_text)
    assert "named SmolLM" in form.default
    assert form.anywhere
    for chat in (talk("a"), talk("a", system=""), [*talk("a", "b"), *talk("c", system="later")]):
        assert form_text(form, chat) == ours.render(chat, None, True)


def test_an_answer_that_is_begun_is_left_open() -> None:
    ours = renderer("smollm2")
    form = template_form(ours, form_text)
    assert form_text(form, talk("a", "I thi")) == ours.render(talk("a", "I thi"), None, False, goes_on=True)


def test_a_system_message_in_the_middle_is_refused_where_the_template_has_no_such_turn() -> None:
    form = template_form(renderer("llama2"), form_text)
    assert form.joined
    with pytest.raises(GoError, match="can only stand first"):
        ollama_text(go_template(form), [*talk("a", "b"), *talk("c", system="later")])


def test_tool_results_are_refused() -> None:
    form = template_form(renderer("smollm2"), form_text)
    with pytest.raises(GoError, match="system, user and assistant messages only"):
        ollama_text(go_template(form), [*talk("a"), Message("tool", "b")])


def test_a_template_that_counts_turns_is_refused() -> None:
    jinja = "{% for m in messages %}[{{ loop.index }} {{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    with pytest.raises(RequestError, match="would write turns of user and assistant otherwise"):
        template_form(Renderer(build_tokenizer("smollm2", None), jinja), form_text)


def test_a_template_that_drops_turns_is_refused() -> None:
    jinja = "{{ messages[-1].content }}[answer]"
    with pytest.raises(RequestError, match=r"no fixed text around each message .*left out"):
        template_form(Renderer(build_tokenizer("smollm2", None), jinja), form_text)


def test_conversations_of_the_users_own_are_compared() -> None:
    jinja = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('4711', 'ORDER') }}[end]{% endfor %}[assistant]"
    )
    ours = Renderer(build_tokenizer("smollm2", None), jinja)
    form = template_form(ours, form_text)
    assert compare(ours, form, form_text, [talk("a", "b", "c")]) == 1
    with pytest.raises(RequestError, match=r"otherwise than the chat template does: '4711.* where that has 'ORDER"):
        compare(ours, form, form_text, [talk("about 4711")])


def test_the_day_is_the_one_that_training_was_told() -> None:
    jinja = "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    form = template_form(Renderer(build_tokenizer("smollm2", None), jinja), form_text)
    assert "26 Jul 2024" in go_template(form)


@pytest.mark.parametrize(
    "template", ["{{- .Content }}", "{{ if }}", "{{ end }}", "{{ .Nope }}", "{{ $x }}", "{{ if true", "{{ a | b }}"]
)
def test_what_the_evaluator_does_not_know_is_an_error(template: str) -> None:
    with pytest.raises(GoError):
        ollama_text(template, talk("a"))


def test_strings_are_escaped_in_ascii() -> None:
    assert go_string('a"\\\n\r\té😀') == '"a\\"\\\\\\n\\r\\t\\u00e9\\U0001f600"'


def test_system_messages_that_training_folded_are_folded() -> None:
    tokenizer = build_tokenizer("smollm2", None)
    ours = Renderer(tokenizer, (TEMPLATES / "smollm2.jinja").read_text("utf-8"), fold_system=True)
    form = template_form(ours, form_text)
    assert form.joined
    for chat in (talk("a", "b", "c"), talk("a", system="Be brief."), talk("a", "b", "c", system="Be brief.")):
        assert ollama_text(go_template(form), chat) == ours.render(chat, None, True)
