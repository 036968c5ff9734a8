"""A base with an adapter, and rows as passes: what Topwork's training step takes, for benchmarks that look into it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.data.config import DataConfig
from topwork.data.examples import Example, load_data
from topwork.models.base import Base, load_base
from topwork.models.config import ModelConfig
from topwork.ops.stream import Stream
from topwork.quantization.config import QuantizationConfig
from topwork.run.folder import ADAPTER_NAME
from topwork.training.objective import Sft
from topwork.training.passes import step_passes
from topwork.training.step import Learner, StepResult, train_step


@dataclass(frozen=True)
class Trained:
    """A frozen base and its one adapter."""

    base: Base
    adapters: Adapters

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """By PEFT's names without the prefix."""
        return self.adapters.parameters(ADAPTER_NAME)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the adapter's tensors."""
        self.adapters.load(ADAPTER_NAME, tensors)

    def passes(self, examples: Sequence[Example], tokens_per_pass: int) -> list[Stream]:
        return step_passes([(ADAPTER_NAME, examples)], tokens_per_pass, self.base.device)

    def step(self, passes: Sequence[Stream], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> StepResult:
        learner = Learner(ADAPTER_NAME, Sft(), list(self.parameters.values()), optimizer, max_grad_norm)
        [result] = train_step(self.base, [learner], passes)
        if isinstance(result, Exception):
            raise result
        return result


def open_adapted(model: str, r: int, lora_alpha: int, dtype: str = "bfloat16", nf4: bool = False) -> Trained:
    """A model with a fresh adapter on all linear layers, as `topwork train` has it."""
    config = ModelConfig.model_validate({"model_name_or_path": model, "dtype": dtype, "device": "cpu"})
    base = load_base(config, quiet, QuantizationConfig(load_in_4bit=nf4))
    with torch.no_grad():  # in fp32 the same weights as in bf16
        for parameter in base.module.parameters() if dtype == "float32" else ():
            parameter.copy_(parameter.bfloat16())
    adapters = Adapters(base.module)
    adapters.add(ADAPTER_NAME, AdapterConfig(r=r, lora_alpha=lora_alpha), seed=0)
    return Trained(base, adapters)


def read_examples(base: Base, rows: str, max_length: int) -> list[Example]:
    """Rows of a file of chats, in its order."""
    config = DataConfig.model_validate(
        {"train": rows, "eval_fraction": 0.0, "max_length": max_length, "too_long": "truncate"}
    )
    return list(load_data(config, base.tokenizer, base.context_length, 0, quiet).train)


def quiet(_: str) -> None:
    """Nobody reads along."""
