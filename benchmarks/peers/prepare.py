"""What every system starts from: the model's folder, the adapter's first weights, the order of the rows.

    python -m peers.prepare MODEL ROWS WORK OPTIONS      (in benchmarks/; OPTIONS are fields of Job as JSON)

Writes WORK/ordered.jsonl and WORK/initial, and prints where the model is and how long the rows are. With
`tokens_per_pass` each step's rows are chosen to fill one pass, and WORK/rows.jsonl holds them for Topwork.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peers.peft_loop import encode

from common import Job, model_title, read_chats, write_chats
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.data.batches import step_indices
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.source import find_source


def main(model: str, rows: str, work: str, options: str) -> None:
    config = ModelConfig(model_name_or_path=model, device="cpu")
    folder = find_source(config, lambda _: None).folder
    Path(work).mkdir(parents=True, exist_ok=True)
    initial, ordered = Path(work) / "initial", Path(work) / "ordered.jsonl"
    job = Job(model, folder, rows, str(ordered), str(initial), **json.loads(options))
    base, chats = load_base(config, lambda _: None), read_chats(rows)
    if job.tokens_per_pass:
        lengths = [len(encode(base.tokenizer, chat, job.max_length)[0]) for chat in chats]
        chosen = filled(lengths, job.batch, job.steps, job.tokens_per_pass)
        places = [i for step in range(job.steps) for i in step_indices(len(chosen), job.batch, job.seed, step)]
        chats = [chats[row] for _, row in sorted(zip(places, chosen))]
        job = replace(job, rows=str(Path(work) / "rows.jsonl"))
        write_chats(Path(job.rows), chats)
    visits = [i for step in range(job.steps) for i in step_indices(len(chats), job.batch, job.seed, step)]
    write_chats(ordered, [chats[i] for i in visits])
    encoded = [encode(base.tokenizer, chats[i], job.max_length) for i in visits]
    write_initial(base, job)
    told = {
        "job": str(job.write(Path(work) / "job.json")), "model": model_title(base.name), "folder": folder,
        "lengths": [(len(ids), len(ids) - prompt) for ids, prompt in encoded],
    }  # fmt: skip
    print(json.dumps(told))


def write_initial(base: Base, job: Job) -> None:
    adapters = Adapters(base.module)
    adapters.add("default", AdapterConfig(r=job.r, lora_alpha=job.lora_alpha), job.seed)
    write_adapter(Path(job.initial), adapters, "default", BaseId(base.name, base.fingerprint))


def filled(lengths: Sequence[int], batch: int, steps: int, budget: int) -> list[int]:
    """Rows for every step, `batch` of them, that together hold at most `budget` tokens and nearly as many.

    The rows are taken in their order; then rows of a step are exchanged for later ones while that brings it nearer to
    the budget. No row comes twice. Exits where the rows do not suffice.
    """
    left, chosen = list(range(len(lengths))), []
    for _ in range(steps):
        own, left = left[:batch], left[batch:]
        while (room := budget - sum(lengths[row] for row in own)) and len(own) == batch:
            pairs = [(lengths[new] - lengths[old], old, new) for old in own for new in left]
            more, old, new = max(
                (pair for pair in pairs if pair[0] <= room), default=min(pairs, default=(0, 0, 0)), key=lambda p: p[0]
            )
            if more * room <= 0:  # no exchange leads nearer
                break
            own, left = [*(row for row in own if row != old), new], [*(row for row in left if row != new), old]
        if room < 0 or len(own) < batch:
            sys.exit(f"no {batch} rows of {budget:,} tokens together are left; give fewer sequences per step")
        chosen += own
    return chosen


if __name__ == "__main__":
    main(*sys.argv[1:5])
