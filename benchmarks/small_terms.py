"""What is left of a small update in bf16: an adapter's terms that are rounded with the base's product, or come after.

    python benchmarks/small_terms.py --data-dir DATA [--model smollm2-135m] [--rows 8] [--quantized] [--out OUT]

A fresh adapter takes one step on some rows of GSM8K; then the loss of the next rows is asked for: before the step, and
after it in fp32 (the truth) and in bf16 with terms that are joined to the product's sums (on AMX), with terms that come
first and the product added to them (elsewhere, and over packed bases), and with terms that are added to an output which
is rounded already, as PEFT does. --quantized: over NF4 with double quantization. Prints Markdown, and
writes OUT.json and OUT.md where asked.
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
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of something, for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def written_after(group: Any, n: Any, inner: Any, out: Any) -> None:
    """As `ops/project.py` writes a group's outputs, but for the order: products are rounded, then terms are added."""
    from topwork.ops import project, projection

    projection.base_products(n, group.base, out, add=False)
    if group.bundles:
        terms = out.new_empty(out.shape)
        project.write_terms(group.bundles, inner, terms)
        out.add_(terms)
    group.vectors.change_(out)


def main() -> None:
    given = arguments()
    import torch
    from peers.topwork_step import open_adapted, read_examples

    from topwork.models import fast
    from topwork.ops import project

    trained = open_adapted(model_argument(given.model), 16, 32, nf4=given.quantized, others=[])
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        write_chats(rows, read_rows("gsm8k", given.data_dir))
        examples = read_examples(trained.base, str(rows), 512)
    (first,), (second,) = (trained.passes(examples[at : at + given.rows], 1 << 20) for at in (0, given.rows))
    learner = trained.learner(next(iter(trained.adapters.configs)))
    masters = [master for group in learner.optimizer.param_groups for master in group["params"]]
    apart, single = {"multiplies_all": lambda _: False}, {"feedforward_of": lambda *_: None}

    def loss() -> float:
        """Without an update."""
        with replaced(learner.optimizer, step=lambda *_, **__: None):
            (result,) = trained.steps([learner], [second])
        return float(result.loss)

    found = {"before the step, bf16": loss()}
    trained.steps([learner], [first])
    if project.multiplies_all(trained.base.module.get_input_embeddings().weight):
        found["joined to the product's sums, bf16"] = loss()
    with replaced(project, **apart), replaced(fast, **single):
        found["first, and the product added to them, bf16"] = loss()
    after = {**apart, "_write": written_after}
    with replaced(project, **after), replaced(project._Group, terms_first=False), replaced(fast, **single):
        found["added to the rounded product, bf16"] = loss()
    trained.base.module.float()
    found["fp32"] = loss()
    with torch.no_grad():
        for master in masters:
            master.zero_()
    found["before the step, fp32"] = loss()
    record = {
        "question": {"rows": given.rows, "quantized": given.quantized}, "model": model_title(trained.base.name),
        "losses": found, "tokens": [len(first.tokens), len(second.tokens)], "surroundings": surroundings(),
    }  # fmt: skip
    if given.out:
        write_record(given.out, record, text(record))
    print(text(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8, help="of the step, and of those whose loss is asked for")
    parser.add_argument("--quantized", action="store_true", help="over NF4 with double quantization")
    parser.add_argument("--out", type=Path, help="the record's path without its ending; left out, it is only printed")
    return parser.parse_args()


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [[name, f"{loss:.4f}"] for name, loss in record["losses"].items()]
    return "\n\n".join([
        f"# What is left of a first step in bf16: {record['model']}, "
        f"{'QLoRA (NF4)' if record['question']['quantized'] else 'LoRA'} r = 16 on all linear layers",
        f"One step on {record['question']['rows']} rows of GSM8K ({record['tokens'][0]:,} tokens), and the mean loss "
        f"of the next ones ({record['tokens'][1]:,} tokens):",
        table(["terms", "loss"], lines),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
