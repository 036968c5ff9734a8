"""Learned tokens and prompts against an independent reference, over templates and shapes of conversation."""

import json
import re
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from data.span_shapes import SHAPES, Row, learned_weights, taken
from data.span_templates import CASES, Case
from reference.incremental import Answer, Incremental, Known, NotWritten
from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import Message
from topwork.data.examples import Data, load_data

ALTERNATE = "llama2 mistral gemma gemma3"
NO_TOOLS = (
    "smollm2 llama2 llama3 mistral mistral_folded mistral_v3 mistral_v3_folded gemma gemma_folded gemma3 phi3 phi4 "
    "zephyr vicuna command_r olmo falcon no_end r1 r1_old generation plain"
)
NO_SYSTEM = "mistral mistral_v3 mistral_v3_tools gemma"
NO_FIELD = (
    "smollm2 qwen2_5 qwen3_off smollm3 smollm3_off llama2 llama3 llama3_1 llama3_tools mistral mistral_folded "
    "mistral_v3 mistral_v3_folded mistral_v3_tools mistral_tools tekken gemma gemma_folded gemma3 phi3 phi4 zephyr "
    "vicuna command_r granite olmo falcon no_end hermes r1_tools generation generation_chatml chatml plain"
)
CHATML = r"data\.chat_template.*chatml"
# What is refused, and the words of the message that say what to do: shape -> words (a regular expression) -> cases,
# less what they say of the tokenizer.
REFUSED: dict[str, dict[str, str]] = {
    "system": {r"data\.fold_system: true": NO_SYSTEM, r"leaves out message 1 \(system\)": "mistral_tools r1_tools"},
    "thinking_field": {r"data\.thinking": NO_FIELD},
    "thinking_inline": {r"data\.thinking": "qwen3_off"},
    "many": {r"data\.fold_system: true": NO_SYSTEM, r"leaves out message 1 \(system\)": "mistral_tools r1_tools"},
    "many_calls": {CHATML: f"{NO_TOOLS} mistral_v3_tools", r"leaves out the tools": "r1_tools"},
    "many_same": {r"data\.merge_turns: true": ALTERNATE + " olmo"},
    "call": {CHATML: f"{NO_TOOLS} mistral_v3_tools", r"leaves out the tools": "r1_tools"},
    "spelled_call": {CHATML: f"{NO_TOOLS} mistral_v3_tools", r"leaves out the tools": "r1_tools"},
    "call_untold": {CHATML: NO_TOOLS},
    "call_last": {
        f"{CHATML}|data\\.fold_system: true": f"{NO_TOOLS} mistral_v3_tools r1_tools",
        r"leaves out message 1 \(system\)": "mistral_tools",
    },
    "two_calls": {CHATML: f"{NO_TOOLS} mistral_v3_tools harmony", r"leaves out the tools": "r1_tools"},
    "text_and_call": {
        CHATML: f"{NO_TOOLS} mistral_v3_tools r1_tools",
        r"data\.lost_text: allow": "llama3_1 llama3_tools mistral_tools harmony hermes",
    },
    "tools_unused": {CHATML: f"{NO_TOOLS} mistral_v3_tools r1_tools"},
    "same_role": {r"data\.merge_turns: true": ALTERNATE + " olmo"},
    "system_middle": {
        r"data\.fold_system: true": ALTERNATE + " mistral_v3 mistral_v3_tools harmony",
        r"leaves out message 3 \(system\)": "mistral_tools vicuna r1_tools",
    },
}
for _shape in [shape for shape in SHAPES if "thinking" not in shape and "call" not in shape]:
    REFUSED.setdefault(_shape, {}).setdefault(r"opens an answer's thinking.*chatml", "r1")


def refusal(shape: str, name: str) -> str | None:
    """The words with which a case is refused; None where it is learned."""
    template = re.sub("_(sp|meta|merges|strips|thinks|composes)$", "", name)
    return next((words for words, names in REFUSED.get(shape, {}).items() if template in names.split()), None)


def load(case: Case, row: Row, folder: Path, log: Any = lambda _: None, **more: Any) -> Data:
    train = folder / "train.jsonl"
    train.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    options: dict[str, Any] = {"chat_template": case.template} if case.shipped else {}
    options |= {"max_length": 20_000, **case.options, **more}
    config = DataConfig(train=str(train), eval_fraction=0, **options)
    return load_data(config, case.load_tokenizer(), 20_000, 0, log)


def expected(case: Case, messages: list[dict[str, Any]], tools: Any) -> list[tuple[Answer, float]]:
    """Every answer that is learned, and its weight. Raises NotWritten."""
    weights = learned_weights(messages)
    reference = Incremental(case.load_tokenizer(), case.jinja, case.known, own=not case.shipped)
    answers = reference.answers(messages, tools)
    return [(answer, weights[answer.number]) for answer in answers if answer.number in weights]


def check(data: Data, answers: list[tuple[Answer, float]], show: Any) -> None:
    """Each answer is learned once, after its prompt, with its weight, and nothing else is."""
    learned = 0
    for answer, weight in answers:
        size = len(answer.prompt)
        whole = answer.prompt + answer.learned
        where = [item for item in data.train if item.tokens[: len(whole)].tolist() == whole]
        where = [item for item in where if item.weights[size]]
        told = [show(item.tokens.tolist()) for item in data.train]
        assert len(where) == 1, f"{show(answer.prompt)!r} -> {show(answer.learned)!r} is not once in {told}"
        assert set(where[0].weights[size : len(whole)].tolist()) == {weight}
        learned += len(answer.learned)
    assert learned == sum(int((item.weights > 0).sum()) for item in data.train)


def as_message(turn: Row) -> Message:
    named = ("reasoning_content", "tool_calls", "tool_call_id", "name")
    return Message(turn["role"], turn["content"], None, {key: turn[key] for key in named if key in turn})


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, case in CASES.items() for shape in SHAPES if shape not in case.without]
)
def test_learned_tokens_and_prompts(name: str, shape: str, tmp_path: Path) -> None:
    case, row = CASES[name], SHAPES[shape]
    reason = refusal(shape, name)
    if reason is not None:
        with pytest.raises(DataError, match=reason):
            load(case, row, tmp_path)
        return
    taken_messages = taken(row["messages"], case.needs)
    answers = expected(case, taken_messages, row.get("tools"))
    data = load(case, row, tmp_path)
    tokenizer = case.load_tokenizer()
    check(data, answers, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    messages = [as_message(turn) for turn in taken_messages]
    for answer, _ in answers:
        assert data.template.prompt_ids(messages[: answer.number], row.get("tools")) == answer.prompt


@pytest.mark.parametrize(
    "name", ["smollm2", "qwen3", "llama2_sp", "mistral_v3", "gemma3", "tekken", "no_end", "harmony"]
)
def test_the_last_answer_alone(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokenizer = case.load_tokenizer()
    for shape in ("single", "multi", "two_calls", "spaces", "spelled"):
        if refusal(shape, name) is None:
            messages = taken(SHAPES[shape]["messages"], case.needs)
            answers = expected(case, messages, SHAPES[shape].get("tools"))
            data = load(case, SHAPES[shape], tmp_path, train_on="last_answer")
            check(data, answers[-1:], lambda ids: tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama2_sp", "tekken", "no_end", "r1"])
def test_streamed_rows_are_learned_as_held_ones(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    rows = [row for shape, row in SHAPES.items() if refusal(shape, name) is None]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    found = []
    for streaming in (False, True):
        config = DataConfig(train=str(train), eval_fraction=0, max_length=20_000, streaming=streaming, **case.options)
        data = load_data(config, case.load_tokenizer(), 20_000, 0, lambda _: None)
        found.append(sorted((item.tokens.tolist(), item.weights.tolist()) for item in data.train))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama2_sp", "gemma3", "tekken", "no_end"])
def test_what_is_left_of_a_long_conversation_is_learned_as_such(name: str, tmp_path: Path) -> None:
    """Every answer once, after the prompt of some of its last turns, the system message before them."""
    case = CASES[name]
    first, *turns = SHAPES["many"]["messages"]
    data = load(case, SHAPES["many"], tmp_path, too_long="oldest_turns", max_length=100)
    left = [[first, *turns[start:]] for start in range(0, len(turns), 2)]
    possible = {
        (tuple(answer.prompt), tuple(answer.learned)): len(messages) - answer.number
        for messages in left
        for answer, _ in expected(case, messages, None)
    }
    found = []
    for item in data.train:
        assert len(item.tokens) <= 100
        tokens, on = item.tokens.tolist(), [bool(weight) for weight in item.weights]
        starts = [at for at in range(1, len(on)) if on[at] and not on[at - 1]]
        stops = [at + 1 for at in range(1, len(on)) if on[at] and not [*on, False][at + 1]]
        found += [possible[tuple(tokens[:start]), tuple(tokens[start:stop])] for start, stop in zip(starts, stops)]
    assert sorted(found) == list(range(1, len(turns), 2))


@pytest.mark.parametrize("name", CASES)
def test_thinking_is_put_before_the_answer_or_left_out(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokenizer = case.load_tokenizer()
    refused = {"inline": ("qwen3_off",), "drop": ("r1", "r1_thinks")}
    for thinking, needs in (("inline", "inline"), ("drop", "dropped")):
        for row in (SHAPES["thinking_field"], SHAPES["thinking_inline"]):
            if name in refused[thinking]:
                with pytest.raises(DataError, match=r"data\.(thinking|chat_template)"):
                    load(case, row, tmp_path, thinking=thinking)
                continue
            answers = expected(case, taken(row["messages"], (needs, *case.needs)), None)
            data = load(case, row, tmp_path, thinking=thinking)
            check(data, answers, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))


TOLD: list[tuple[str, str, dict[str, Any], str | None]] = [
    # case, shape, options, what is told beside the numbers
    ("smollm2", "assistant_first", {}, "the opening answer is context"),
    ("gemma", "assistant_first", {}, "first turn is cut: the chat template wants the user to begin"),
    ("smollm2", "empty_assistant", {}, "an empty answer is not learned"),
    ("smollm2", "empty_user", {}, "the answer to an empty user turn is not learned"),
    ("smollm2", "spelled", {}, "special tokens that its text spells are read as letters"),
    ("llama3_1", "two_calls", {}, "several calls of one turn are put one after another"),
    ("gemma_folded", "same_role", {}, "turns of one role in a row are made one"),
    ("llama3_1", "text_and_call", {"lost_text": "allow"}, "leaves out the answer's text beside a tool call"),
    ("smollm2", "thinking_field", {"thinking": "drop"}, "thinking is left out"),
    *(("smollm2", shape, {}, None) for shape in ("single", "system", "same_role", "spaces", "weights", "long_line")),
]


@pytest.mark.parametrize(("name", "shape", "options", "words"), TOLD)
def test_what_is_cut_or_changed_is_told(
    name: str, shape: str, options: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    said: list[str] = []
    load(CASES[name], SHAPES[shape], tmp_path, said.append, **options)
    notes = [line for line in said if line.endswith("(train.jsonl:1)")]
    assert notes == [] if words is None else any(line.startswith("1 row: ") and words in line for line in notes)


@pytest.mark.parametrize("shape", ["single", "multi", "spelled"])
def test_an_end_that_the_tokenizer_would_not_see(shape: str, tmp_path: Path) -> None:
    """What is to end the turn is its token, or the run stops: letters that spell it are never learned as an end."""
    case = Case("normalizes", Known(("</s>",)), "zephyr")
    tokenizer = case.load_tokenizer()
    try:
        data = load(case, SHAPES[shape], tmp_path)
    except DataError:
        return
    for item in data.train:
        stops = [at for at in range(len(item.tokens)) if item.weights[at] and not [*item.weights, 0.0][at + 1]]
        assert {int(item.tokens[at]) for at in stops} == {tokenizer.eos_token_id}


PLAIN_SHAPES = ("single", "multi", "spaces", "emoji", "scripts")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("generation")])
def test_the_reference_marks_what_transformers_marks(name: str) -> None:
    """Templates that say themselves what is learned."""
    tokenizer = CASES[name].load_tokenizer()
    for shape in PLAIN_SHAPES:
        messages = SHAPES[shape]["messages"]
        whole = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        marked = [token for token, is_learned in zip(whole["input_ids"], whole["assistant_masks"]) if is_learned]
        answers = [answer for answer, _ in expected(CASES[name], SHAPES[shape]["messages"], None)]
        assert [token for answer in answers for token in answer.learned] == marked
        assert whole["input_ids"][: len(answers[-1].prompt)] == answers[-1].prompt


@pytest.mark.parametrize("name", CASES)
def test_the_reference_decodes_to_what_the_template_writes(name: str) -> None:
    """Where no content spells a special token, pieces are the whole's tokens, and an answer goes on with the prompt."""
    case = CASES[name]
    tokenizer = case.load_tokenizer()
    for shape in set(PLAIN_SHAPES) - set(case.without):
        messages = SHAPES[shape]["messages"]
        try:
            answers = [answer for answer, _ in expected(case, messages, None)]
        except NotWritten:
            assert name in ("r1", "r1_thinks")
            continue
        for answer in answers:
            prompt = tokenizer.apply_chat_template(
                messages[: answer.number], add_generation_prompt=True, tokenize=False, **case.known.variables
            )
            if case.shipped and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
                prompt = tokenizer.bos_token + prompt
            assert answer.prompt == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            both = tokenizer.decode(answer.prompt + answer.learned)
            assert both.startswith(tokenizer.decode(answer.prompt))
            assert normalize("NFC", answer.text) in normalize("NFC", both)
