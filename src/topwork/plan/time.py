"""How long a step takes, and what a run costs: the work of `work.py` at a speed of `speeds.py`. Free of torch.

    pass = base and head at the products' rate + adapter and attention at the small products' + walked and unpacked
           bytes at the memory's + overheads of a pass and of each layer
    step = passes + update + overhead of a step

On a card the host's part of the overheads runs beside the work, so the longer of the two counts.
"""

from dataclasses import dataclass

from topwork.plan.work import Work, pass_work, update_bytes
from topwork.training.memory import PassShape, Setup


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second, and what it spends whatever the work.

    products        operations a second in products with base weights and the head
    small_products  the same in adapters' and attention's
    bytes_per_second  that element-wise passes, unpacking and updates move
    layer_seconds, pass_seconds, step_seconds  overheads: of each layer in each pass, of a pass, of a step
    beside          whether the layers' overheads run beside the work (a host that drives a card)
    fp32            the share of the products' rates that is left in fp32
    scale           what a measurement of this machine found in place of 1: times all of the above
    source          where the rates are from, for people
    """

    name: str
    products: float
    small_products: float
    bytes_per_second: float
    layer_seconds: float
    pass_seconds: float
    step_seconds: float
    source: str
    fp32: float = 0.5
    beside: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class RunCost:
    """Seconds of a run by part, and US dollars where an hour's price is known."""

    start_seconds: float
    step_seconds: float
    steps: int
    validation_seconds: float
    money: float | None

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.start_seconds + self.step_seconds * self.steps + self.validation_seconds

    @property
    def hours(self) -> float:
        """The same."""
        return self.seconds / 3600


START_SECONDS = {"cpu": 5.0, "cuda": 40.0}
"""Before the first step: imports, tokenizer and rows (docs/log.md, 2026-11-29: 5.1 s for 1,200 rows on a CPU); on a
card also CUDA itself and kernels compiled at their first use, which is a guess."""

READ_BYTES_PER_SECOND = 0.5e9
"""At which weights are read, fingerprinted and packed: 257 MiB in 0.4 s (docs/log.md, 2026-11-29), rounded down."""


def step_seconds(
    setup: Setup,
    shape: PassShape,
    checkpointed_layers: int,
    speed: Speed,
    passes: float = 1.0,
    attended: float | None = None,
) -> float:
    """An optimizer step of all members: `passes` of this shape, then their updates. `attended` is sum l^2 / sum l of
    the sequences; left out, all are as long as the longest."""
    work = pass_work(setup, shape, checkpointed_layers, attended)
    repeated = checkpointed_layers / 3
    one = _pass_seconds(setup, work, speed, setup.structure.layers + repeated)
    updates = speed.scale * (update_bytes(setup) / speed.bytes_per_second + speed.step_seconds * len(setup.members))
    return passes * one + updates


def forward_seconds(
    setup: Setup, shape: PassShape, speed: Speed, passes: float = 1.0, attended: float | None = None
) -> float:
    """`passes` of this shape without a gradient, as validation runs them."""
    work = pass_work(setup, shape, 0, attended, backward=False)
    return passes * _pass_seconds(setup, work, speed, setup.structure.layers / 3)


def start_seconds(setup: Setup, weight_bytes: float) -> float:
    """From the start to the first step, with a base of so many bytes on disk."""
    return START_SECONDS[setup.device] + weight_bytes / READ_BYTES_PER_SECOND


def run_cost(
    step: float,
    steps: int,
    validation: float = 0.0,
    validations: int = 0,
    start: float = 0.0,
    price_per_hour: float | None = None,
) -> RunCost:
    """A run of `steps` steps of `step` seconds, and `validations` of `validation` seconds."""
    cost = RunCost(start, step, steps, validation * validations, None)
    money = None if price_per_hour is None else cost.hours * price_per_hour
    return RunCost(start, step, steps, validation * validations, money)


def _pass_seconds(setup: Setup, work: Work, speed: Speed, layers: float) -> float:
    """`layers` is how many layers' forward and backward the host goes through."""
    small = work.adapter + work.attention
    rate = speed.fp32 if setup.dtype == "float32" else 1.0
    busy = (
        (work.base + work.head + work.recomputed) / (rate * speed.products)
        + small / (rate * speed.small_products)
        + (work.walked_bytes + work.unpacked_bytes) / speed.bytes_per_second
    )
    overhead = layers * speed.layer_seconds
    together = max(busy, overhead) if speed.beside else busy + overhead
    return speed.scale * (together + speed.pass_seconds)
