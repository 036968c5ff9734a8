"""A model folder of a well-known shape with random weights: speed and memory do not ask what a model has learned.

    python benchmarks/random_base.py OUT --shape llama-3.2-1b [--layers 4] [--tokenizer smollm2-135m] [--seed 0]

Shapes are those of src/topwork/models/shapes. Weights are normal with standard deviation 0.02 in bf16, norms are one,
biases zero; head and embedding are tied where the config ties them. The tokenizer of a small model stands beside them,
so that real text runs: its ids are valid in a vocabulary that is no smaller.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig

from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_names
from topwork.models.skeleton import skeleton
from topwork.models.source import find_source
from topwork.plan.built import config_of

SHARD_BYTES = 1 << 29
"""A shard holds this much, or one tensor that is larger: no more is in memory at a time."""
STD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=shape_names(), default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config = config_of(given.shape)
    if given.layers:
        config.num_hidden_layers = given.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: given.layers]
    tokenizer = AutoTokenizer.from_pretrained(
        find_source(ModelConfig(model_name_or_path=given.tokenizer), lambda _: None).folder
    )
    if len(tokenizer) > config.vocab_size:
        parser.error(f"the tokenizer has {len(tokenizer):,} tokens, and {given.shape} has {config.vocab_size:,}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    given.out.mkdir(parents=True, exist_ok=True)
    written = write_weights(given.out, config, given.seed)
    tokenizer.save_pretrained(given.out)
    print(f"{given.out}: {given.shape}, {config.num_hidden_layers} layers, {written:,} bytes of weights")


def write_weights(folder: Path, config: PretrainedConfig, seed: int) -> int:
    """config.json and the shards; returns the weights' bytes."""
    config.dtype = torch.bfloat16
    model = skeleton(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generator, places, total = torch.Generator().manual_seed(seed), {}, 0
    shards = list(shards_of(model))
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: drawn(name, model.get_parameter(name), generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def shards_of(model: nn.Module) -> Iterator[list[str]]:
    """The parameters' names, tied ones once, in parts of SHARD_BYTES."""
    names: list[str] = []
    held = 0
    for name, parameter in model.named_parameters():
        if names and held + 2 * parameter.numel() > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += 2 * parameter.numel()
    if names:
        yield names


def drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor's first values, on the generator's device: biases zero, other vectors (norms) one, matrices random."""
    tensor = torch.empty(like.shape, dtype=torch.bfloat16, device=generator.device)
    if like.dim() == 1:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    return tensor.normal_(0.0, STD, generator=generator)


if __name__ == "__main__":
    main()
