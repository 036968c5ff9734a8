"""What is left of a small update in bf16: an adapter's terms that join a product before it is rounded, or come after.

    python benchmarks/small_terms.py --data-dir DATA [--model smollm2-135m] [--rows 8] [--out OUT]

A fresh adapter takes one step on some rows of GSM8K; then the loss of the next rows is asked for: before the step, and
after it in fp32 (the truth), in bf16 with terms that join the product's sums (native/grouped_amx.h), and in bf16 with
terms that are added to an output which is rounded already, as PEFT does and as Topwork does without AMX. Wants a
processor with AMX, or TOPWORK_AMX=emulated and patience. Prints Markdown, and writes OUT.json and OUT.md where asked.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import (
    model_argument,
    model_title,
    read_rows,
    surroundings,
    surroundings_text,
    table,
    write_chats,
    write_record,
)


@contextmanager
def terms_apart() -> Iterator[None]:
    """As where no kernel multiplies all: oneDNN's product, then the terms."""
    from topwork.ops import project

    plain = project.multiplies_all
    project.multiplies_all = lambda near: False  # noqa: ARG005
    try:
        yield
    finally:
        project.multiplies_all = plain


def main() -> None:
    given = arguments()
    import torch
    from peers.topwork_step import open_adapted, read_examples

    from topwork.ops.grouped import multiplies_all

    trained = open_adapted(model_argument(given.model), 16, 32, nf4=False, others=[])
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        write_chats(rows, read_rows("gsm8k", given.data_dir))
        examples = read_examples(trained.base, str(rows), 512)
    (first,), (second,) = (trained.passes(examples[at : at + given.rows], 1 << 20) for at in (0, given.rows))
    learner = trained.learner(next(iter(trained.adapters.configs)))
    masters = [master for group in learner.optimizer.param_groups for master in group["params"]]
    if not multiplies_all(trained.base.module.get_input_embeddings().weight):
        raise SystemExit("no kernel here lets terms join a product: it needs AMX, or TOPWORK_AMX=emulated")

    def loss(batch: Any) -> float:
        """Without an update."""
        step, learner.optimizer.step = learner.optimizer.step, lambda *_, **__: None
        (result,) = trained.steps([learner], [batch])
        learner.optimizer.step = step
        return float(result.loss)

    found = {"before the step, bf16": loss(second)}
    trained.steps([learner], [first])
    found["terms join the product, bf16"] = loss(second)
    with terms_apart():
        found["terms come after it, bf16"] = loss(second)
    trained.base.module.float()
    found["fp32"] = loss(second)
    with torch.no_grad():
        for master in masters:
            master.zero_()
    found["before the step, fp32"] = loss(second)
    record = {
        "question": {"rows": given.rows}, "model": model_title(trained.base.name), "losses": found,
        "tokens": [len(first.tokens), len(second.tokens)], "surroundings": surroundings(),
    }  # fmt: skip
    if given.out:
        write_record(given.out, record, text(record))
    print(text(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8, help="of the step, and of those whose loss is asked for")
    parser.add_argument("--out", type=Path, help="the record's path without its ending; left out, it is only printed")
    return parser.parse_args()


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [[name, f"{loss:.4f}"] for name, loss in record["losses"].items()]
    return "\n\n".join([
        f"# What is left of a first step in bf16: {record['model']}, LoRA r = 16 on all linear layers",
        f"One step on {record['question']['rows']} rows of GSM8K ({record['tokens'][0]:,} tokens), and the mean loss "
        f"of the next ones ({record['tokens'][1]:,} tokens):",
        table(["how", "loss"], lines),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
