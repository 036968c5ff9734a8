"""Plain text that holds conversations: what follows one string, until another, is learned, to the token."""

from typing import Any

import pytest
from family_tokenizers import build_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_text import chat, said, shown, text, user

from topwork.common.errors import DataError
from topwork.data.chat.spans import learned_parts
from topwork.data.chat.template import ChatTemplate, Reading
from topwork.data.chat.turns import LETTERS

ANSWER, ASK = "### Assistant:", "### Human:"


def made(tokenizer: Any, response: str = ANSWER, instruction: str | None = ASK) -> ChatTemplate:
    return ChatTemplate(tokenizer, None, False, Reading(response_part=response, instruction_part=instruction))


def test_only_the_answers_are_learned() -> None:
    template = made(build_tokenizer("mistral", adds_bos=True))
    assert template.reading == "of plain text, only what follows '### Assistant:' until '### Human:' is learned"
    (item,) = template.encode(text("### Human: say 0### Assistant: 0### Human: again### Assistant: 0 0"))
    assert shown(template, item) == ("<s>### Human: say 0### Assistant:⟦ 0⟧### Human: again### Assistant:⟦ 0 0</s>⟧")


def test_the_end_is_learned_with_the_last_answer_alone() -> None:
    template = made(build_tokenizer("mistral"))
    (item,) = template.encode(text("### Human: a### Assistant: b### Human: and then"))
    assert shown(template, item) == "### Human: a### Assistant:⟦ b⟧### Human: and then</s>"


def test_a_token_across_the_boundary_belongs_to_the_prompt() -> None:
    """With the space in the marker, " Hi" is one token of which the prompt has the space."""
    template = made(build_tokenizer("mistral"), "### Assistant: ", "### Human: ")
    tokenizer = template.tokenizer
    row = "### Human: a### Assistant: Hi there"
    assert "ĠHi" in tokenizer.tokenize(row)
    (item,) = template.encode(text(row))
    assert item.tokens == [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]
    assert shown(template, item) == "### Human: a### Assistant: Hi⟦ there</s>⟧"


SAID = st.text(st.sampled_from("Hi there\n é"), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3),
    kind=st.sampled_from(["words", "merging", "sentencepiece"]),
)
def test_learned_letters_are_the_answers(turns: list[tuple[str, str]], kind: str) -> None:
    """The ids are those of the whole text, and what is learned is the answers, less a token across their edges."""
    tokenizer = (
        sentencepiece_tokenizer() if kind == "sentencepiece" else build_tokenizer("mistral", words=kind == "words")
    )
    turns = [(asked, answer) for asked, answer in turns if answer.strip()]
    if not turns:
        return
    whole = "".join(f"[Q]{asked}[A]{answer}" for asked, answer in turns)
    template = made(tokenizer, "[A]", "[Q]")
    (item,) = template.encode(text(whole))
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    head = [tokenizer.bos_token_id] if template.renderer.adds_bos else []
    assert item.tokens == [*head, *ids, tokenizer.eos_token_id]
    places = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    spans = learned_parts(whole, "[A]", "[Q]")
    inside = [any(a <= start and end <= b for a, b in spans) for start, end in places]
    wrong = [n for n, (weight, each) in enumerate(zip(item.weights[len(head) :], inside)) if bool(weight) != each]
    # the tokenizer's own places leave out white space at a token's head, so only such tokens may differ
    assert all(tokenizer.convert_ids_to_tokens(ids[n])[:1] in ("Ġ", "Ċ", "▁") for n in wrong)


def test_text_with_nothing_to_learn() -> None:
    template = made(build_tokenizer("mistral"))
    for row in ("### Human: a", "no markers", "### Human: a### Assistant:  \n"):
        with pytest.raises(DataError, match=r"nothing to learn: .*'### Assistant:' \(data.response_part\)"):
            template.encode(text(row))
    alone = made(build_tokenizer("mistral"), ANSWER, None)
    (item,) = alone.encode(text("Q a ### Assistant: b"))
    assert shown(alone, item) == "Q a ### Assistant:⟦ b</s>⟧"
    with pytest.raises(DataError, match=r"stands twice .* set data\.instruction_part"):
        alone.encode(text("### Human: a### Assistant: b### Human: c### Assistant: d"))


def test_marker_strings_are_for_plain_text() -> None:
    template = made(build_tokenizer("smollm2"))
    talk = chat(user("a"), said("b"))
    with pytest.raises(DataError, match=r"data\.response_part .*these rows are conversations.* leave it out"):
        template.encode(talk)
    with pytest.raises(DataError, match=r"these rows are conversations"):
        ChatTemplate(build_tokenizer("smollm2"), options=Reading(response_part="b", split_special_tokens=True)).encode(
            talk
        )
    found, _ = template.encode_all([text("### Assistant: b"), talk])
    assert [len(each) for each in found] == [1, 1]


def test_rendered_text_with_its_own_markup() -> None:
    """ChatML that was rendered elsewhere: the end of the turn is learned, since the next one begins after it."""
    template = made(build_tokenizer("smollm2"), "<|im_start|>assistant\n", "<|im_start|>user\n")
    row = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    ((item,),), _ = template.encode_all([text(row + row)])
    ask = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert shown(template, item) == f"{ask}⟦Yes<|im_end|>\n⟧{ask}⟦Yes<|im_end|>\n⟧"
    ((item,), _), _ = template.encode_all([text(row), text(row)])
    assert item.notes == ()
    letters = made(build_tokenizer("smollm2"), "<|im_start|>assistant\n", "<|im_start|>user\n")
    ((item,), _), _ = letters.encode_all([text(row), text(f"x {row} y", 2)])
    assert item.notes == (LETTERS,)
    assert shown(letters, item) == f"{ask}⟦Yes<|im_end|>\n<|im_end|>⟧"
    assert item.tokens.count(letters.tokenizer.eos_token_id) == 1


def test_text_that_only_ends_in_markup_brings_its_own() -> None:
    """What people write by hand: text + eos_token."""
    template = ChatTemplate(build_tokenizer("smollm2"))
    rows = [text("Hi.<|im_end|>"), text("Bye.<|im_end|>\n", 2)]
    (first, second), _ = template.encode_all(rows)
    end = template.tokenizer.eos_token_id
    assert [each.tokens.count(end) for (each,) in (first, second)] == [1, 1]
    assert template.reading == "plain text brings its own markup: special tokens that it spells are these tokens"
    letters = ChatTemplate(build_tokenizer("smollm2"))
    letters.encode_all([*rows, text("No end", 3)])
    assert letters.reading == ""
