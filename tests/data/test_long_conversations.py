"""Long conversations are tokenized in pieces, whose ids are those of the whole."""

from typing import Any

import pytest
from family_tokenizers import FAMILIES, build_tokenizer, sentencepiece_tokenizer
from learned_text import chat, check_prompts, said, user
from thinking_templates import R1_OPENS

from topwork.data.conversations import Message
from topwork.data.markup import Tokens
from topwork.data.spans import Pieces
from topwork.data.template import ChatTemplate

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
