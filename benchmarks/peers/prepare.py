"""What every system starts from: the model's folder, the adapter's first weights, the order of the rows.

    python -m peers.prepare MODEL ROWS WORK STEPS BATCH      (in benchmarks/)

Writes WORK/ordered.jsonl and WORK/initial, and prints where the model is.
"""

import json
import sys
from pathlib import Path

from common import Job, read_chats, write_chats
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.data.batches import step_indices
from topwork.models.base import load_base
from topwork.models.config import ModelConfig
from topwork.models.source import find_source


def main(model: str, rows: str, work: str, steps: str, batch: str) -> None:
    config = ModelConfig(model_name_or_path=model, device="cpu")
    folder = find_source(config, lambda _: None).folder
    initial, ordered = Path(work) / "initial", Path(work) / "ordered.jsonl"
    job = Job(model, folder, rows, str(ordered), str(initial), int(steps), int(batch))
    chats = read_chats(rows)
    visits = [i for step in range(job.steps) for i in step_indices(len(chats), job.batch, job.seed, step)]
    write_chats(ordered, [chats[i] for i in visits])
    base = load_base(config, lambda _: None)
    adapters = Adapters(base.module)
    adapters.add("default", AdapterConfig(r=job.r, lora_alpha=job.lora_alpha), job.seed)
    write_adapter(initial, adapters, "default", BaseId(base.name, base.fingerprint))
    print(json.dumps({"job": str(job.write(Path(work) / "job.json")), "model": base.name}))


if __name__ == "__main__":
    main(*sys.argv[1:6])
