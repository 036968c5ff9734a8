"""What lint says of tokens, lengths, templates and amounts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.family_tokenizers import TEMPLATES, build_tokenizer, sentencepiece_tokenizer
from plan.lint.linted import CONTEXT, Linted, clean_rows, pair
from topwork.common.errors import DataError
from topwork.data.examples import load_data
from topwork.plan.lint.examined import Examined

Lint = Callable[..., Linted]
Read = Callable[..., Examined]
OWN = (TEMPLATES / "smollm2.jinja").read_text("utf-8")


@pytest.fixture
def unlearned(read: Read) -> Callable[[Callable[[np.ndarray], Any], tuple[int, ...]], Linted]:
    """unlearned(which, rows): the clean rows, of whose learned tokens some are not learned."""

    def of(which: Callable[[np.ndarray], Any], rows: tuple[int, ...]) -> Linted:
        examined = read()
        found = examined.train.sequences
        weights = found.weights.copy()
        for row in rows:
            at = np.flatnonzero(found.learned[found.bounds[row] : found.bounds[row + 1]]) + found.bounds[row]
            weights[which(at)] = 0.0
        changed = replace(examined.train, sequences=replace(found, weights=weights))
        return Linted(replace(examined, train=changed))

    return of


def test_an_end_of_turn_that_is_not_learned(unlearned: Callable[..., Linted]) -> None:
    finding = unlearned(lambda at: at[-1:], (3, 8)).of("end-of-turn")
    assert (finding.severity, finding.rows) == ("error", ("train.jsonl:4", "train.jsonl:9"))


def test_an_answer_of_which_only_the_end_is_learned(unlearned: Callable[..., Linted]) -> None:
    finding = unlearned(lambda at: at[:-1], (3,)).of("nothing-learned")
    assert (finding.severity, finding.rows) == ("warning", ("train.jsonl:4",))


def test_text_that_is_in_no_learned_token(unlearned: Callable[..., Linted]) -> None:
    finding = unlearned(lambda at: at[2:5], (3, 59)).of("content-lost")
    assert (finding.severity, finding.rows) == ("error", ("train.jsonl:4", "train.jsonl:60"))


def test_text_beside_a_call_that_the_template_does_not_show(lint: Lint) -> None:
    calls = "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    shows_calls = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + calls + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": "Let me look.", "tool_calls": [{"name": "look", "arguments": {}}]}
    row = {"messages": [*clean_rows()[5]["messages"][:2], call]}
    found = lint({5: row}, tokenizer=build_tokenizer("smollm2", shows_calls))
    assert found.grave == [("error", "content-lost")]
    assert found.of("content-lost").rows == ("train.jsonl:6",)


def test_a_tokenizer_without_an_end_is_told_and_the_rest_is_checked(lint: Lint) -> None:
    tokenizer = build_tokenizer(
        "no_end", "{% for m in messages %}{{ m.content }}\n{% endfor %}", eos_token=None, pad_token=None
    )
    found = lint({7: clean_rows()[2]}, tokenizer=tokenizer)
    assert "no token" in found.of("template-refuses").message or "neither" in found.of("template-refuses").message
    assert found.of("duplicates").rows == ("train.jsonl:8",)


def test_two_bos(lint: Lint) -> None:
    twice = "{{ bos_token }}{{ bos_token }}" + (TEMPLATES / "llama3.jinja").read_text("utf-8").replace(
        "bos_token", "''"
    )
    finding = lint(tokenizer=build_tokenizer("llama3", twice)).of("double-bos")
    assert (finding.severity, finding.count) == ("error", 60)
    assert "<|begin_of_text|>" in finding.message


def test_no_bos_where_the_tokenizer_puts_one(lint: Lint) -> None:
    without = (TEMPLATES / "llama3.jinja").read_text("utf-8").replace("bos_token", "''")
    found = lint(tokenizer=build_tokenizer("llama3", without, adds_bos=True))
    assert found.of("missing-bos").count == 60
    whole = lint(tokenizer=build_tokenizer("llama3", adds_bos=True))
    assert "missing-bos" not in {finding.rule for finding in whole.findings}


def test_a_pad_token_that_ends_turns_is_a_notice_that_says_why(lint: Lint) -> None:
    finding = lint().of("pad-is-end-of-turn")
    assert finding.severity == "notice"
    assert "no padding" in finding.message
    other = lint(tokenizer=build_tokenizer("smollm2", pad_token="<|endoftext|>"))
    assert "pad-is-end-of-turn" not in {each.rule for each in other.findings}


def test_turns_that_end_in_another_token_than_the_eos(lint: Lint) -> None:
    rows = [{"messages": row["messages"][1:]} for row in clean_rows()]
    finding = lint(rows, tokenizer=build_tokenizer("gemma")).of("end-of-turn-is-not-eos")
    assert finding.severity == "notice"
    assert "answers end in <end_of_turn>" in finding.message


# Lengths


def long_row(words: int) -> dict[str, Any]:
    return pair("Tell me all of number 5.", "word " * words + "end")


@pytest.mark.parametrize(
    ("way", "severity"),
    [
        ("refuse", "error"),
        ("truncate", "warning"),
        ("drop", "warning"),
        ("oldest_turns", "notice"),
        ("middle", "notice"),
    ],
)
def test_sequences_that_do_not_fit_and_by_how_much(lint: Lint, read: Read, way: str, severity: str) -> None:
    whole = read({5: long_row(30), 9: long_row(40)})
    lengths = whole.train.sequences.lengths[[5, 9]].tolist()
    finding = lint({5: long_row(30), 9: long_row(40)}, too_long=way, max_length=min(lengths) - 1).of("truncation")
    assert (finding.severity, finding.rows) == (severity, ("train.jsonl:6", "train.jsonl:10"))
    assert f"train.jsonl:10 has {max(lengths)}" in finding.message
    assert f"by {max(lengths) - min(lengths) + 1} at most" in finding.message


def test_how_much_cutting_loses(lint: Lint, read: Read) -> None:
    whole = read({5: long_row(40)})
    length = int(whole.train.sequences.lengths[5])
    finding = lint({5: long_row(40)}, too_long="truncate", max_length=length - 7).of("truncation")
    assert f"loses 7 of {int(whole.train.sequences.learned.sum()):,} learned tokens" in finding.message


def test_text_that_is_cut_in_pieces_is_a_notice(lint: Lint) -> None:
    rows = [{"text": f"A story of {number} words. " * (1 + 30 * (number == 4))} for number in range(8)]
    finding = lint(rows, too_long="split", max_length=200).of("truncation")
    assert (finding.severity, finding.rows) == ("notice", ("train.jsonl:5",))


def test_a_row_unlike_all_others(lint: Lint) -> None:
    finding = lint({5: long_row(200)}, count=120, max_length=4000).of("length-outliers")
    assert finding.rows == ("train.jsonl:6",)


# Templates


def test_a_template_that_is_the_bases_own_gives_nothing(lint: Lint, tmp_path: Path) -> None:
    same = tmp_path / "same.jinja"
    same.write_text(OWN, "utf-8")
    assert {each.rule for each in lint(chat_template=str(same)).findings} == {"pad-is-end-of-turn"}


@pytest.mark.parametrize(
    ("own", "used"),
    [("<|im_start|>'", "<|im_start|> '"), ("<|im_end|>' + '\n'", "<|im_end|>' + ' '"), ("assistant\n", "asistant\n")],
)
def test_a_template_altered_by_one_character_is_told(lint: Lint, tmp_path: Path, own: str, used: str) -> None:
    altered = tmp_path / "altered.jinja"
    assert own in OWN
    altered.write_text(OWN.replace(own, used, 1), "utf-8")
    finding = lint(chat_template=str(altered)).of("template-altered")
    assert finding.severity == "warning"
    assert "altered at line " in finding.message
    assert "it writes otherwise" in finding.message


def test_an_alteration_that_writes_the_same_is_a_notice(lint: Lint, tmp_path: Path) -> None:
    altered = tmp_path / "altered.jinja"
    altered.write_text(OWN + "{# ours #}", "utf-8")
    assert lint(chat_template=str(altered)).of("template-altered").severity == "notice"


def test_another_template_is_a_notice(lint: Lint) -> None:
    assert lint(chat_template="plain").of("template-not-own").severity == "notice"


def test_a_system_message_that_the_template_brings(lint: Lint) -> None:
    rows = {5: {"messages": clean_rows()[5]["messages"][1:]}, 8: {"messages": clean_rows()[8]["messages"][1:]}}
    finding = lint(rows).of("template-inserts-system")
    assert finding.rows == ("train.jsonl:6", "train.jsonl:9")
    assert "You are a helpful AI assistant named SmolLM" in finding.message


def test_marks_that_the_vocabulary_lacks(lint: Lint) -> None:
    rows = [{"messages": row["messages"][1:]} for row in clean_rows()]
    found = lint(rows, tokenizer=sentencepiece_tokenizer(), chat_template="chatml")
    assert "<|im_start|>, <|im_end|>" in found.of("template-marks-no-tokens").message
    assert found.grave == []


# Amounts


def test_too_few_rows_for_the_rank(lint: Lint, read: Read) -> None:
    learned = int(read().train.sequences.learned.sum())
    finding = lint(trainable=learned * 4000, recipe={"adapter": {"r": 16}}).of("few-rows-for-the-rank")
    assert finding.severity == "notice"
    assert "4,000 for each" in finding.message
    assert finding.remedy.startswith("adapter.r: 4 ")
    enough = lint(trainable=learned * 900)
    assert "few-rows-for-the-rank" not in {each.rule for each in enough.findings}


def test_few_rows_and_few_steps(lint: Lint) -> None:
    found = lint(count=12)
    assert found.of("few-rows").count == 12
    assert found.of("few-steps").count == 3


# What reading and rendering tell themselves


def test_what_was_changed_on_the_way_is_told_by_kind(read: Read) -> None:
    examined = read()
    notes = [("train.jsonl:3", "a user turn at the end is cut"), ("train.jsonl:9", "a user turn at the end is cut")]
    found = Linted(replace(examined, train=replace(examined.train, notes=notes)))
    finding = found.of("changed-rows")
    assert (finding.severity, finding.rows) == ("notice", ("train.jsonl:3", "train.jsonl:9"))
    assert "a user turn at the end is cut" in finding.message


def test_what_reading_warns_of_is_a_warning(read: Read) -> None:
    examined = read()
    remarks = ("12 files are read", "warning: a.jsonl and a.csv have one name")
    found = Linted(replace(examined, train=replace(examined.train, remarks=remarks)))
    assert found.grave == [("warning", "file-warnings")]
    assert found.of("file-warnings").message == "a.jsonl and a.csv have one name"


def test_thinking_that_the_prompt_opens_is_not_lost(lint: Lint) -> None:
    opens = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    row = pair("Is it number 5?", "<think>\nSix, or five?\n</think>\nIt is.")
    found = lint([row] * 12, tokenizer=build_tokenizer("smollm2", opens))
    assert "content-lost" not in {finding.rule for finding in found.findings}


def test_streamed_data_say_how_much_was_looked_at(read: Read) -> None:
    found = Linted(replace(read(), only_first=100_000))
    assert "first 100,000 rows" in found.of("not-all-rows").message


def test_the_limit_is_what_training_has(read: Read) -> None:
    assert read(max_length=4000).limit == CONTEXT


@pytest.mark.parametrize("options", [{}, {"train_on": "last_answer"}, {"train_on": "all"}, {"chat_template": "chatml"}])
def test_lint_looks_at_what_training_learns(read: Read, options: dict[str, Any]) -> None:
    talk = {"messages": [*clean_rows()[5]["messages"], *clean_rows()[6]["messages"][1:]]}
    examined = read({5: talk, 9: pair("Is it there?", "")}, on_bad_row="drop", eval_fraction=0.0, **options)
    data = load_data(examined.recipe.data, examined.tokenizer, CONTEXT, 0, lambda _: None)
    found = examined.train.sequences
    assert len(found) == len(data.train) == 59
    for number, example in enumerate(data.train):
        at = slice(found.bounds[number], found.bounds[number + 1])
        assert found.tokens[at].tolist() == example.tokens.tolist()
        assert found.weights[at].tolist() == example.weights.tolist()
        assert examined.train.conversations[found.rows[number]].source == example.source


def test_whether_text_brings_its_markup_is_what_the_training_rows_say(read: Read) -> None:
    """In training and here, whatever the rows say that validate."""
    marked = [{"text": f"<|im_start|>user\nWhere is {n}?<|im_end|>"} for n in range(12)]
    examined = read(marked, eval=[{"text": "Here is 40."}, {"text": "Here is <|im_end|>"}])
    data = load_data(examined.recipe.data, examined.tokenizer, CONTEXT, 0, lambda _: None)
    for side, rows in ((examined.train, data.train), (examined.eval, data.eval)):
        assert side is not None
        assert side.sequences.tokens.tolist() == [token for row in rows for token in row.tokens.tolist()]


@pytest.mark.parametrize(("way", "left"), [("drop", "nothing is left"), ("truncate", "so nothing is left")])
def test_nothing_that_is_left_to_train_on_is_an_error(lint: Lint, way: str, left: str) -> None:
    found = lint(too_long=way, max_length=3)
    assert (found.of("truncation").severity, left in found.of("truncation").message) == ("error", True)
    config = found.examined.recipe.data
    with pytest.raises(DataError, match="no row is left to train on"):
        load_data(config, found.examined.tokenizer, CONTEXT, 0, lambda _: None)


def test_plain_text_that_would_be_shortened_as_a_talk_is_an_error(lint: Lint) -> None:
    found = lint([{"text": f"A long text, number {n}."} for n in range(30)], too_long="middle", max_length=4)
    assert found.of("truncation").severity == "error"


def test_who_refuses_a_row_is_told(lint: Lint) -> None:
    assert (
        "(evaluation refuses them)"
        in lint(test=[pair("Is it?", ""), pair("Where is it?", "Here.")]).of("empty-rows").message
    )
