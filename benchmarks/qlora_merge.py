"""What an adapter that was trained on a quantized base is merged onto: dequantized, 16-bit or quantized again.

    python benchmarks/qlora_merge.py --data-dir DATA --work WORK

For NF4 (double quantization) and int8 and three tasks an adapter is trained (`trained_tasks.py`; WORK keeps what is
finished), merged in each way, and measured: how far each result's weights lie from dequantized base + ΔW, which is
what was trained, and how each does on the task's test rows. Writes benchmarks/results/qlora_merge.{json,md}.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from task_scores import Rows, apart, asked, figures
from torch import Tensor
from trained_tasks import HOW, MODEL, RATE, TASKS, TRAINING, rows_to_ask, trained

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record
from topwork.adapters.methods.lora.lora import Lora
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.load import load_base
from topwork.ops.packed import Packed, pack_4bit, pack_int8
from topwork.quantization.linear import QuantizedLinear, packed_modules
from topwork.run.folder import ADAPTER_NAME
from topwork.run.opened import OpenRun, open_run

DATA = ("banking77", "gsm8k", "e2e_nlg")
FORMATS = ("nf4", "int8")
QUICK = {"banking77": 80, "gsm8k": 40, "e2e_nlg": 40}
ARMS = {
    "trained": "as trained: quantized base + adapter",
    "dequantized": "merged onto the dequantized base, bf16",
    "16bit": "merged onto the 16-bit base, bf16",
    "requantized": "merged onto the dequantized base, quantized again (PEFT's way)",
}
MERGED = ("dequantized", "16bit", "requantized")
ANSWERS = (
    "Answers: banking77 exact, GSM8K the final number, E2E NLG the best F1 of the words with a person's sentence. "
    "Intervals are 95 %; "
)
PACK: dict[str, Callable[[Tensor], Packed]] = {
    "nf4": lambda weight: pack_4bit(weight, "nf4", 64, True), "int8": pack_int8,
}  # fmt: skip


def main() -> None:
    given = arguments()
    pairs = [(task, form) for form in FORMATS for task in given.tasks.split(",") if is_wanted(given, task, form)]
    measured = [one(given, *pair) for pair in pairs]
    record = {
        "surroundings": surroundings(),
        "question": {
            "model": MODEL, "training": TRAINING | {"learning_rate": RATE},
            "quick": QUICK if given.quick else {},
            "rows": {
                task: {"trained": TASKS[task].rows, "loss": TASKS[task].test_rows, "asked": TASKS[task].questions}
                for task in DATA
            },
        },
        "base": {task: base_alone(given, task) for task in dict.fromkeys(task for task, _ in pairs)},
        "load": os.getloadavg()[2],
        "measured": measured,
    }  # fmt: skip
    write_record(given.out, record, text(record))
    print(text(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds banking77/train.csv, gsm8k/train.jsonl …")
    parser.add_argument("--work", type=Path, required=True, help="where rows, runs and answers are kept")
    parser.add_argument("--tasks", default=",".join(DATA))
    parser.add_argument("--quick", action="store_true", help="no answers, and the loss of fewer test rows")
    parser.add_argument("--so-far", action="store_true", help="train and ask nothing: the record of what is in WORK")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "qlora_merge", help="without its ending")
    given = parser.parse_args()
    given.work = given.work.resolve()
    return given


def is_wanted(given: argparse.Namespace, task: str, form: str) -> bool:
    return not given.so_far or all(answers(given, f"{task}-{form}-{arm}").exists() for arm in ARMS)


def answers(given: argparse.Namespace, name: str) -> Path:
    """Where the rows of an arm are kept."""
    return given.work / f"merge-{name}{'-quick' if given.quick else ''}.rows.json"  # type: ignore[no-any-return]


def one(given: argparse.Namespace, task: str, form: str) -> dict[str, Any]:
    """One adapter, merged in each way."""
    run = trained(f"{task}-{form}", given.data_dir, given.work)
    weights = kept(given.work / f"merge-{task}-{form}-weights.json", lambda: weight_errors(run, form))
    rows = {arm: asked_rows(given, task, f"{task}-{form}-{arm}", lambda arm=arm: built(run, form, arm)) for arm in ARMS}
    return {
        "task": task,
        "format": form,
        "seconds_trained": json.loads((run / "result.json").read_text("utf-8"))["seconds"],
        "weights": weights,
        "arms": {arm: figures(own) for arm, own in rows.items()},
        "to_trained": {arm: apart(rows[arm], rows["trained"]) for arm in MERGED},
        "to_dequantized": {"16bit": apart(rows["16bit"], rows["dequantized"])},
    }


def base_alone(given: argparse.Namespace, task: str) -> dict[str, Any]:
    return figures(asked_rows(given, task, f"{task}-base", lambda: (load_base(MODEL, quiet), None)))


def asked_rows(given: argparse.Namespace, task: str, name: str, build: Callable[[], tuple[Base, str | None]]) -> Rows:
    """The rows of an arm, from WORK where they are."""
    out = answers(given, name)
    if not out.exists():
        test = rows_to_ask(task, given.data_dir, given.work)
        base, adapter = build()
        rows = asked(base, adapter, task, test, given.data_dir, QUICK[task] if given.quick else None)
        rows.write(out)
        print(f"{name}: {figures(rows)}", flush=True)
    return Rows.read(out)


def kept(out: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not out.exists():
        out.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(out.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def built(run: Path, form: str, arm: str) -> tuple[Base, str | None]:
    """The model of an arm, and the adapter that it is asked through."""
    opened = open_run(run, log=quiet, quantized=arm != "16bit")
    if arm == "trained":
        return opened.base, ADAPTER_NAME
    sums = exact_sums(opened) if arm == "requantized" else {}
    merge(opened.base, opened.adapters, ADAPTER_NAME)
    for path, weight in sums.items():
        own = opened.base.module.get_submodule(path)
        packed = replace(PACK[form](weight), dtype=own.weight.dtype)
        layer = QuantizedLinear(weight.shape[1], weight.shape[0], own.bias).hold(packed)  # type: ignore[arg-type]
        opened.base.module.set_submodule(path, layer)
    return opened.base, None


@torch.no_grad()
def exact_sums(opened: OpenRun) -> dict[str, Tensor]:
    """Dequantized weight + ΔW of every packed layer, in fp32: what was trained."""
    parts, packed = opened.adapters.parts(ADAPTER_NAME), packed_modules(opened.base.module)
    found = {}
    for path, part in parts.items():
        assert isinstance(part, Lora)
        found[path] = packed[f"{path}.base_layer"].packed.dense().float() + part.delta()
    return found


@torch.no_grad()
def weight_errors(run: Path, form: str) -> dict[str, Any]:
    """Over all adapted layers together (Frobenius norms): how large ΔW is, and how far each way of merging ends from
    dequantized base + ΔW, relative to ΔW."""
    opened, plain = open_run(run, log=quiet), load_base(MODEL, quiet)
    squares = dict.fromkeys(("weight", "delta", *MERGED), 0.0)
    sums = exact_sums(opened)
    for path, part in opened.adapters.parts(ADAPTER_NAME).items():
        delta, truth = part.delta(), sums[path]  # type: ignore[operator]
        original = plain.module.get_submodule(path).weight.float()  # type: ignore[union-attr, operator]
        results = {
            "dequantized": truth.bfloat16().float(),
            "16bit": (original + delta).bfloat16().float(),
            "requantized": replace(PACK[form](truth), dtype=torch.float32).dense(),
        }
        squares["weight"] += float(original.double().square().sum())
        squares["delta"] += float(delta.double().square().sum())
        for way, result in results.items():
            squares[way] += float((result - truth).double().square().sum())
    size = math.sqrt(squares["delta"])
    return {
        "delta_to_weight": size / math.sqrt(squares["weight"]),
        "error_to_delta": {way: math.sqrt(squares[way]) / size for way in MERGED},
    }


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    asked_for, only = record["question"], record["question"]["quick"]
    sizes = ", ".join(
        f"{task} {rows['trained']:,} rows trained on once, {only.get(task, rows['loss'])} for the loss"
        + ("" if only else f", {rows['asked']} answered")
        for task, rows in asked_for["rows"].items()
    )
    parts = [
        f"# Merging after QLoRA: {asked_for['model']}, LoRA r = 16 on all linear layers",
        f"{sizes}; 16 a step, learning rate {asked_for['training']['learning_rate']:g}. One seed. "
        + ("" if only else ANSWERS)
        + "± is one standard error of the difference, taken row by row on the same rows.",
        "## Weights",
        "How far a merged weight lies from dequantized base + ΔW, which is what was trained: norms over all adapted "
        "layers, relative to ΔW's. 100 % means an error as large as all that was learned.",
        table(
            ["", "ΔW to W", "dequantized, bf16", "16-bit base, bf16", "quantized again"],
            [
                [name(one), f"{one['weights']['delta_to_weight']:.2%}"]
                + [f"{one['weights']['error_to_delta'][way]:.1%}" for way in MERGED]
                for one in record["measured"]
            ],
        ),
        "## Tasks",
        *(part for one in record["measured"] for part in task_text(one, record["base"][one["task"]])),
        f"{surroundings_text(record['surroundings'])} Load {record['load']:.0f}; nothing here is a timing.",
    ]
    return "\n\n".join(parts) + "\n"


def task_text(one: dict[str, Any], base: dict[str, Any]) -> list[str]:
    head = ["", "loss", "difference to as trained", "right", "95 %", "difference to as trained", "same answers"]
    rows = []
    for arm, title in ARMS.items():
        own, to = one["arms"][arm], one["to_trained"].get(arm)
        rows.append([
            title, f"{own['loss']:.4f}", f"{to['loss']:+.4f} ± {to['loss_error']:.4f}" if to else "",
            *answered(own), f"{to['share']:+.1%} ± {to['share_error']:.1%}" if to and "share" in to else "",
            f"{to['same_answers']:.0%}" if to and "share" in to else "",
        ])  # fmt: skip
    rows.append(["16-bit base alone", f"{base['loss']:.4f}", "", *answered(base), "", ""])
    columns = len(head) if "share" in base else 3
    return [f"### {name(one)}", table(head[:columns], [row[:columns] for row in rows])]


def answered(own: dict[str, Any]) -> tuple[str, str]:
    """How much was right, and its interval."""
    if "share" not in own:
        return "", ""
    low, high = own["interval"]
    return f"{own['share']:.1%}", f"{low:.1%}–{high:.1%}"


def name(one: dict[str, Any]) -> str:
    return f"{one['task']}, {'NF4' if one['format'] == 'nf4' else one['format']}"


def quiet(_: str) -> None:
    """Nobody reads along."""


if __name__ == "__main__":
    assert set(FORMATS) <= HOW.keys()
    main()
