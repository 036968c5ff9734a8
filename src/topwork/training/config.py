"""What a recipe may say about training."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from topwork.common.options import Options, Seed
from topwork.objectives.config import ObjectiveConfig, SftConfig


def _word_or_threads(value: Any) -> Any:
    """`--set` may bring a number as text."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError("expected auto or a number of threads")


def _word_or_layers(value: Any) -> Any:
    """YAML reads a bare `off` as False, and `--set` may bring a number as text."""
    if value is False:
        return "off"
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if value in ("auto", "off", "full") or (type(value) is int and value >= 0):
        return value
    raise ValueError("expected auto, off, full or a number of layers")


Checkpointing = Annotated[Literal["auto", "off", "full"] | int, BeforeValidator(_word_or_layers)]
"""Which layers keep their input alone: none, all, as many as memory asks for, or the first so many."""

ThreadCount = Annotated[Literal["auto"] | int, BeforeValidator(_word_or_threads)]
"""How many threads compute: as many as pay, or so many."""


class TrainingConfig(Options):
    objective: ObjectiveConfig = Field(default_factory=SftConfig)
    """What is learned: a name, or a section with `name` and the objective's own options. `sft` is the log-likelihood of
    the learned tokens."""
    learning_rate: float = Field(2e-4, gt=0)
    """The peak learning rate."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """LoRA+: LoRA's B matrices learn at so many times `learning_rate` (16, for one). Left out, all learn alike."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to zero along a cosine or a line, or not at all."""
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    """The share of steps in which the learning rate rises to its peak, rounded to the nearest number of steps (a half
    up) and never all of them. The first step trains too: of w warm-up steps it takes a share of 1 / (w + 1)."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps; it goes before `warmup_ratio`. One that is as long as the run is told."""
    num_train_epochs: float = Field(1.0, gt=0)
    """How often the training rows are seen."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; it goes before `num_train_epochs`."""
    batch_size: int = Field(16, ge=1)
    """Sequences per optimizer step, over all devices."""
    tokens_per_pass: int | None = Field(None, ge=1)
    """The token budget of one forward and backward pass. It decides memory, not the result. Left out, it is chosen
    from free memory, which is a container's or a process's where those have a limit."""
    activation_checkpointing: Checkpointing = "auto"
    """Layers that keep only their input and run again going backward: less memory, more time, the same result. `off`,
    `full`, a number of layers, or `auto`: as few as let a pass fit into free memory."""
    threads: ThreadCount = "auto"
    """Threads that compute on a CPU. `auto`: as many as there are cores for the run, without those that other work
    keeps busy, and no more than torch has (OMP_NUM_THREADS); looked at before every step, and told when it changes. A
    number is held. A result's last bits may depend on it: runs beside other work that are to be the same to the bit
    name one."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """What updates the weights. `adamw` keeps 8 bytes a trained parameter, `adamw_8bit` 2.03: of an adapter's 4.9 M
    parameters that saves 28 MB, of full fine-tuning's 134.5 M 0.8 GB. `paged_adamw_8bit` keeps them in the host's
    memory (on a GPU) or in a file (on a CPU), and gives the same weights as `adamw_8bit`."""
    init_optimizer: Literal["fresh", "taken"] = "fresh"
    """With `adapter.init_from`: `fresh`, or the moments and step counts `taken` along, from the checkpoint that the
    adapter is of; a folder that is no run's has none. The learning rate, its warm-up too, begins anew."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's decoupled decay: each step takes learning_rate * weight_decay of every trained weight away."""
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """How much of the gradients' running mean is kept at each step."""
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    """How much of the squared gradients' running mean is kept at each step."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the squared gradients' mean before it divides."""
    max_grad_norm: float = Field(1.0, ge=0.0)
    """The gradient's norm is cut to this; 0 leaves it as it is."""
    eval_steps: int | None = Field(None, ge=1)
    """Validate every so many steps. Left out: ten times a run."""
    save_steps: int | None = Field(None, ge=1)
    """Write a checkpoint every so many steps. Left out: at every validation."""
    save_total_limit: int = Field(2, ge=1)
    """How many checkpoints are kept, beside the best."""
    load_best_model_at_end: bool = True
    """The run's adapter is the one with the lowest validation loss, not the last."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many validations without a lower loss."""
    logging_steps: int = Field(1, ge=1)
    """Write metrics every so many steps, and of what is left with each checkpoint."""
    report_to: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go beside `metrics.jsonl`. WANDB_PROJECT, WANDB_NAME and the like, and TENSORBOARD_LOGGING_DIR, say
    where in the environment."""
    seed: Seed = 0
    """Decides the adapter's first weights, the order of the rows, dropout and the held-out rows."""
