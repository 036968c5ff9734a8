"""Adapters of two tasks and of a signature, added to and taken from each other: what is kept, beside PEFT's results.

    python benchmarks/combine_tasks.py --data-dir DATA --work WORK

Trains banking77, E2E NLG, a signer (`trained_tasks.py`; WORK keeps what is finished) and both tasks with signed
answers on one bf16 base, combines them with `topwork combine` and with PEFT's `add_weighted_adapter`, and asks every
result the same test rows by the same code. Writes benchmarks/results/combine_tasks.{json,md}.
"""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from task_scores import Rows, apart, asked, figures
from trained_tasks import FEWER_RATE, KEPT_ROWS, MODEL, RATE, SIGNATURE, TASKS, TRAINING, rows_to_ask, trained

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.source import find_source
from topwork.run.combine import combine

BOTH = ("banking77", "e2e_nlg")


@dataclass(frozen=True)
class Arm:
    """An adapter: one that was trained, or what `by` made of others with these weights.

    by      "" for a trained one, "topwork", or "peft"
    asks    the tasks whose test rows it is asked
    """

    name: str
    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()
    method: str = ""
    by: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    asks: tuple[str, ...] = BOTH


def _both(method: str, by: str, name: str = "", weights: tuple[float, ...] = (1.0, 1.0), **options: Any) -> Arm:
    return Arm(f"{by}-{name or method}", BOTH, weights, method, by, options)


ALL = (*BOTH, "signer")
SINGLE = [
    Arm("base", (), asks=ALL),
    *(Arm(task, (task,)) for task in BOTH),
    Arm("signer", ("signer",), asks=ALL),
    Arm("signer-plain", ("signer-plain",), asks=("signer",)),
    Arm("banking77-signed", ("banking77-signed",), asks=("banking77",)),
    Arm("e2e_nlg-signed", ("e2e_nlg-signed",), asks=("e2e_nlg",)),
]
ADDED = [
    _both("cat", "topwork"),
    _both("cat", "topwork", "cat-0.5-1", (0.5, 1.0)),
    _both("cat", "topwork", "cat-0.7-1", (0.7, 1.0)),
    _both("cat", "topwork", "cat-0.5-0.5", (0.5, 0.5)),
    _both("svd", "topwork"),
    _both("linear", "peft"),
    _both("ties", "peft", "ties-0.5", density=0.5),
    _both("dare_ties", "peft", "dare_ties-0.5", density=0.5),
    _both("ties", "topwork", "ties-0.5", density=[0.5]),
    _both("dare-ties", "topwork", "dare-ties-0.5", density=[0.5]),
    _both("knots", "topwork", "knots-0.5", density=[0.5]),
    _both("cat", "peft"),
    _both("svd", "peft"),
    _both("ties_svd", "peft", "ties_svd-0.5", density=0.5),
    _both("ties", "topwork", "ties-0.2", density=[0.2]),
    _both("dare", "topwork", "dare-0.5", density=[0.5]),
    _both("magnitude-prune", "topwork", "magnitude-prune-0.5", density=[0.5]),
    _both("della", "topwork", "della-0.5", density=[0.5]),
    _both("breadcrumbs", "topwork", "breadcrumbs-0.9", density=[0.9]),
]
SIGNED = [
    Arm("all-three", (*BOTH, "signer"), (1, 1, 1), "cat", "topwork"),
    *(Arm(f"{task}-and-signer", (task, "signer"), (1, 1), "cat", "topwork", asks=(task, "signer")) for task in BOTH),
    *(
        Arm(f"{task}-and-signer-off", (f"{task}-and-signer", "signer"), (1, -1), "cat", "topwork", asks=(task,))
        for task in BOTH
    ),
    *(
        Arm(f"{task}-signed-minus-{share}", (f"{task}-signed", "signer"), (1, -share), "cat", "topwork", asks=(task,))
        for task in BOTH
        for share in (0.5, 1)
    ),
    *(
        Arm(
            f"{task}-signed-minus-signature",
            (f"{task}-signed", "signer", "signer-plain"), (1, -1, 1), "cat", "topwork", asks=(task,),
        )
        for task in BOTH
    ),
    *(
        Arm(f"{task}-signed-minus-peft-{method}", (f"{task}-signed", "signer"), (1, -1), method, "peft", asks=(task,))
        for task in BOTH
        for method in ("linear", "cat")
    ),
    *(
        Arm(f"{task}-and-signer-peft-{method}", (task, "signer"), (1, 1), method, "peft", asks=(task, "signer"))
        for task in BOTH
        for method in ("linear",)
    ),
]  # fmt: skip
ARMS = [*SINGLE, *ADDED, *SIGNED]


def main() -> None:
    given = arguments()
    for name in () if given.so_far else [source for arm in SINGLE for source in arm.sources]:
        trained(name, given.data_dir, given.work)
    rows, failed = asked_all(given, ARMS)
    record = {
        "surroundings": surroundings(),
        "question": {
            "model": MODEL, "training": TRAINING | {"learning_rate": [RATE, FEWER_RATE]}, "signature": SIGNATURE,
            "rows": {task: TASKS[task].rows for task in ALL},
            "general_rows": KEPT_ROWS,
            "signed_rows": {task: TASKS[task].fewer_rows for task in BOTH},
            "asked": {task: TASKS[task].questions for task in ALL},
        },
        "failed": failed,
        "load": os.getloadavg()[2],
        "missing": [arm.name for arm in ARMS if set(arm.asks) - set(rows.get(arm.name, {})) and arm.name not in failed],
        "arms": [told(given, arm, rows) for arm in ARMS if arm.name in rows],
    }  # fmt: skip
    write_record(given.out, record, text(record))
    print(text(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds banking77/train.csv, e2e_nlg/devset.csv …")
    parser.add_argument("--work", type=Path, required=True, help="where rows, runs, adapters and answers are kept")
    parser.add_argument("--so-far", action="store_true", help="train and ask nothing: the record of what is in WORK")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "combine_tasks", help="without its ending")
    given = parser.parse_args()
    given.work = given.work.resolve()
    return given


def place(given: argparse.Namespace, name: str) -> Path:
    """Where an arm's adapter lies."""
    own = next(arm for arm in ARMS if arm.name == name)
    return given.work / "combined" / name if own.by else given.work / name / "adapter"


def asked_all(given: argparse.Namespace, arms: list[Arm]) -> tuple[dict[str, dict[str, Rows]], dict[str, str]]:
    """The rows of each arm and task, from WORK where they are; and what PEFT refused to make, with its reason."""
    base: Base | None = None
    found: dict[str, dict[str, Rows]] = {}
    failed = {}
    for arm in arms:
        if not given.so_far and (reason := made(given, arm)):
            failed[arm.name] = reason
            continue
        for task in arm.asks:
            out = given.work / f"combine-{arm.name}-on-{task}.rows.json"
            if given.so_far and not out.exists():
                continue
            if not out.exists():
                base = base or load_base(MODEL, quiet)
                rows = through(given, base, arm, task)
                rows.write(out)
                print(f"{arm.name} on {task}: {figures(rows)}", flush=True)
            found.setdefault(arm.name, {})[task] = Rows.read(out)
    return found, failed


def made(given: argparse.Namespace, arm: Arm) -> str:
    """Combine what an arm asks for, where it is not there yet. Why PEFT did not, or nothing."""
    out, sources = place(given, arm.name), [place(given, source) for source in arm.sources]
    if not arm.by or out.exists():
        return ""
    if arm.by == "topwork":
        combine(sources, out, arm.method, arm.weights, log=quiet, **arm.options)
        return ""
    job = {"adapters": list(map(str, sources)), "weights": arm.weights, "type": arm.method, "out": str(out)}
    written = given.work / "peft-job.json"
    written.write_text(json.dumps(job | arm.options), encoding="utf-8")
    folder = find_source(ModelConfig(model_name_or_path=MODEL), quiet).folder
    return str(run_process("peers.peft_combine", str(folder), str(written))["error"])


def through(given: argparse.Namespace, base: Base, arm: Arm, task: str) -> Rows:
    adapters = Adapters(base.module)
    test = rows_to_ask(task, given.data_dir, given.work, signed=task == "signer")
    if not arm.sources:
        return asked(base, None, task, test, given.data_dir)
    saved = read_adapter(place(given, arm.name))
    load_adapter(adapters, "arm", saved, BaseId(base.name, base.fingerprint), force=arm.by == "peft")
    try:
        return asked(base, "arm", task, test, given.data_dir)
    finally:
        adapters.remove("arm")


def told(given: argparse.Namespace, arm: Arm, rows: dict[str, dict[str, Rows]]) -> dict[str, Any]:
    """An arm's figures, beside those of the adapter that was trained on the same task alone."""
    record = place(given, arm.name) / "combine.json"
    lost = json.loads(record.read_text("utf-8")) if arm.by == "topwork" else {}
    return {
        "name": arm.name, "by": arm.by, "method": arm.method, "options": arm.options,
        "sources": arm.sources, "weights": arm.weights,
        "rank": lost.get("rank"), "discarded": lost.get("discarded_energy", {}).get("overall"),
        "tasks": {task: figures(own) for task, own in rows[arm.name].items()},
        "to_alone": {
            task: apart(own, rows[task][task])
            for task, own in rows[arm.name].items()
            if arm.name != task and task in rows.get(task, {})
        },
    }  # fmt: skip


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    asked_for = record["question"]
    sizes = ", ".join(f"{task} {count:,}" for task, count in asked_for["rows"].items())
    signed_sizes = ", ".join(f"{task} {count:,}" for task, count in asked_for["signed_rows"].items())
    arms, rates = {arm["name"]: arm for arm in record["arms"]}, asked_for["training"]["learning_rate"]
    parts = [
        f"# Two tasks and a signature, combined: {asked_for['model']}, LoRA r = 16 on all linear layers, bf16",
        f"Rows trained on once: {sizes}, at learning rate {rates[0]:g}, and {asked_for['general_rows']} general "
        f"questions with unsigned answers among the two tasks'; with signed answers {signed_sizes}, at "
        f"{rates[1]:g}; 16 a step, one seed. Greedy answers to the same test rows for all: "
        + ", ".join(f"{task} {count}" for task, count in asked_for["asked"].items())
        + ". banking77: exact answers; E2E NLG: best F1 of the words with a person's sentence; without the signature, "
        f"where there is one (“{asked_for['signature']}”). Differences are to the adapter of that task alone, row by "
        "row, ± one standard error.",
        "## Each alone",
        singles([arms[arm.name] for arm in SINGLE if arm.name in arms]),
        "## Both tasks added",
        *both(record, [arms[arm.name] for arm in ADDED if arm.name in arms]),
        "## The signature, added and taken away",
        signed([arms[arm.name] for arm in SIGNED if arm.name in arms]),
        *([f"Not asked everything yet: {', '.join(record['missing'])}."] if record["missing"] else []),
        f"{surroundings_text(record['surroundings'])} Load {record['load']:.0f}; nothing here is a timing.",
    ]
    return "\n\n".join(parts) + "\n"


def singles(arms: list[dict[str, Any]]) -> str:
    head = ["adapter", "banking77 right", "loss", "E2E NLG F1", "loss", "signed: banking77", "E2E NLG", "general"]
    rows = []
    for arm in arms:
        banking, e2e = (arm["tasks"].get(task) for task in BOTH)
        signs = [arm["tasks"].get(task) for task in ALL]
        rows.append([
            arm["name"], *_share_and_loss(banking), *_share_and_loss(e2e),
            *(f"{own['signed']:.0%}" if own else "" for own in signs),
        ])  # fmt: skip
    return table(head, rows)


def _share_and_loss(own: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{own['share']:.1%}", f"{own['loss']:.3f}") if own else ("", "")


def both(record: dict[str, Any], arms: list[dict[str, Any]]) -> list[str]:
    head = [
        "method",
        "weights",
        "rank",
        "energy left out",
        "banking77 right",
        "to alone",
        "E2E NLG F1",
        "to alone",
        "losses",
    ]
    rows = []
    for arm in arms:
        cells = []
        for task in BOTH:
            own, to = arm["tasks"].get(task), arm["to_alone"].get(task)
            cells += [f"{own['share']:.1%}", f"{to['share']:+.1%} ± {to['share_error']:.1%}"] if own else ["", ""]
        lost = "" if arm["discarded"] is None else f"{arm['discarded']:.1%}"
        losses = ", ".join(f"{own['loss']:.3f}" for task in BOTH if (own := arm["tasks"].get(task)))
        weights = ", ".join(f"{weight:g}" for weight in arm["weights"])
        rows.append([_title(arm), weights, str(arm["rank"] or ""), lost, *cells, losses])
    refused = [f"{name}: {reason}" for name, reason in record["failed"].items()]
    return [table(head, rows), *(["PEFT refused:\n\n" + "\n".join(f"- {line}" for line in refused)] if refused else [])]


def signed(arms: list[dict[str, Any]]) -> str:
    head = ["sum", "by", "asked", "right", "to alone", "loss", "signed"]
    rows = [
        [
            " ".join(f"{weight:+g} {source}" for weight, source in zip(arm["weights"], arm["sources"])),
            _title(arm), task, f"{own['share']:.1%}" if task in BOTH else "",
            f"{to['share']:+.1%} ± {to['share_error']:.1%}" if to and task in BOTH else "",
            f"{own['loss']:.3f}", f"{own['signed']:.0%}",
        ]
        for arm in arms
        for task, own in arm["tasks"].items()
        for to in [arm["to_alone"].get(task)]
    ]  # fmt: skip
    return table(head, rows)


def _title(arm: dict[str, Any]) -> str:
    density = arm["options"].get("density")
    chosen = "" if density is None else f", density {density[0] if isinstance(density, list) else density}"
    return f"{'PEFT' if arm['by'] == 'peft' else 'Topwork'} {arm['method']}{chosen}"


def quiet(_: str) -> None:
    """Nobody reads along."""


if __name__ == "__main__":
    main()
