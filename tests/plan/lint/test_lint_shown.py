"""Rows as lint shows them: every letter stands at its own token."""

from collections.abc import Callable

from data.family_tokenizers import sentencepiece_tokenizer
from topwork.plan.lint.examined import Examined
from topwork.plan.lint.shown import shown_rows


def test_letters_that_are_bytes_stand_on_their_side_of_the_mark(read: Callable[..., Examined]) -> None:
    rows = [{"prompt": "The cat 🐱\n", "completion": "é sat\n"}]
    examined = read(rows, tokenizer=sentencepiece_tokenizer(), chat_template="raw", separator="\n", eval_fraction=0)
    (row,) = shown_rows(examined, 1)
    assert row.marked == "<s> The cat 🐱\n\n⟦é sat\n</s>⟧"
    assert "".join(piece.text for piece in row.pieces if piece.weight) == "é sat\n</s>"
    assert [piece.text for piece in row.pieces][-2:] == ["\n", "</s>"]


def test_bytes_that_are_no_letter_are_shown_as_such(read: Callable[..., Examined]) -> None:
    rows = [{"prompt": "The cat", "completion": "a\ufffdb 🐱"}]
    examined = read(rows, tokenizer=sentencepiece_tokenizer(), chat_template="raw", eval_fraction=0)
    (row,) = shown_rows(examined, 1)
    assert row.marked.endswith("⟦a\ufffdb 🐱</s>⟧")
