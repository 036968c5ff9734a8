"""Pairs, judged answers and prompts as examples: columns, groups, the tokens of generation, a recipe's whole data."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from preference_rows import JUDGED, PAIRS, PROMPTS
from torch import Tensor

from reference.families import randomise, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig, SourceConfig
from topwork.data.conversations import BadRow, Message
from topwork.data.examples import grouped
from topwork.data.preferences.examples import Coded, encode_judged, encode_pairs, prompt_ids
from topwork.data.preferences.load import PreferenceData, load_preferences
from topwork.data.preferences.reading import Judged, Pair, Prompt
from topwork.data.preferences.shapes import Kind
from topwork.data.source import FixedRows
from topwork.objectives.objective import Loss, NonlinearObjective
from topwork.ops.batch import Labels
from topwork.training.passes import step_passes
from topwork.training.step import Learner, StepResult, train_step
from training.test_dpo import Dpo

USER = Message("user", "Hi there")
TALK = (USER, Message("assistant", "Hello!"), Message("user", "Hi"))
YES, NO = (Message("assistant", "Yes."),), (Message("assistant", "No. No."),)


@pytest.fixture
def template(make_tokenizer: Callable[..., Any]) -> ChatTemplate:
    return ChatTemplate(make_tokenizer("qwen2_5"), "chatml")


def load(
    write: Callable[..., str], template: ChatTemplate, rows: list[dict[str, Any]], **options: Any
) -> PreferenceData:
    kind, context = options.pop("kind", None), options.pop("context", 512)
    path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=path, chat_template="chatml", **options)
    return load_preferences(config, template.tokenizer, context, 0, lambda _: None, kind)


def many(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Number {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}.", **more} for n in range(count)]


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "llama3", "gemma", "mistral_v3", "phi4"])
def test_a_pair_is_two_examples_of_one_group_that_learn_their_answers(
    family: str, make_tokenizer: Callable[..., Any]
) -> None:
    template = ChatTemplate(make_tokenizer(family))
    pairs = [Pair(TALK, YES, NO, "a:1", margin=2.0), Pair((USER,), NO, YES, "a:2", margin=0.5)]
    encoded = encode_pairs(template, pairs)
    assert not any(isinstance(one, BadRow) for one in encoded)
    examples = [example for one in encoded if not isinstance(one, BadRow) for example in one.examples]
    assert len({example.group for example in examples}) == 2
    assert examples[0].group == examples[1].group
    told = [("Yes.", 1, 2.0), ("No. No.", -1, 2.0), ("No. No.", 1, 0.5), ("Yes.", -1, 0.5)]
    for number, (example, (text, sign, margin)) in enumerate(zip(examples, told)):
        learned = np.flatnonzero(example.weights)
        asked = template.prompt_ids(pairs[number // 2].prompt)
        assert example.tokens[: learned[0]].tolist() == asked
        assert learned.tolist() == list(range(len(asked), len(example.tokens))), "the end of the turn is learned"
        assert set(example.weights[learned].tolist()) == {1.0}
        said = template.tokenizer.decode(example.tokens[learned])
        assert said.removeprefix("<think>\n\n</think>\n\n").lstrip().startswith(text)
        assert set(example.columns["chosen"].tolist()) == {sign}
        assert set(example.columns["margin"].tolist()) == {margin}
        assert example.source == pairs[number // 2].source


def test_a_margin_that_only_some_have_is_no_column(template: ChatTemplate) -> None:
    for one in encode_pairs(template, [Pair((USER,), YES, NO, "a", margin=1.0), Pair((USER,), NO, YES, "b")]):
        assert not isinstance(one, BadRow)
        assert [set(example.columns) for example in one.examples] == [{"chosen"}, {"chosen"}]


def test_answers_that_become_the_same_tokens_are_no_pair(make_tokenizer: Callable[..., Any]) -> None:
    template = ChatTemplate(make_tokenizer("gemma"))  # strips what is written
    pairs = [Pair((USER,), YES, (Message("assistant", "Yes. "),), "a:1"), Pair((USER,), YES, NO, "a:2")]
    bad, good = encode_pairs(template, pairs)
    assert bad == BadRow("a:1", "the chosen and the rejected answer become the same tokens")
    assert isinstance(good, Coded)


def test_an_answer_that_calls_a_tool_is_one_sequence(template: ChatTemplate) -> None:
    call = Message(
        "assistant", "", None, {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    )
    answer = (call, Message("tool", "4"), Message("assistant", "Yes."))
    (found,) = encode_pairs(template, [Pair((USER,), answer, NO, "a:1")])
    assert isinstance(found, Coded)
    example = found.examples[0]
    text = template.tokenizer.decode(example.tokens[example.weights > 0])
    assert text.endswith("Yes.<|im_end|>")
    assert '"name": "f"' in text
    assert "4" not in text


def test_a_judged_answer_has_its_label_as_a_column(template: ChatTemplate) -> None:
    encoded = encode_judged(template, [Judged(TALK, YES, True, "a:1"), Judged(TALK, NO, False, "a:2")])
    for one, (text, label) in zip(encoded, (("Yes.<|im_end|>", 1), ("No. No.<|im_end|>", -1))):
        assert isinstance(one, Coded)
        (example,) = one.examples
        assert set(example.columns["desirable"].tolist()) == {label}
        assert template.tokenizer.decode(example.tokens[example.weights > 0]) == text
        assert example.tokens[: np.flatnonzero(example.weights)[0]].tolist() == template.prompt_ids(TALK)
        assert example.group is None


def test_a_prompts_ids_are_those_of_generation(template: ChatTemplate) -> None:
    assert prompt_ids(template, Prompt(TALK, "a:1")) == template.prompt_ids(TALK)


@dataclass(frozen=True)
class Signed(NonlinearObjective):
    """DPO without a reference, by the column `chosen` in place of the order."""

    def __call__(self, logprobs: Tensor, labels: Labels) -> Loss:
        gains = labels.by_sequence(labels.column("chosen") * labels.loss_weights * logprobs).view(-1, 2).sum(1)
        return Loss(-F.logsigmoid(gains).sum(), len(gains), {"accuracy": (gains.detach() > 0).float().sum()})


@pytest.mark.parametrize("objective", [Dpo(0.5), Signed()], ids=["dpo", "signed"])
def test_objectives_learn_from_what_a_file_becomes(
    objective: NonlinearObjective, write: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    template = ChatTemplate(make_tokenizer("qwen2_5"), "chatml")
    data = load(write, template, many(6), eval_fraction=0.0)
    base = tiny_base(vocab_size=len(template.tokenizer), max_position_embeddings=512)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, lora_alpha=8))
    randomise(adapters, "a")
    parameters = list(adapters.parameters("a").values())
    learner = Learner("a", objective, parameters, torch.optim.Adam(parameters, lr=1e-2), 0.0)
    rows = FixedRows(data.train, 3, 0)
    assert rows.steps_per_epoch == 2
    results = []
    for step in range(24):
        passes = step_passes([("a", rows.examples(step))], data.longest(), base.device)
        assert len(passes) > 1
        results += train_step(base, [learner], passes)
    assert all(isinstance(result, StepResult) for result in results)
    assert results[-1].loss < 0.3 * results[0].loss
    assert results[-1].metrics["accuracy"] == results[-2].metrics["accuracy"] == 1.0


# A recipe's whole data


def test_rows_are_read_counted_and_held_out_with_all_of_their_prompt(
    write: Callable[..., str], template: ChatTemplate
) -> None:
    again = [{**row, "rejected": f"Worse {n}."} for n, row in enumerate(many(10))]
    data = load(write, template, [*many(10), *again], eval_fraction=0.2)
    assert data.kind == "preference"
    assert (len(data.train), len(data.eval)) == (32, 8)
    assert (len(data.train_units), len(data.eval_units)) == (16, 4)
    prompts = [
        {unit.prompt[0].content for unit in units if isinstance(unit, Pair)}
        for units in (data.train_units, data.eval_units)
    ]
    assert not prompts[0] & prompts[1]
    assert data.lines[0] == "read as preference: columns chosen and rejected, 20 rows"
    tokens, learned = (
        sum(int(f(example)) for example in data.train)
        for f in (lambda e: len(e.tokens), lambda e: (e.weights > 0).sum())
    )
    assert data.lines[1].startswith(f"train: 16 pairs; {tokens:,} tokens, {learned:,} learned; median ")
    assert data.lines[2].startswith("eval (held out by seed): 4 pairs; ")
    assert load(write, template, [*many(10), *again], eval_fraction=0.2).eval_units == data.eval_units


def test_rows_are_held_out_by_a_column_or_alone(write: Callable[..., str], template: ChatTemplate) -> None:
    rows = [{**row, "topic": n % 3} for n, row in enumerate(many(9))]
    data = load(write, template, rows, eval_fraction=0.1, hold_out_by="topic")
    assert len({unit.source for unit in data.eval_units}) == 3
    same = [{"prompt": "Number?", "chosen": f"Good {n}.", "rejected": "Bad."} for n in range(9)]
    assert len(load(write, template, same, eval_fraction=0.1, hold_out_by="row").eval_units) == 1
    assert (
        "all rows have the same prompt, so they are held out each by itself"
        in load(write, template, same, eval_fraction=0.1).lines[-1]
    )
    with pytest.raises(DataError, match=r"hold_out_by is 'topics', and no row has a value there; did you mean 'topic'"):
        load(write, template, rows, hold_out_by="topics")
    some = [*({**row, "topic": None} for row in many(8)), *many(16)[8:], {**many(17)[16], "topic": "a"}]
    assert len(load(write, template, some, eval_fraction=0.1, hold_out_by="topic").eval_units) == 2, "each by itself"


def test_bad_rows_refuse_or_are_dropped_and_named(write: Callable[..., str], template: ChatTemplate) -> None:
    rows = [
        *many(4),
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "y", "rejected": ""},
    ]
    with pytest.raises(
        DataError, match=r"2 of 6 rows cannot be used:\n  rows\.jsonl:5: .* equal.*\n  rows\.jsonl:6: no answer"
    ):
        load(write, template, rows)
    data = load(write, template, rows, on_bad_row="drop", eval_fraction=0)
    assert data.lines[2:] == (
        "1 row dropped: the chosen and the rejected answer are equal, so neither is better (rows.jsonl:5)",
        "1 row dropped: no answer: rejected is empty (rows.jsonl:6)",
    )
    assert len(data.train) == 8


def test_long_pairs_refuse_are_dropped_or_cut(write: Callable[..., str], template: ChatTemplate) -> None:
    rows = [*many(3), {"prompt": "Number?", "chosen": "Yes." + " go on" * 60, "rejected": "No."}]
    with pytest.raises(DataError, match=r"1 of 4 rows have a sequence longer than 64 .* has \d+ \(rows\.jsonl:4\)"):
        load(write, template, rows, max_length=64)
    data = load(write, template, rows, max_length=64, too_long="drop", eval_fraction=0)
    assert len(data.train_units) == 3
    assert "1 row dropped: longer than 64 tokens (rows.jsonl:4)" in data.lines
    data = load(write, template, rows, too_long="truncate", context=64, eval_fraction=0)
    assert len(data.train[6].tokens) == 64
    assert all(len(column) == 64 for column in data.train[6].columns.values())
    assert "1 row: longer than 64 tokens, and its end is cut off (rows.jsonl:4)" in data.lines
    late = {"prompt": "Number" * 80, "chosen": "Yes.", "rejected": "No."}
    assert (
        "1 row dropped: longer than 64 tokens (rows.jsonl:4)"
        in load(write, template, [*rows[:3], late], too_long="truncate", max_length=64, eval_fraction=0).lines
    )
    with pytest.raises(DataError, match="too_long is middle, which is for answers that stand alone"):
        load(write, template, rows, too_long="middle")


def test_pairs_that_stand_twice_are_told_or_dropped(write: Callable[..., str], template: ChatTemplate) -> None:
    rows = [*many(3), *many(2)]
    kept = load(write, template, rows, eval_fraction=0)
    assert len(kept.train_units) == 5
    assert kept.lines[-1] == (
        "warning: 2 rows: the same, token for token, as an earlier one; data.duplicates: drop keeps the first alone "
        "(rows.jsonl:4, rows.jsonl:5)"
    )
    dropped = load(write, template, rows, eval_fraction=0, duplicates="drop")
    assert [unit.source for unit in dropped.train_units] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


def test_judged_answers_and_pairs_for_an_objective_that_reads_labels(
    write: Callable[..., str], template: ChatTemplate
) -> None:
    rows = [{**JUDGED["trl"], "prompt": f"Number {n}?", "label": n < 3} for n in range(5)]
    data = load(write, template, rows, eval_fraction=0, kind="kto")
    assert [int(example.columns["desirable"][0]) for example in data.train] == [1, 1, 1, -1, -1]
    assert data.lines[1].startswith("train: 5 answers (3 good, 2 bad); ")
    data = load(write, template, many(3), eval_fraction=0, kind="kto")
    assert [int(example.columns["desirable"][0]) for example in data.train] == [1, -1, 1, -1, 1, -1]
    assert data.lines[0].endswith("3 rows; each pair is a good and a bad answer")


def test_prompts_are_rows_without_examples(write: Callable[..., str], template: ChatTemplate) -> None:
    fields = PROMPTS["verl"][0]
    rows = [{**fields, "prompt": [{"role": "user", "content": f"Number {n}?"}]} for n in range(4)]
    data = load(write, template, rows, eval_fraction=0.25, kind="prompts")
    assert (data.train, len(data.train_units), len(data.eval_units)) == ((), 3, 1)
    assert data.lines[0] == "read as prompts: column prompt, 4 rows"
    assert isinstance(data.train_units[0], Prompt)
    assert data.train_units[0].columns["reward_model"]["ground_truth"] == "4"
    with pytest.raises(DataError, match=r"longer than 8 tokens"):
        load(write, template, rows, max_length=8, kind="prompts")


def test_what_is_not_learned_is_counted(write: Callable[..., str], template: ChatTemplate) -> None:
    chosen = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    poor = {"role": "assistant", "content": "No."}
    rows = [{"prompt": row["prompt"], "chosen": [chosen], "rejected": [poor]} for row in many(2)]
    data = load(write, template, rows, eval_fraction=0, thinking="drop")
    (line,) = [line for line in data.lines if "thinking" in line]
    assert line == "2 rows: thinking is left out (data.thinking: drop) (rows.jsonl:1, rows.jsonl:2)"


def test_without_a_chat_template_prompt_and_answer_are_read_as_they_are(
    write: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("qwen2_5", template="")
    tokenizer.chat_template = None
    kinds: tuple[tuple[Kind, list[dict[str, Any]]], ...] = (
        ("preference", many(2)),
        ("prompts", [{"prompt": row["prompt"]} for row in many(2)]),
    )
    for kind, rows in kinds:
        path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        data = load_preferences(DataConfig(train=path, eval_fraction=0), tokenizer, 512, 0, lambda _: None, kind)
        assert data.lines[1] == "prompt and completion one after the other as they are"
        if kind == "preference":
            assert [tokenizer.decode(example.tokens) for example in data.train[:2]] == [
                "Number 0?Good 0.<|im_end|>", "Number 0?Bad 0.<|im_end|>",
            ]  # fmt: skip
        else:
            assert isinstance(data.train_units[0], Prompt)
            assert tokenizer.decode(prompt_ids(data.template, data.train_units[0])) == "Number 0?"


def test_several_sources_are_of_one_kind(write: Callable[..., str], template: ChatTemplate) -> None:
    one = write("one.jsonl", json.dumps(PAIRS["factory"]) + "\n")
    two = write("two.jsonl", json.dumps({**PAIRS["orca"], "question": "Who?"}) + "\n")
    other = write("other.jsonl", json.dumps(JUDGED["trl"]) + "\n")

    def loaded(*paths: str | SourceConfig, **options: Any) -> PreferenceData:
        config = DataConfig(train=list(paths), chat_template="chatml", **options)
        return load_preferences(config, template.tokenizer, 512, 0, lambda _: None)

    data = loaded(one, two, eval_fraction=0)
    assert [unit.source for unit in data.train_units] == ["one.jsonl:1", "two.jsonl:1"]
    assert data.lines[0] == f"{one}: read as preference: columns chosen and rejected, 1 row"
    assert data.lines[2].startswith("train: 2 pairs; ")
    more = loaded(one, SourceConfig(path=two, weight=3), eval_fraction=0)
    assert [unit.source for unit in more.train_units] == ["one.jsonl:1", *["two.jsonl:1"] * 3]
    assert [len(own) for own in grouped(more.train)] == [2, 2, 2, 2], "a pair that comes again is a pair of its own"
    assert len(loaded(one, eval=two).eval_units) == 1
    with pytest.raises(DataError, match="the sources hold kto and preference rows"):
        loaded(one, other)
    with pytest.raises(DataError, match=rf"{Path(other).name}: the data has the columns prompt, completion, label, in"):
        loaded(other, format="preference")
