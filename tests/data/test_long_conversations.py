"""Long conversations are tokenized in pieces, whose ids are those of the whole."""

from typing import Any

import pytest
from family_tokenizers import FAMILIES, build_tokenizer, sentencepiece_tokenizer
from learned_text import chat, check_prompts, said, user
from thinking_templates import R1_OPENS

from topwork.data.chat.markup import Tokens
from topwork.data.chat.spans import Pieces
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message

WORDS = ["Hello", " there\n", "  é", "\n\n", "Yes.", " 12", "<|im_end|>"]


def turns(count: int) -> list[Message]:
    say = lambda number: "".join(WORDS[(number * 7 + at * 3) % len(WORDS)] for at in range(4)).strip() + str(number)  # noqa: E731
    return [said(say(n)) if n % 2 else user(say(n)) for n in range(count)]


def whole(template: ChatTemplate) -> ChatTemplate:
    template.renderer.tokens.never_join()
    return template


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", [True, False])
def test_pieces_make_the_ids_of_the_whole(family: str, words: bool) -> None:
    tokenizer = build_tokenizer(family, words=words)
    pieced, wholly = ChatTemplate(tokenizer), whole(ChatTemplate(tokenizer))
    for messages in (turns(2), turns(24)):
        assert pieced.encode(chat(*messages)) == wholly.encode(chat(*messages))
        assert pieced.encode(chat(*messages), "all") == wholly.encode(chat(*messages), "all")
        weighted = [Message(m.role, m.content, n % 3 / 2) for n, m in enumerate(messages)]
        assert pieced.encode(chat(*weighted), "all") == wholly.encode(chat(*weighted), "all")
    check_prompts(pieced, *turns(24))


def test_no_text_is_tokenized_twice() -> None:
    """What is tokenized grows with the conversation, not with its square."""
    template = ChatTemplate(build_tokenizer("smollm2"))
    template.renderer.closing  # noqa: B018

    def letters(count: int) -> int:
        plan = template._plan(chat(*turns(count)), "answers", False)
        return sum(len(piece.text) for part in plan.parts for piece in (part.prompt, part.through))  # type: ignore[union-attr]

    assert letters(200) < 2.3 * letters(100)
    rendered = template.renderer.render(turns(200), None, False)
    assert letters(200) < 2 * len(rendered)


def test_pieces_that_do_not_make_the_whole_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer for which a special token cuts nothing off: found by comparing, and every text is read whole."""
    tokenizer = build_tokenizer("smollm2")
    messages = (user("Hi"), said("Yes."), user("Bye"), said("No."))
    wanted = whole(ChatTemplate(tokenizer)).encode(chat(*messages))
    plain = Tokens._plain

    def odd(self: Tokens, texts: Any) -> Any:  # the first token of a text is another one
        return [[*ids[:1], tokenizer.eos_token_id, *ids[1:]] for ids in plain(self, texts)]

    monkeypatch.setattr(Tokens, "_plain", odd)
    template = ChatTemplate(tokenizer)
    found = template.encode(chat(*messages))
    assert [item.tokens for item in found] != [item.tokens for item in wanted]
    assert found == whole(ChatTemplate(tokenizer)).encode(chat(*messages))


LOOKS = """{{ bos_token }}{% for m in messages %}{{ m.role }}:BODY{% endfor %}AFTER
{%- if add_generation_prompt %}assistant:{% endif %}"""


@pytest.mark.parametrize(
    ("body", "after", "possible"),
    [
        ("{{ m.content }}", "", True),
        ("{{ m.content }}{% if loop.first or loop.index0 % 2 %}!{% endif %}", "{{ eos_token }}", True),
        ("{{ m['content'] }}{{ messages[0].role }}", "{% if messages[0]['role'] == 'user' %}.{% endif %}", True),
        ("{% set a = m.content %}{{ a }}{% if loop['index'] > 3 %}{% continue %}{% endif %}", "", True),
        ("{{ m.content }}{% if loop.last %}!{% endif %}", "", False),
        ("{{ m.content }}{{ loop.length }}", "", False),
        ("{{ m.content }}{% if add_generation_prompt %}!{% endif %}", "", False),
        ("{{ m.content }}{{ loop['revindex'] }}", "", False),
        ("{{ m.content }}{% if loop.nextitem is defined %}!{% endif %}", "", False),
        ("{{ m.content }}{% if loop.index == messages | length %}!{% endif %}", "", False),
        ("{{ m.content }}{{ messages[-1].role }}", "", False),
        ("{{ m.content }}{{ messages[loop.index0].role }}", "", False),
        ("{{ m.content }}", "{{ messages[1:] | length }}", False),
        ("{{ m.content }}", "{% for m in messages %}{{ m.role }}{% endfor %}", False),
        ("{% set ns.a = m.role %}{{ m.content }}", "{{ ns.a }}", False),
        ("{{ m.content }}{% set other = loop %}{{ other.last }}", "", False),
    ],
)
def test_all_beginnings_by_one_rendering(body: str, after: str, possible: bool) -> None:
    """Templates that look neither ahead nor at the number of messages; what is written is what each would be alone."""
    for head in ("", "{% set ns = namespace(a='') %}", "{% set ns = namespace(a='') %}{% set them = messages %}"):
        jinja = head + LOOKS.replace("BODY", body).replace("AFTER", after)
        if "them" in head:
            jinja = jinja.replace("for m in messages %}{{ m.role }}:", "for m in them %}{{ m.role }}:")
        renderer = ChatTemplate(build_tokenizer("mistral"), jinja).renderer
        assert renderer._beginnings.possible is possible
        messages = turns(6)
        found = renderer.whole(messages, None)
        if "continue" in body or not possible:  # a mark is amiss
            assert found is None
            continue
        assert found is not None
        for count in range(1, 7):
            for prompt in (True, False):
                assert found.beginning(count, prompt) == renderer.render(messages[:count], None, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rendering_learns_what_many_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(family)
    found = ChatTemplate(tokenizer).encode(chat(*turns(20)))
    monkeypatch.setattr("topwork.data.chat.rendering.Renderer.whole", lambda *_: None)
    assert found == ChatTemplate(tokenizer).encode(chat(*turns(20)))


def test_a_long_conversation_is_rendered_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(build_tokenizer("smollm2"))
    template.encode(chat(*turns(6)))
    rendered: list[int] = []
    render = template.renderer.render

    def counted(messages: Any, *rest: Any) -> str:
        rendered.append(len(messages))
        return render(messages, *rest)

    monkeypatch.setattr(template.renderer, "render", counted)
    template.encode(chat(*turns(200)))
    assert sum(rendered) < 3 * 200


def test_where_texts_are_cut() -> None:
    tokens = ChatTemplate(build_tokenizer("smollm2")).renderer.tokens
    pieces = Pieces(tokens)
    first = pieces.after("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert not first.joins
    second = pieces.after("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>")
    assert (second.text, second.joins) == ("<|im_start|>assistant\nYes<|im_end|>", True)
    third = pieces.after("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>")
    assert (third.text, third.joins) == ("<|im_end|>\n<|im_start|>", True)
    assert not pieces.after("something else<|im_end|>").joins
    assert not pieces.after("and else").joins


def test_tokenizers_that_put_a_space_at_a_texts_head() -> None:
    tokenizer = sentencepiece_tokenizer()
    for jinja in (R1_OPENS, "plain"):
        messages = [said(f"a</think>b{n}") if n % 2 else user(f"c {n}") for n in range(12)]
        pieced, wholly = ChatTemplate(tokenizer, jinja), whole(ChatTemplate(tokenizer, jinja))
        assert pieced.encode(chat(*messages)) == wholly.encode(chat(*messages))
