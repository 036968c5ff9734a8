"""Learned tokens and prompts against an independent reference, over templates and shapes of conversation."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.span_shapes import SHAPES, Row, learned_weights, taken
from data.span_templates import CASES, Case
from reference.incremental import Answer, Incremental, NotWritten
from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import Message
from topwork.data.examples import Data, load_data

ALTERNATE = "llama2 llama2_sp llama2_meta mistral mistral_sp mistral_meta gemma gemma3"
NO_TOOLS = (
    "smollm2 llama2 llama2_sp llama2_meta llama3 mistral mistral_sp mistral_meta mistral_folded mistral_v3 "
    "mistral_v3_folded gemma gemma_folded gemma3 phi3 phi3_strips phi4 zephyr zephyr_meta zephyr_sp vicuna_sp "
    "command_r olmo falcon no_end r1_old generation generation_sp plain plain_meta plain_sp"
)
NO_SYSTEM = "mistral mistral_sp mistral_meta mistral_v3 mistral_v3_tools gemma"
THINKS = ("qwen3", "qwen3_thinks", "qwen3_merged", "harmony", "r1", "r1_thinks", "r1_old")
OPENS = "r1 r1_thinks"  # they open the thinking of each answer
CHATML = r"data\.chat_template.*chatml"
# What is refused, and the words of the message that say what to do: shape -> words (a regular expression) -> cases.
REFUSED: dict[str, dict[str, str]] = {
    "system": {r"data\.fold_system: true": NO_SYSTEM, r"leaves out message 1 \(system\)": "mistral_tools_sp r1_tools"},
    "thinking_field": {r"data\.thinking": " ".join(name for name in CASES if name not in THINKS)},
    "thinking_inline": {r"data\.thinking": "qwen3_off"},
    "call": {CHATML: f"{NO_TOOLS} {OPENS} mistral_v3_tools", r"leaves out the tools": "r1_tools"},
    "call_untold": {CHATML: f"{NO_TOOLS} {OPENS}"},
    "call_last": {
        f"{CHATML}|data\\.fold_system: true": f"{NO_TOOLS} {OPENS} mistral_v3_tools r1_tools",
        r"leaves out message 1 \(system\)": "mistral_tools_sp",
    },
    "two_calls": {CHATML: f"{NO_TOOLS} {OPENS} mistral_v3_tools harmony", r"leaves out the tools": "r1_tools"},
    "text_and_call": {
        CHATML: f"{NO_TOOLS} {OPENS} mistral_v3_tools r1_tools",
        r"data\.lost_text: allow": "llama3_1 llama3_tools mistral_tools_sp harmony hermes",
    },
    "tools_unused": {CHATML: f"{NO_TOOLS} {OPENS} mistral_v3_tools r1_tools"},
    "same_role": {r"data\.merge_turns: true": ALTERNATE + " olmo"},
    "system_middle": {
        r"data\.fold_system: true": ALTERNATE + " mistral_v3 mistral_v3_tools harmony",
        r"leaves out message 3 \(system\)": "mistral_tools_sp vicuna_sp r1_tools",
    },
}
for _shape in set(SHAPES) - {"thinking_field", "thinking_inline", "call", "call_untold", "call_last", "two_calls"}:
    REFUSED.setdefault(_shape, {}).setdefault(r"opens an answer's thinking.*chatml", OPENS)


def refusal(shape: str, name: str) -> str | None:
    """The words with which a case is refused; None where it is learned."""
    return next((words for words, names in REFUSED.get(shape, {}).items() if name in names.split()), None)


def load(case: Case, row: Row, folder: Path) -> Data:
    train = folder / "train.jsonl"
    train.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    options = {"chat_template": case.template} if case.shipped else {}
    config = DataConfig(train=str(train), eval_fraction=0, max_length=20_000, **options, **case.options)
    return load_data(config, case.load_tokenizer(), 20_000, 0, lambda _: None)


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
            assert answer.text in both
