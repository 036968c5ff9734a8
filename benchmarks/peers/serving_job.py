"""What all arms of `serving_speed.py` start from: prompts, adapters, and the same weights in the files that each reads.

    python -m peers.serving_job MODEL QUESTIONS WORK OPTIONS      (in benchmarks/; OPTIONS are fields of ServingJob)

QUESTIONS is a file of chats. Prints where the job is.
"""

import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SEQUENCES = 16
ADAPTERS = 8


@dataclass(frozen=True)
class ServingJob:
    """The same work for every arm.

    folder    the model as transformers reads it
    adapters  PEFT folders
    files     by name (bf16, f16, q4_0, packaged, and a0 … for adapters): GGUF
    prompts   token ids, 16 for each round and the one before all that warms up
    tokens    how long answers are; none ends before
    """

    model: str
    title: str
    folder: str
    adapters: list[str]
    files: dict[str, str]
    prompts: list[list[int]]
    tokens: int

    def of_round(self, number: int) -> list[list[int]]:
        """Its prompts; the round before the first is -1."""
        at = (number + 1) * SEQUENCES
        return self.prompts[at : at + SEQUENCES]

    @classmethod
    def read(cls, path: str) -> "ServingJob":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def main(model: str, questions: str, work: str, options: str) -> None:
    import torch
    from gguf import GGMLQuantizationType as Kind
    from peers.gguf_files import write_adapter, write_model
    from transformers import AutoModelForCausalLM

    from common import model_title, read_chats
    from topwork.models.config import ModelConfig
    from topwork.models.load import load_base
    from topwork.models.source import EMBEDDED, find_source

    given, place = json.loads(options), Path(work)
    config = ModelConfig(model_name_or_path=model, device="cpu")
    base = load_base(config, lambda _: None)
    chats = read_chats(questions)[: SEQUENCES * (given["rounds"] + 1)]
    prompts = [
        base.tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    folders = write_adapters(base, place)
    plain = AutoModelForCausalLM.from_pretrained(find_source(config, print).folder, dtype=torch.bfloat16)
    files: dict[str, str] = {}
    if given["gguf"] and base.name in EMBEDDED:
        package, file = EMBEDDED[base.name]
        found = find_spec(package)
        assert found is not None
        assert found.origin is not None
        like = Path(found.origin).parent / file
        files = {"packaged": str(like)}
        kinds = {"bf16": (Kind.BF16, Kind.BF16), "f16": (Kind.F16, Kind.F16), "q4_0": (Kind.Q4_0, Kind.F16)}
        for name, (kind, head) in kinds.items():
            files[name] = str(write_model(place / f"{name}.gguf", plain, like, kind, head))
        for number, folder in enumerate(folders):
            files[f"a{number}"] = str(write_adapter(place / f"a{number}.gguf", Path(folder), plain.config))
    job = ServingJob(
        model, model_title(base.name), find_source(config, print).folder, folders, files, prompts, given["tokens"]
    )
    (place / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    print(json.dumps({"job": str(place / "job.json"), "model": job.title, "prompt_tokens": [len(p) for p in prompts]}))


def write_adapters(base: Any, place: Path) -> list[str]:
    """Eight LoRA of rank 16 on all linear layers, B small enough that answers stay sentences."""
    import torch

    from topwork.adapters.config import AdapterConfig
    from topwork.adapters.graft import Adapters
    from topwork.adapters.peft_format import BaseId, write_adapter

    adapters, folders = Adapters(base.module), []
    for number in range(ADAPTERS):
        adapters.add("made", AdapterConfig(r=16, lora_alpha=32), seed=number)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in adapters.parameters("made").items():
            if "lora_B" in name:
                parameter.data.normal_(0.0, 0.01, generator=generator)
        folders.append(str(place / f"a{number}"))
        write_adapter(Path(folders[-1]), adapters, "made", BaseId(base.name, base.fingerprint))
        adapters.remove("made")
    return folders


if __name__ == "__main__":
    main(*sys.argv[1:5])
