"""What was written, read again: by the reader itself where it is at hand, by our own reader always, and compared."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from topwork.adapters.fitting import Parts, state_of
from topwork.adapters.lowrank import LowRankUpdate, low_rank_updates
from topwork.adapters.method import Bare
from topwork.adapters.on_base import Stored
from topwork.adapters.peft_format import read_adapter
from topwork.common.errors import RunError
from topwork.export.lowered import Lowered
from topwork.export.preflight import exported_parts
from topwork.models.quiet import without_bars
from topwork.models.source import Source

LARGEST, LEAST = 1e-4, 1e-5
"""How far logits in fp32 may lie apart, relative to the largest: a twentieth of what the adapter moves them by, no more
than LARGEST and no less than LEAST, which rounding makes of two ways to compute them."""
UPDATES = 1e-6
"""The same for updates that were read again: a few roundings in fp32."""

RELATIVE, NATS = "of the largest", "nats"


@dataclass(frozen=True)
class ReadBack:
    """by          who read it
    prompts     on how many prompts the logits were compared; 0 where updates were compared instead
    largest     the largest difference, in `unit`
    moved       by how much the adapter moves the base's logits, in the same measure; None where updates were compared
    unit        of logits or updates, relative to the largest; or of log-probabilities, in nats
    details     more, as the reader's own check has it
    """

    by: str
    prompts: int
    largest: float
    moved: float | None = None
    unit: str = RELATIVE
    details: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """For people; what rounding does not explain is an error and has none."""
        if not self.prompts:
            return f"{self.by}: updates {self.largest:.1e} apart, which rounding explains"
        moved = "" if self.moved is None else f" (the adapter moves them by {self.moved:.1e})"
        if self.unit == NATS:
            told = f"log-probabilities {self.largest:.1e} nats apart at most, which rounding explains{moved}"
            return f"{self.by} on {self.prompts} prompts: {told}"
        told = f"logits {self.largest:.1e} of the largest apart, which rounding explains{moved}"
        return f"{self.by} on {self.prompts} prompts: {told}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def reread(folder: Path, bare: Bare, adapter: Lowered | Parts) -> ReadBack:
    """By our own reader, on the base's skeleton: each module's update against what was to be written. Raises RunError
    where they are apart."""
    _, parts = exported_parts(read_adapter(folder), bare, _nothing)
    if isinstance(adapter, Lowered):
        found = low_rank_updates(parts)
        pairs = [(found[path], update) for path, update in adapter.updates.items()]
        largest = max(_apart(*pair) for pair in pairs) if found.keys() == adapter.updates.keys() else float("inf")
    else:
        ours, theirs = state_of(adapter), state_of(parts)
        alike = ours.keys() == theirs.keys() and all(torch.equal(theirs[key], ours[key].float()) for key in ours)
        largest = 0.0 if alike else float("inf")
    return _checked(ReadBack("Topwork", 0, largest), UPDATES)


@dataclass(frozen=True)
class Asked:
    """Prompts [n] of token ids, and the fp32 logits [n, V] of each: of the base with the adapter, and of the base."""

    prompts: Sequence[Tensor]
    ours: Sequence[Tensor]
    bare: Sequence[Tensor]


def by_peft(folder: Path, source: Source, trust_remote_code: bool, asked: Asked) -> ReadBack:
    """By PEFT, on the base in fp32 as transformers loads it. Raises RunError where the logits are apart. Only where
    PEFT is installed (`has_peft`)."""
    with without_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT calls; what matters are the logits
        peft: Any = import_module("peft")
        base = AutoModelForCausalLM.from_pretrained(
            source.folder, revision=source.revision, trust_remote_code=trust_remote_code, dtype=torch.float32
        ).eval()
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        theirs = [_logits(model, prompt) for prompt in asked.prompts]
    moved = _furthest(asked.bare, asked.ours)
    found = ReadBack(f"PEFT {peft.__version__}", len(theirs), _furthest(theirs, asked.ours), moved)
    return _checked(found, min(LARGEST, max(LEAST, moved / 20)))


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return find_spec("peft") is not None


@torch.no_grad()
def _logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """Of the prompt's own tokens; learned ones may stand before them."""
    given = prompt[None]
    return model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -len(prompt) :].float()


def _nothing() -> Stored:
    raise RunError("what was written needs the base's weights to be read. This is a defect of the export")


def _furthest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted, strict=True))


def _apart(found: LowRankUpdate, wanted: LowRankUpdate) -> float:
    """|B A - B' A'| / |B' A'|, by the factors alone."""
    size = _norm(wanted.b, wanted.a)
    distance = _norm(torch.cat([found.b, -wanted.b], 1), torch.cat([found.a, wanted.a]))
    return distance / size if size else distance


def _norm(b: Tensor, a: Tensor) -> float:
    """Of B A, as that of R_B R_A' with B = Q_B R_B and A' = Q_A R_A."""
    left, right = torch.linalg.qr(b.double(), "r").R, torch.linalg.qr(a.double().t(), "r").R
    return float((left @ right.t()).norm())


def _checked(found: ReadBack, most: float) -> ReadBack:
    if not found.largest <= most:
        on = f"on {found.prompts} prompts its logits are" if found.prompts else "its updates are"
        raise RunError(
            f"{found.by} reads something else than was to be written: {on} {found.largest:.1e} of the largest value "
            f"away, and {most:.0e} is what rounding explains. Nothing was written"
        )
    return found
