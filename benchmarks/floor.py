"""The floor of LoRA training: the matrix products that nobody can leave out, at the machine's measured matrix speed.

Floating-point operations of a step over sequences of l_1, l_2, ... tokens, of which a share p is learned:

    F_min per token = 4 N_layers + 4 p V d + 6 P + 6 L d_attn S_eff        S_eff = sum l^2 / sum l

N_layers  weights of the linear layers. Forward 2 N, the input's gradient 2 N; a frozen base has no gradient of its own
V d       the output head, on learned positions alone, forward and back
P         the adapter's parameters: r (in + out) for each adapted layer. Forward, input's gradient, own gradient
L d_attn  layers times the width of all query heads. Causal: a token attends to half of its sequence on average, two
          products going forward (2 L d_attn S), four going backward (4 L d_attn S); nothing is counted twice for a
          softmax computed again

What is no product (norms, softmax, optimizer, copies) counts as free, and skinny products as fast as the widest ones:
the floor cannot be reached. The speed is measured on the model's own shapes with 2,048 rows in bf16, all threads:

    python -m floor FOLDER LEARNED_SHARE [SECONDS_PER_SHAPE]      (in benchmarks/; prints one JSON line)
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS = 2048
TURNS = 5
SECONDS_PER_SHAPE = 0.15
"""How long a shape is multiplied in one turn, at least once."""

Lengths = Sequence[tuple[int, int]]
"""Each sequence's tokens, and how many of them are learned."""


@dataclass(frozen=True)
class Shape:
    """What the floor needs of a model.

    linear     (inputs, outputs, how many such layers), the head apart
    head       (hidden size, vocabulary)
    attention  (layers, width of all query heads)
    """

    linear: tuple[tuple[int, int, int], ...]
    head: tuple[int, int]
    attention: tuple[int, int]

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Shape":
        """From what `asdict` and JSON make of it."""
        linear = tuple((inputs, outputs, count) for inputs, outputs, count in values["linear"])
        return cls(linear, tuple(values["head"]), tuple(values["attention"]))


def floor_flops(shape: Shape, lengths: Lengths, r: int) -> dict[str, float]:
    """F_min of these sequences, all of them together, by part; LoRA of rank r on every linear layer."""
    tokens, learned = (sum(column) for column in zip(*lengths))
    weights = sum(inputs * outputs * count for inputs, outputs, count in shape.linear)
    adapter = r * sum((inputs + outputs) * count for inputs, outputs, count in shape.linear)
    layers, width = shape.attention
    return {
        "layers": 4.0 * weights * tokens,
        "head": 4.0 * shape.head[0] * shape.head[1] * learned,
        "adapter": 6.0 * adapter * tokens,
        "attention": 6.0 * layers * width * sum(length**2 for length, _ in lengths),
    }


def floor_report(measured: Sequence[dict[str, Any]], lengths: Lengths, r: int) -> dict[str, Any]:
    """The floor in tokens per second, from what `measure` found (once per round) and a job's sequences."""
    parts = floor_flops(Shape.of(measured[0]["shape"]), lengths, r)
    tokens = sum(length for length, _ in lengths)
    speed = median(turn["flops_per_second"] for turn in measured)
    peak = max((turn["peak"] for turn in measured), key=lambda found: found["flops_per_second"])
    flops = sum(parts.values())
    return {
        "tokens": tokens,
        "flops_per_token": flops / tokens,
        "parts_per_token": {name: value / tokens for name, value in parts.items()},
        "attended_length": sum(length**2 for length, _ in lengths) / tokens,
        "flops_per_second": speed,
        "flops_per_second_by_round": [turn["flops_per_second"] for turn in measured],
        "load_before": [turn.get("load_before") for turn in measured],
        "peak": peak,
        "tokens_per_second": speed * tokens / flops,
        "tokens_per_second_at_peak": peak["flops_per_second"] * tokens / flops,
    }


def shape_of(folder: str) -> Shape:
    """The shape of a folder's model, or of a shipped shape's."""
    from topwork.plan.built import config_of

    return shape_of_config(config_of(folder))


def shape_of_config(given: "PretrainedConfig") -> Shape:
    """A model's shape from its config, without weights."""
    from topwork.adapters.graft import bare_base
    from topwork.models.skeleton import skeleton
    from topwork.quantization.kinds import LINEAR, features

    model = skeleton(given)
    config, bare = model.config.get_text_config(), bare_base(model)
    counts: dict[tuple[int, int], int] = {}
    for path, module in bare.modules.items():
        if isinstance(module, LINEAR) and path != bare.head:
            counts[features(module)] = counts.get(features(module), 0) + 1
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        tuple((*size, count) for size, count in counts.items()),
        (config.hidden_size, config.vocab_size),
        (config.num_hidden_layers, width * config.num_attention_heads),
    )


def measure(shape: Shape, learned_share: float, seconds: float = SECONDS_PER_SHAPE) -> dict[str, Any]:
    """The machine's bf16 speed on the model's products, forward (x W') and back (dy W), as much of each as a step has.

    In every turn each product's time is the median of its calls; the best turn counts.
    """
    import torch

    parts = [(inputs, outputs, float(count)) for inputs, outputs, count in shape.linear]
    products = [*parts, (*shape.head, learned_share)]
    turns: list[dict[tuple[int, int, int], float]] = [{} for _ in range(TURNS)]
    for inputs, outputs, _ in products:
        x, w, y = (torch.randn(n, m).bfloat16() for n, m in ((ROWS, inputs), (outputs, inputs), (ROWS, outputs)))
        torch.mm(x, w.t(), out=y)  # the first call builds the kernel and touches the memory
        torch.mm(y, w, out=x)
        for turn in turns:
            turn[ROWS, inputs, outputs] = call_seconds(partial(torch.mm, x, w.t(), out=y), seconds)
        for turn in turns:
            turn[ROWS, outputs, inputs] = call_seconds(partial(torch.mm, y, w, out=x), seconds)
    flops = sum(4.0 * ROWS * inputs * outputs * count for inputs, outputs, count in products)
    rates = [flops / weighted_seconds(turn, products) for turn in turns]
    best = turns[rates.index(max(rates))]
    by_shape = {key: 2.0 * key[0] * key[1] * key[2] / spent for key, spent in best.items()}
    peak = max(by_shape, key=lambda key: by_shape[key])
    return {
        "shape": asdict(shape),
        "flops_per_second": max(rates),
        "turns": rates,
        "peak": {"shape": list(peak), "flops_per_second": by_shape[peak]},
        "by_shape": [[*key, rate] for key, rate in by_shape.items()],
        "threads": torch.get_num_threads(),
    }


def weighted_seconds(spent: dict[tuple[int, int, int], float], products: Sequence[tuple[int, int, float]]) -> float:
    """One pass of ROWS tokens through all products, forward and back."""
    return sum(
        (spent[ROWS, inputs, outputs] + spent[ROWS, outputs, inputs]) * count for inputs, outputs, count in products
    )


def call_seconds(call: Callable[[], Any], seconds: float) -> float:
    """A call's median time."""
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    print(json.dumps(measure(shape_of(sys.argv[1]), float(sys.argv[2]), *map(float, sys.argv[3:4]))))
