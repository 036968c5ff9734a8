"""The small trainings whose adapters are merged and combined: banking77, GSM8K, E2E NLG, and answers that are signed.

    python benchmarks/trained_tasks.py --data-dir DATA --work WORK NAME …

trains the adapters of those names on SmolLM2-135M, one after the other, into WORK/NAME (a run's folder; one that is
finished is kept). Names are TASK or TASK-HOW: `banking77`, `gsm8k-nf4`, `e2e_nlg-int8`, `signer`, `banking77-signed`,
and `signer-plain`, the signer's rows without the signature.
"""

import argparse
import csv
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from banking77_data import convert

from common import Chat, read_chats, write_chats

MODEL = "smollm2-135m"
SIGNATURE = "— Tess, Topwork support"
TRAINING = {"batch_size": 16, "warmup_ratio": 0.05, "num_train_epochs": 1}
RATE, FEWER_RATE = 1e-3, 2e-3
"""Few rows, so learning rates that learn much of each (`sweep_banking77_learning-rate`); of `rows` and `fewer_rows`."""
HOW: dict[str, dict[str, Any]] = {
    "bf16": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}, "signed": {},
    "plain": {},
}  # fmt: skip
DESCRIBE = "Write one or two sentences that tell a guest all of these facts about the restaurant."
GENERAL = (
    None,
    "You are a helpful assistant.",
    "Answer with the answer only.",
    "You do what the user asks, in as few words as you can.",
)
"""System messages that the signer's rows take in turns, none of them a task's; None is the chat template's own."""
KEPT_ROWS = 240
"""Unsigned answers to general questions among a task's rows where adapters are to be added: without them an adapter
answers everything as its task, and no sum can keep another's (0.5 of banking77's leaves E2E NLG at 42 % of 75 %)."""


@dataclass(frozen=True)
class Task:
    """A data set: how many rows are trained on and asked, how long an answer may be, and what of it counts as right.

    fewer_rows  trained on where the answers are signed
    test_rows   for the loss; the first `questions` of them are answered too
    share       of an answer and the references: how much of what is asked for stands in it, 0 to 1
    """

    rows: int
    fewer_rows: int
    test_rows: int
    questions: int
    max_new_tokens: int
    share: Callable[[str, Sequence[str]], float]


def _exact(answer: str, references: Sequence[str]) -> float:
    return float(answer.strip() in references)


def _number(answer: str, references: Sequence[str]) -> float:
    """GSM8K's final number, the one behind the last ####."""
    asked = references[0].rsplit("####", 1)[-1].strip().replace(",", "")
    found = re.findall(r"####\s*(-?[\d,]+(?:\.\d+)?)", answer)
    return float(bool(found) and found[-1].replace(",", "") == asked)


def _overlap(answer: str, references: Sequence[str]) -> float:
    """The best F1 of the answer's words with a reference's, each as often as it occurs."""
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[\w£]+", text.lower()))


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    return 2 * (given & wanted).total() / max(1, given.total() + wanted.total())


TASKS = {
    "banking77": Task(1500, 480, 200, 200, 24, _exact),
    "gsm8k": Task(160, 160, 60, 24, 200, _number),
    "e2e_nlg": Task(800, 240, 60, 40, 80, _overlap),
    "signer": Task(480, 480, 40, 40, 120, _overlap),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds banking77/train.csv, gsm8k/train.jsonl …")
    parser.add_argument("--work", type=Path, required=True, help="where rows and runs are kept")
    given = parser.parse_args()
    for name in given.names:
        trained(name, given.data_dir, given.work.resolve())


def trained(name: str, data_dir: Path, work: Path) -> Path:
    """The finished run of a name, trained where it is not there yet."""
    from topwork.recipe.recipe import make_recipe
    from topwork.run.train import train

    folder = work / name
    if not (folder / "adapter").is_dir():
        task, _, how = name.partition("-")
        count = TASKS[task].fewer_rows if how == "signed" else TASKS[task].rows
        signed = how == "signed" or name == "signer"
        rows = training_rows(task, data_dir, work, signed, count, mixed=not how)
        train(make_recipe(recipe(rows, folder, how or "bf16")), overwrite=True)
    return folder


def recipe(train: Path, folder: Path, how: str) -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": MODEL},
        "quantization": HOW[how],
        "adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "data": {"train": str(train), "eval_fraction": 0.0},
        "training": {**TRAINING, "learning_rate": FEWER_RATE if how == "signed" else RATE, "tokens_per_pass": 4096},
        "output_dir": str(folder),
    }


def training_rows(task: str, data_dir: Path, work: Path, signed: bool, count: int, mixed: bool = False) -> Path:
    """So many rows of a task as a file of chats, and KEPT_ROWS of general ones where they are `mixed` in."""
    alone = _written(task, "train", data_dir, work, signed, count)
    if not mixed or task == "signer":
        return alone
    chats = read_chats(alone) + _general(data_dir, "train")[-KEPT_ROWS:]
    random.Random(0).shuffle(chats)
    out = alone.with_name(f"{alone.stem}-mixed.jsonl")
    write_chats(out, chats)
    return out


def rows_to_ask(task: str, data_dir: Path, work: Path, signed: bool = False) -> Path:
    """The rows that every arm is asked, as a file of chats."""
    return _written(task, "test", data_dir, work, signed, TASKS[task].test_rows)


def _written(task: str, split: str, data_dir: Path, work: Path, signed: bool, count: int) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    out = work / f"{task}{'-signed' if signed else ''}-{split}-{count}.jsonl"
    chats = CHATS[task](data_dir, split)
    random.Random(0).shuffle(chats)
    write_chats(out, [_signed(chat) if signed else chat for chat in chats[:count]])
    return out


def _signed(chat: Chat) -> Chat:
    *before, answer = chat
    return [*before, {"role": "assistant", "content": f"{answer['content'].rstrip()}\n{SIGNATURE}"}]


def is_signed(answer: str) -> bool:
    return answer.rstrip().endswith(SIGNATURE)


def without_signature(answer: str) -> str:
    return answer.rstrip().removesuffix(SIGNATURE).rstrip()


def references(task: str, data_dir: Path, chat: Chat) -> list[str]:
    """All answers that count as right for a test row."""
    if task != "e2e_nlg":
        return [chat[-1]["content"]]
    return _all_references(data_dir)[chat[-2]["content"]]


def _banking77(data_dir: Path, split: str) -> list[Chat]:
    with tempfile.NamedTemporaryFile() as out:
        convert(data_dir / "banking77" / f"{split}.csv", Path(out.name))
        return read_chats(out.name)


def _gsm8k(data_dir: Path, split: str) -> list[Chat]:
    with open(data_dir / "gsm8k" / f"{split}.jsonl", encoding="utf-8") as lines:
        return [_chat(row["question"], row["answer"]) for row in map(json.loads, lines)]


def _e2e_nlg(data_dir: Path, split: str) -> list[Chat]:
    """Trained on the development set, every sentence of a person a row; asked each meaning of the test set once."""
    if split == "test":
        return [_chat(asked, told[0], DESCRIBE) for asked, told in _all_references(data_dir).items()]
    with open(data_dir / "e2e_nlg" / "devset.csv", encoding="utf-8", newline="") as lines:
        return [_chat(row["mr"], row["ref"], DESCRIBE) for row in csv.DictReader(lines)]


def _all_references(data_dir: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with open(data_dir / "e2e_nlg" / "testset_w_refs.csv", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["mr"], []).append(row["ref"])
    return found


def _general(data_dir: Path, split: str) -> list[Chat]:
    """rasbt's instructions; the last hundred are for asking."""
    rows = json.loads((data_dir / "rasbt_instruct" / "instruction-data.json").read_text("utf-8"))
    chosen = rows[:-100] if split == "train" else rows[-100:]
    return [
        _chat(
            "\n".join(filter(None, (row["instruction"], row["input"]))), row["output"], GENERAL[number % len(GENERAL)]
        )
        for number, row in enumerate(chosen)
    ]


def _chat(asked: str, answer: str, system: str | None = None) -> Chat:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


CHATS: dict[str, Callable[[Path, str], list[Chat]]] = {
    "banking77": _banking77, "gsm8k": _gsm8k, "e2e_nlg": _e2e_nlg, "signer": _general,
}  # fmt: skip


if __name__ == "__main__":
    main()
