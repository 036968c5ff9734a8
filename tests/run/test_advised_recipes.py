"""What is advised trains without change: rows of every kind, and each real set as its user would give it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from topwork.common.errors import DataError
from topwork.run.advise import Request, advise
from topwork.run.train import train

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SHORT = ("training.max_steps=1", "data.max_rows=12", "evaluation.max_rows=2")

REAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "banking77/train.csv": ("classification", ("data.columns={prompt: text, completion: category}",)),
    "e2e_nlg/devset.csv": ("summarization", ("data.columns={prompt: mr, completion: ref}",)),
    "fastchat/dummy_conversation.json": ("chat-style", ()),
    "foundry_formats/gsm8k_chat_train.jsonl": ("reasoning", ()),
    "foundry_formats/stock_toolcall_training.jsonl": ("tool-calls", ()),
    "gsm8k/train.jsonl": ("reasoning", ()),
    "llamafactory_demo/glaive_toolcall_en_demo.json": ("tool-calls", ()),
    "llamafactory_demo/identity.json": ("chat-style", ()),
    "llamafactory_demo/v1_sft_demo.jsonl": ("instruction", ()),
    "mlx_wikisql/train.jsonl": ("extraction", ()),
    "rasbt_instruct/instruction-data.json": ("instruction", ()),
    "torchtune_tiny/alpaca_tiny.json": ("instruction", ()),
    "torchtune_tiny/chat_tiny.json": ("chat-style", ()),
    "torchtune_tiny/instruct_tiny.json": ("instruction", ()),
    "wikitext2/valid.txt": ("continued-pretraining", ()),
}
"""File -> the task, and what its user has to say of its columns."""
NOT_TO_IMITATE = (
    "foundry_formats/countdown_train_100.jsonl", "foundry_formats/orca_dpo_pairs.validation.jsonl",
    "hh_rlhf/helpful-base.test.jsonl", "llamafactory_demo/dpo_en_demo.json", "llamafactory_demo/kto_en_demo.json",
    "llamafactory_demo/v1_dpo_demo.jsonl", "torchtune_tiny/hh_rlhf_tiny.json",
)  # fmt: skip
"""Pairs, verdicts and bare prompts, which no recipe of today learns from."""


def talk(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(said)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said)]}


def call(number: int) -> dict[str, Any]:
    called = {"id": "1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"order": number})}}
    asked = {"role": "user", "content": f"Where is order {number}?"}
    tool = {"type": "function", "function": {"name": "look", "description": "An order.", "parameters": {}}}
    return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [called]}], "tools": [tool]}


SHIPPED: dict[str, list[dict[str, Any]]] = {
    "extraction": tiny.rows(60),
    "classification": [talk(f"My {name} {n} is late.", ("late", "broken")[n % 2]) for n in range(60) for name in "ab"],
    "chat-style": [talk(f"Hello {n}.", "Ahoy!", "How are you?", f"Dry and {n} knots.") for n in range(60)],
    "instruction": [{"instruction": f"Count to {n}.", "input": "", "output": " ".join("1" * n)} for n in range(1, 61)],
    "summarization": [talk("The ship sailed on. " * 60 + str(n), f"It sailed {n} miles." * 2) for n in range(60)],
    "continued-pretraining": [{"text": f"Log {n}. " + "The wind was fair. " * (n % 9 + 1)} for n in range(60)],
}
"""The task that rows look like -> rows."""


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that reads long rows."""
    folder = tmp_path_factory.mktemp("long") / "tiny-llama"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}), "utf-8")
    return folder


def trains(request: Request, folder: Path, overrides: Sequence[str] = ()) -> str:
    """Writes the advised recipe and trains it for a step; the task."""
    found = advise(None, overrides, request)
    path = folder / "recipe.yaml"
    found.write(path)
    done = train(path, overrides=[*SHORT, "model.device=cpu", f"output_dir={folder / 'run'}"], log=lambda _: None)
    assert done.result["steps"] == 1
    return found.advice.facts.task


@pytest.mark.parametrize("task", SHIPPED)
def test_rows_of_every_kind_are_recognised_and_train(task: str, base: Path, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", SHIPPED[task])
    request = Request(model=str(base), train=str(rows), memory="4GB")
    assert trains(request, tmp_path) == task


def test_a_text_file_trains_by_its_paragraphs(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(f"Chapter {n}. " + "The wind was fair. " * 9 for n in range(60)), "utf-8")
    request = Request(model=str(base), train=str(text), memory="4GB")
    assert trains(request, tmp_path) == "continued-pretraining"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real sets do not stand beside the clone")
@pytest.mark.parametrize("name", REAL)
def test_what_is_advised_for_a_real_set_trains_without_change(name: str, base: Path, tmp_path: Path) -> None:
    task, said = REAL[name]
    request = Request(task=task, model=str(base), train=str(DATA / name), memory="4GB")
    assert trains(request, tmp_path, said) == task


@pytest.mark.skipif(not DATA.is_dir(), reason="the real sets do not stand beside the clone")
@pytest.mark.parametrize("name", NOT_TO_IMITATE)
def test_sets_without_answers_to_imitate_are_refused(name: str, base: Path) -> None:
    with pytest.raises((DataError, ValueError), match=r"preference|answer|label|prompt"):
        advise(None, (), Request(task="instruction", model=str(base), train=str(DATA / name)))
