"""The optimizers a recipe can name, and what their state weighs.

`AdamW8bit` is bitsandbytes' AdamW8bit in formula, codes and constants: moments m and v are kept as 8-bit codes with one
fp32 constant for each block of 256 values, blocks start anew with each tensor, and tensors of fewer than 4,096 values
keep moments in fp32. Each step, in fp32, with learning rate l, decay w and step count t:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = (1 - l w) p - l / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Parameters are updated from m and v as computed; the codes are what the next step starts from.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from topwork.ops.blockwise8 import dequantize_blockwise, dynamic_map, quantize_blockwise, rounding_table
from topwork.training.config import TrainingConfig
from topwork.training.pages import DeviceStore, FileStore, PinnedStore, StateStore

BLOCK = 256
MIN_8BIT_SIZE = 4096
WINDOW = 1 << 24
"""Parameters whose state visits the device together: 64 MiB of them in fp32."""

_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Parameters updated at a time: on the CPU what its cache holds, on a GPU what keeps it busy."""
_B_NAMES = ("lora_B.weight", "lora_embedding_B")
_FIELDS_8BIT = {
    "exp_avg": (torch.uint8, 1),
    "exp_avg_sq": (torch.uint8, 1),
    "exp_avg_absmax": (torch.float32, BLOCK),
    "exp_avg_sq_absmax": (torch.float32, BLOCK),
}
_FIELDS_32BIT = {"exp_avg": (torch.float32, 1), "exp_avg_sq": (torch.float32, 1)}
"""The state's tensors: their dtype, and how many parameters share one value."""


class _Flat:
    """The state of one group's parameters that are kept alike: one flat tensor a field, each parameter's part starting
    at a multiple of BLOCK."""

    def __init__(self, parameters: Sequence[Tensor], group: dict[str, Any], eight_bit: bool, home: StateStore) -> None:
        self.parameters, self.group, self.eight_bit = parameters, group, eight_bit
        self.starts, total = [], 0
        for parameter in parameters:
            self.starts.append(total)
            total += _aligned(parameter.numel())
        self.shares = _fields(eight_bit)
        self.fields = {name: home.reserve(total // share, dtype) for name, (dtype, share) in self.shares.items()}

    def slices(self, start: int, stop: int) -> dict[str, Tensor]:
        """The state of parameters start..stop; `start` is a multiple of BLOCK."""
        return {name: self.fields[name][start // share : -(-stop // share)] for name, (_, share) in self.shares.items()}

    def state_of(self, index: int) -> dict[str, Tensor]:
        """One parameter's state, as views: moments in its shape, constants flat."""
        parameter, start = self.parameters[index], self.starts[index]
        views = self.slices(start, start + parameter.numel())
        shaped = {name: views[name].view(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros(()), **views, **shaped}


@dataclass(frozen=True)
class _Chunk:
    """Parts of neighbouring parameters that are updated together: flat views of them and of their gradients.

    `start` and `stop` are where their state lies in `flat`; all parts but the last are multiples of BLOCK long.
    """

    flat: _Flat
    step: float
    start: int
    stop: int
    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments; see the module's docstring.

    All state is tensors: `step` on the host, `exp_avg` and `exp_avg_sq` in the parameter's shape (codes uint8, or fp32
    for small tensors), `exp_avg_absmax` and `exp_avg_sq_absmax` [blocks]. They are views of a few large tensors and are
    to be filled in place. Parameters must be contiguous floats on one device. Raises ValueError where they are not.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._flats: list[_Flat] = []
        self._home: StateStore | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if self._home is None:
            self._device = group["params"][0].device
            self._home = self._make_home(self._device)
            self._maps = [dynamic_map(signed).to(self._device) for signed in (True, False)]
            self._tables = [rounding_table(code) for code in self._maps]
        for parameter in group["params"]:
            if not (parameter.is_contiguous() and parameter.is_floating_point() and parameter.device == self._device):
                raise ValueError(
                    f"a parameter {tuple(parameter.shape)} of {parameter.dtype} on {parameter.device} was given; "
                    f"{type(self).__name__} takes contiguous floats, all on one device (here {self._device})"
                )
        for eight_bit in (True, False):
            alike = [p for p in group["params"] if (p.numel() >= MIN_8BIT_SIZE) == eight_bit]
            flat = _Flat(alike, group, eight_bit, self._home)
            self.state.update({parameter: flat.state_of(index) for index, parameter in enumerate(alike)})
            self._flats.append(flat)

    def _make_home(self, device: torch.device) -> StateStore:
        return DeviceStore(device)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self._home is not None
        windows = [window for flat in self._flats for window in _windows(self._chunks(flat))]
        homes = [list(chunks[0].flat.slices(chunks[0].start, chunks[-1].stop).values()) for chunks in windows]
        for lent, chunks in zip(self._home.visit(homes), windows):  # the visit first: it ends what the last began
            shares = [share for _, share in chunks[0].flat.shares.values()]
            for chunk in chunks:
                first, last = chunk.start - chunks[0].start, chunk.stop - chunks[0].start
                self._update(chunk, [part[first // share : -(-last // share)] for part, share in zip(lent, shares)])
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Fill the state in place, each tensor in its exact dtype. Learning rates and the like come along."""
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the state was saved for other parameter groups; make the optimizer as it was then")
        for group, entry in zip(self.param_groups, saved):
            for index, parameter in zip(entry["params"], group["params"]):
                for key, value in state_dict["state"][index].items():
                    self.state[parameter][key].copy_(value)
            group.update({key: value for key, value in entry.items() if key != "params"})

    def _chunks(self, flat: _Flat) -> Iterator[_Chunk]:
        """Every part of `flat` that has a gradient, in order; its parameters' steps are counted."""
        longest = _CHUNK.get(self._device.type, 1 << 20)
        run: list[tuple[int, Tensor, Tensor]] = []
        run_step = 0.0
        for parameter, start in zip(flat.parameters, flat.starts):
            if parameter.grad is None:
                continue
            step = float(self.state[parameter]["step"].add_(1))
            weights, gradients = parameter.detach().view(-1), parameter.grad.reshape(-1)
            for first, (weight, gradient) in enumerate(zip(weights.split(longest), gradients.split(longest))):
                at = start + first * longest
                stop = run[-1][0] + run[-1][1].numel() if run else at
                if run and (stop != at or step != run_step or at + weight.numel() - run[0][0] > longest):
                    yield _chunk(flat, run_step, run)
                    run = []
                run.append((at, weight, gradient))
                run_step = step
        if run:
            yield _chunk(flat, run_step, run)

    def _update(self, chunk: _Chunk, state: Sequence[Tensor]) -> None:
        gradients, weights = _joined(chunk.gradients), _joined(chunk.weights)
        if chunk.flat.eight_bit:
            self._update_8bit(weights, gradients, state, chunk.flat.group, chunk.step)
        else:
            _update_32bit(weights, gradients, state, chunk.flat.group, chunk.step)
        at = 0
        for target in chunk.weights:
            if target.data_ptr() != weights.data_ptr():
                target.copy_(weights[at : at + target.numel()])
            at += target.numel()

    def _update_8bit(
        self, weights: Tensor, gradients: Tensor, state: Sequence[Tensor], group: Mapping[str, Any], step: float
    ) -> None:
        """The operations and their order are bitsandbytes' (backends/cpu/ops.py), so that rounding is too."""
        (beta1, beta2), rate = group["betas"], float(group["lr"])
        codes, constants = state[:2], state[2:]
        first, second = (dequantize_blockwise(*of) for of in zip(codes, constants, self._maps, (BLOCK, BLOCK)))
        first.mul_(beta1).add_(gradients, alpha=1.0 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1.0 - beta2)
        denominator = (second.sqrt() / math.sqrt(1.0 - beta2**step)).add_(group["eps"])
        if group["weight_decay"] > 0.0:
            weights.mul_(1.0 - rate * group["weight_decay"])
        weights.addcdiv_(first, denominator, value=-rate / (1.0 - beta1**step))
        for index, moment in enumerate((first, second)):
            quantized, absmax = quantize_blockwise(moment, self._maps[index], BLOCK, self._tables[index])
            codes[index].copy_(quantized)
            constants[index].copy_(absmax)


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose state lives in page-locked host memory (CUDA) or in an unnamed file in `folder`, left out in the
    system's temporary folder (CPU), and visits the device in windows of `WINDOW` parameters. Same results, bit for bit.

    Raises RunError where there is no room for the state.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        super().__init__(params, lr, betas, eps, weight_decay)

    def _make_home(self, device: torch.device) -> StateStore:
        return PinnedStore(device) if device.type == "cuda" else FileStore(self._folder)


def parameter_groups(config: TrainingConfig, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Parameters by name as an optimizer's groups, each with its `names` in order and its `lr_ratio`.

    With `loraplus_lr_ratio` LoRA's B matrices are a group of their own, the second (Hayou et al., arXiv 2402.12354).
    """
    ratio = config.loraplus_lr_ratio
    fast = [name for name in parameters if ratio is not None and name.endswith(_B_NAMES)]
    slow = [name for name in parameters if name not in set(fast)]
    return [
        {"params": [parameters[name] for name in names], "names": names, "lr_ratio": factor}
        for names, factor in ((slow, 1.0), (fast, ratio))
        if names
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step, in each group times its `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def make_optimizer(
    config: TrainingConfig, parameters: Iterable[Tensor] | Iterable[dict[str, Any]], folder: Path | None = None
) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` names, for float parameters on one device, or groups of them.

    `folder` is where a paged state's file may lie, should it need one. Raises RunError where there is no room for it.
    """
    given: Any = list(parameters)
    betas = (config.adam_beta1, config.adam_beta2)
    rate, eps, decay = config.learning_rate, config.adam_epsilon, config.weight_decay
    match config.optim:
        case "adamw":
            return torch.optim.AdamW(given, lr=rate, betas=betas, eps=eps, weight_decay=decay, fused=True)
        case "adamw_8bit":
            return AdamW8bit(given, rate, betas, eps, decay)
        case "paged_adamw_8bit":
            return PagedAdamW8bit(given, rate, betas, eps, decay, folder)


def _fields(eight_bit: bool) -> dict[str, tuple[torch.dtype, int]]:
    return _FIELDS_8BIT if eight_bit else _FIELDS_32BIT


def _aligned(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _windows(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    window: list[_Chunk] = []
    for chunk in chunks:
        if window and chunk.stop - window[0].start > WINDOW:
            yield window
            window = []
        window.append(chunk)
    if window:
        yield window


def _chunk(flat: _Flat, step: float, run: Sequence[tuple[int, Tensor, Tensor]]) -> _Chunk:
    starts, weights, gradients = zip(*run)
    return _Chunk(flat, step, starts[0], starts[-1] + weights[-1].numel(), weights, gradients)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One flat fp32 tensor: the part itself where there is one, and it is fp32."""
    return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).float()


def _update_32bit(
    weights: Tensor, gradients: Tensor, state: Sequence[Tensor], group: Mapping[str, Any], step: float
) -> None:
    """The same formula for fp32 moments, in bitsandbytes' order of operations for them."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    first, second = state
    first.mul_(beta1).add_(gradients, alpha=1.0 - beta1)
    second.mul_(beta2).addcmul_(gradients, gradients, value=1.0 - beta2)
    correction = math.sqrt(1.0 - beta2**step)
    if group["weight_decay"] > 0.0:
        weights.mul_(1.0 - rate * group["weight_decay"])
    weights.add_(first / (second.sqrt() + group["eps"] * correction), alpha=-rate * correction / (1.0 - beta1**step))
