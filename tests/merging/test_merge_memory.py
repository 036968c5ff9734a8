"""The memory that a merge takes is that of a tensor and its sum, not of the model."""

import os
import subprocess
import sys
from pathlib import Path

from reference.families import tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.models.load import as_base

WIDTH, LAYERS = 1024, 8
PROGRAM = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig
from topwork.adapters.peft_format import read_adapter
from topwork.common.devices import peak_memory_bytes
from topwork.merging.rounding import Rounding
from topwork.merging.stream import merged_lazily
from topwork.models.lazy import in_type, open_lazily
from topwork.models.lazy_writing import write_lazily
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
place = Path(sys.argv[1])
bare = skeleton(AutoConfig.from_pretrained(place / "base"), dtype=torch.bfloat16)
model = in_type(open_lazily(Source("made up", str(place / "base"), None)), bare, torch.bfloat16)
merged = merged_lazily(model, bare, read_adapter(place / "adapter"), Rounding())
torch.ones(64, 64) @ torch.ones(64, 64)  # what the first product takes is no part of it
start = peak_memory_bytes(torch.device("cpu"))
write_lazily(merged, place / "out", 16 << 20)
print(peak_memory_bytes(torch.device("cpu")) - start, max(t.nbytes for t in merged.tensors.values()), merged.nbytes)
"""


def test_a_merge_takes_the_memory_of_one_tensor_and_one_shard(tmp_path: Path) -> None:
    model = tiny_model(
        "llama", hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, head_dim=WIDTH // 8,
    ).bfloat16()  # fmt: skip
    model.save_pretrained(tmp_path / "base", max_shard_size="16MB")
    base = as_base(model, None, "made up", lambda _: None)  # type: ignore[arg-type]
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=2))
    write_adapter(tmp_path / "adapter", adapters, "a", BaseId("made up"))
    (tmp_path / "out").mkdir()
    settings = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20)
    }  # what is let go of is not kept in the heap's holes
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    taken, largest, whole = map(int, done.stdout.split())
    shard, libraries = 16 << 20, 8 << 20  # what the first read and product load is no part of the model
    # the weight in 16 bits; in 32 it, what is added, scaled, and their sum
    assert taken <= 9 * largest + shard + libraries
    assert taken < whole / 2
