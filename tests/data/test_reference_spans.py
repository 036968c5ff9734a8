"""Learned tokens and prompts against an independent reference, over templates and shapes of conversation."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.span_shapes import SHAPES, Row, learned_weights
from data.span_templates import CASES, Case
from reference.incremental import Answer, Incremental, NotWritten
from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import Message
from topwork.data.examples import Data, load_data

ALTERNATE = "llama2 llama2_sp mistral mistral_sp gemma gemma3"
NO_TOOLS = (
    "smollm2 llama2 llama2_sp llama3 mistral mistral_sp mistral_v3 gemma gemma3 phi3 phi4 zephyr zephyr_sp vicuna_sp "
    "command_r olmo falcon no_end r1 r1_old generation generation_sp plain plain_sp"
)
NO_SYSTEM = "mistral mistral_sp mistral_v3 mistral_v3_tools gemma"
NO_FIELD = " ".join(name for name in CASES if name not in ("qwen3", "qwen3_off", "harmony"))
# What is refused, and the words of the message that say what to do: shape -> words (a regular expression) -> cases.
REFUSED: dict[str, dict[str, str]] = {
    "system": {r"data\.fold_system: true": NO_SYSTEM, r"leaves out message 1 \(system\)": "mistral_tools_sp r1_tools"},
    "thinking_field": {r"data\.thinking": NO_FIELD},
    "call": {r"data\.chat_template: chatml": NO_TOOLS, r"chatml": "mistral_v3_tools r1_tools"},
    "call_last": {
        r"data\.chat_template: chatml|data\.fold_system: true": NO_TOOLS,
        r"data\.fold_system: true|leaves out": "mistral_v3_tools mistral_tools_sp r1_tools",
    },
    "two_calls": {
        r"data\.chat_template: chatml": NO_TOOLS,
        r"single tool-calls": "llama3_1 llama3_tools",
        r"leaves out": "harmony",
        r"chatml": "mistral_v3_tools r1_tools",
    },
    "text_and_call": {
        r"data\.chat_template: chatml": NO_TOOLS,
        r"data\.lost_text": "llama3_1 llama3_tools mistral_tools_sp harmony hermes",
        r"chatml": "mistral_v3_tools r1_tools",
    },
    "tools_unused": {r"data\.chat_template: chatml": NO_TOOLS + " r1_tools", r"chatml": "mistral_v3_tools"},
    "same_role": {r"data\.merge_turns": ALTERNATE, r"chatml|data\.merge_turns": "olmo"},
    "assistant_first": {r"alternate": ALTERNATE},
    "empty_assistant": {r"message 2 \(assistant\) is empty": " ".join(CASES)},
    "empty_user": {r"message 1 \(user\) is empty": " ".join(CASES)},
    "system_middle": {
        r"alternate|data\.fold_system": ALTERNATE + " mistral_v3 mistral_v3_tools harmony",
        r"leaves out message 3 \(system\)": "mistral_tools_sp vicuna_sp r1_tools",
    },
}


def refusal(shape: str, name: str) -> str | None:
    """The words with which a case is refused; None where it is learned."""
    return next((words for words, names in REFUSED.get(shape, {}).items() if name in names.split()), None)


def load(case: Case, row: Row, folder: Path) -> Data:
    train = folder / "train.jsonl"
    train.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    options = {"chat_template": case.template} if case.shipped else {}
    config = DataConfig(train=str(train), eval_fraction=0, max_length=20_000, **options, **case.options)
    return load_data(config, case.load_tokenizer(), 20_000, 0, lambda _: None)


def expected(case: Case, row: Row) -> list[tuple[Answer, float]]:
    """Every answer that is learned, and its weight. Raises NotWritten."""
    weights = learned_weights(row)
    reference = Incremental(case.load_tokenizer(), case.jinja, case.known, own=not case.shipped)
    answers = reference.answers(row["messages"], row.get("tools"))
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_learned_tokens_and_prompts(name: str, shape: str, tmp_path: Path) -> None:
    case, row = CASES[name], SHAPES[shape]
    reason = refusal(shape, name)
    if reason is not None:
        with pytest.raises(DataError, match=reason):
            load(case, row, tmp_path)
        return
    answers = expected(case, row)
    data = load(case, row, tmp_path)
    tokenizer = case.load_tokenizer()
    check(data, answers, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
    messages = [as_message(turn) for turn in row["messages"]]
    for answer, _ in answers:
        assert data.template.prompt_ids(messages[: answer.number], row.get("tools")) == answer.prompt


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
        answers = [answer for answer, _ in expected(CASES[name], SHAPES[shape])]
        assert [token for answer in answers for token in answer.learned] == marked
        assert whole["input_ids"][: len(answers[-1].prompt)] == answers[-1].prompt


@pytest.mark.parametrize("name", CASES)
def test_the_reference_decodes_to_what_the_template_writes(name: str) -> None:
    """Where no content spells a special token, pieces are the whole's tokens, and an answer goes on with the prompt."""
    case = CASES[name]
    tokenizer = case.load_tokenizer()
    for shape in PLAIN_SHAPES:
        messages = SHAPES[shape]["messages"]
        try:
            answers = [answer for answer, _ in expected(case, SHAPES[shape])]
        except NotWritten:
            assert name == "r1"
            continue
        for answer in answers:
            prompt = tokenizer.apply_chat_template(
                messages[: answer.number], add_generation_prompt=True, tokenize=False, **case.known.variables
            )
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert answer.prompt[-len(ids) :] == ids
            both = tokenizer.decode(answer.prompt + answer.learned)
            assert both.startswith(tokenizer.decode(answer.prompt))
            assert answer.text in both
