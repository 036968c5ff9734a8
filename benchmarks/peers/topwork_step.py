"""A base with an adapter, and rows as passes: what Topwork's training step takes, for benchmarks that look into it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.data.config import DataConfig
from topwork.data.examples import Example, load_data
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.objectives.sft import Sft
from topwork.ops.batch import Batch
from topwork.quantization.config import QuantizationConfig
from topwork.run.folder import ADAPTER_NAME
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

    def passes(self, examples: Sequence[Example], tokens_per_pass: int) -> list[Batch]:
        """The rows dealt to all adapters, in their order."""
        names = list(self.adapters.configs)
        cuts = [len(examples) * at // len(names) for at in range(len(names) + 1)]
        groups = [(name, examples[start:stop]) for name, start, stop in zip(names, cuts, cuts[1:])]
        return step_passes([group for group in groups if group[1]], tokens_per_pass, self.base.device)

    def step(self, passes: Sequence[Batch], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> StepResult:
        """A step of the only adapter."""
        learner = Learner(ADAPTER_NAME, Sft(), list(self.parameters.values()), optimizer, max_grad_norm)
        [result] = self.steps([learner], passes)
        return result

    def learner(self, name: str) -> Learner:
        """One of the adapters with an optimizer of its own."""
        parameters = list(self.adapters.parameters(name).values())
        return Learner(name, Sft(), parameters, torch.optim.AdamW(parameters, lr=2e-4, fused=True), 1.0)

    def steps(self, learners: Sequence[Learner], passes: Sequence[Batch]) -> list[StepResult]:
        """A step of each."""
        found = []
        for result in train_step(self.base, learners, passes):
            if isinstance(result, Exception):
                raise result
            found.append(result)
        return found


def open_adapted(
    model: str, r: int, lora_alpha: int, dtype: str = "bfloat16", nf4: bool = False, others: Sequence[int] = ()
) -> Trained:
    """A model with a fresh adapter on all linear layers, as `topwork train` has it, and `others` of those ranks."""
    config = ModelConfig.model_validate({"model_name_or_path": model, "dtype": dtype, "device": "cpu"})
    base = load_base(config, quiet, QuantizationConfig(load_in_4bit=nf4))
    with torch.no_grad():  # in fp32 the same weights as in bf16
        for parameter in base.module.parameters() if dtype == "float32" else ():
            parameter.copy_(parameter.bfloat16())
    adapters = Adapters(base.module)
    adapters.add(ADAPTER_NAME, AdapterConfig(r=r, lora_alpha=lora_alpha), seed=0)
    for number, rank in enumerate(others):
        adapters.add(f"other{number}", AdapterConfig(r=rank, lora_alpha=2 * rank), seed=0)
    return Trained(base, adapters)


def read_examples(base: Base, rows: str, max_length: int) -> list[Example]:
    """Rows of a file of chats, in its order."""
    config = DataConfig.model_validate(
        {"train": rows, "eval_fraction": 0.0, "max_length": max_length, "too_long": "truncate"}
    )
    return list(load_data(config, base.tokenizer, base.context_length, 0, quiet).train)


def quiet(_: str) -> None:
    """Nobody reads along."""
