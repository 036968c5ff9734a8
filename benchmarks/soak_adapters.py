"""A tiny random base, and adapters of every method whose answers tell which of them gave them.

An adapter signs what it says: its greedy answers to the prompts here were written down with nobody else in the engine,
and no two adapters have one in common.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BENCHMARKS

TOKENS = 8
"""Of an answer."""
KINDS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 6, "use_dora": True},
    {"method": "ia3"},
    {"method": "prefix", "num_virtual_tokens": 3},
    {"method": "prompt", "num_virtual_tokens": 5},
    {"method": "bitfit"},
    {"r": 8, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
]
LOUDER = 12
"""By so much the base's layers are made larger than they are drawn."""
NOISE = {"prefix": 5.0, "prompt": 5.0}
"""By method; what is little heard beside a long prompt is louder."""
PROMPTS = ("Where is my kettle?", "The lamp hums. " * 9, "Order 7: is late", "a")
"""Words that the tiny tokenizer knows; one fills more than a block."""


@dataclass(frozen=True)
class Signed:
    """An adapter's folder, the head of its content's hash, and its answer to each prompt."""

    folder: Path
    content: str
    answers: Sequence[Sequence[int]]


def make_base(folder: Path) -> Path:
    """A llama of two layers with biases, whose layers weigh more than its embeddings: each method then has something to
    change, and what was asked is heard in the answer."""
    sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
    from safetensors.torch import load_file, save_file

    from run.tiny import write_model

    file = write_model(folder, mlp_bias=True) / "model.safetensors"
    tensors = {
        name: LOUDER * tensor if ".layers." in name and tensor.ndim == 2 else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


class Signers:
    """Makes adapters of one base, one after the other; no two that answer alike."""

    def __init__(self, base: Path) -> None:
        from topwork.adapters.graft import Adapters
        from topwork.generation.engine import Engine, EngineSettings
        from topwork.generation.registry import Registry
        from topwork.models.config import ModelConfig
        from topwork.models.load import load_base

        config = ModelConfig(model_name_or_path=str(base), dtype="float32", device="cpu")
        self.base = load_base(config, lambda _: None)
        self._made = load_base(config, lambda _: None)  # what adapters are made on
        self.registry = Registry(self.base, Adapters(self.base.module, self.base.tokenizer))
        self.engine = Engine(self.base, EngineSettings(batch_size=1), contents=self.registry.contents)
        self.prompts = [list(self.base.tokenizer(text)["input_ids"]) for text in PROMPTS]
        self.base_answers = self._answers(None)
        self._said = {tuple(answer) for answer in self.base_answers}

    def make(self, place: Path, count: int) -> list[Signed]:
        """Below this folder, called v0, v1, …; of all kinds in turn."""
        found: list[Signed] = []
        for seed in self._seeds():
            if len(found) == count:
                break
            folder = place / f"v{len(found)}"
            self._write(folder, KINDS[len(found) % len(KINDS)], seed)
            entry = self.registry.install(self.registry.prepare("made", folder))
            assert entry.version is not None
            answers = self._answers(entry.version.adapter)
            self.registry.unload("made")
            own = {tuple(answer) for answer in answers}
            if not own & self._said:
                self._said |= own
                found.append(Signed(folder, entry.content.rpartition(":")[2][:12], answers))
        return found

    def _seeds(self) -> Iterator[int]:
        yield from range(1, 1_000_000)

    def _answers(self, adapter: str | None) -> list[list[int]]:
        """Each prompt alone, nothing of it cached."""
        from topwork.generation.requests import Request
        from topwork.generation.sampling import Sampling

        found = []
        for prompt in self.prompts:
            self.engine.submit(Request(prompt, adapter, sampling=Sampling(max_new_tokens=TOKENS), salt=str(adapter)))
            events = [event for _ in iter(lambda: self.engine.busy, False) for event in self.engine.step()]
            found.append([event.token for event in events if event.token is not None])
        return found

    def _write(self, folder: Path, kind: Mapping[str, Any], seed: int) -> None:
        import torch

        from topwork.adapters.config import AdapterConfig
        from topwork.adapters.graft import Adapters
        from topwork.adapters.peft_format import BaseId, write_adapter

        adapters = Adapters(self._made.module, self._made.tokenizer)
        adapters.add("made", AdapterConfig(**kind), seed=seed)
        generator, noise = torch.Generator().manual_seed(seed), NOISE.get(kind.get("method", ""), 0.5)
        with torch.no_grad():
            for parameter in adapters.parameters("made").values():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        write_adapter(folder, adapters, "made", BaseId(self._made.name, self._made.fingerprint))
        adapters.remove("made")
