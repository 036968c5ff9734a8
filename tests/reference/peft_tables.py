"""A row of PEFT's tables (`peft_rows.py`) tried: PEFT makes the adapter with weights that are no longer its first and
writes its folder, Topwork reads that, and the logits of both are compared."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from reference.families import logits, sequences, tiny_model
from reference.measure import relative
from reference.peft_rows import Row
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter
from topwork.common.errors import TopworkError
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import batch_of

Kind = Literal["equal", "refused", "wrong", "PEFT refuses", "no place"]
ALLOWED = 2e-4
"""How far logits may be apart, relative, in fp32."""
SEEN = 1e-4
"""How far an adapter that does something is from the base, at least."""
SHAKEN = 0.05
LENGTHS = (9, 5)


@dataclass(frozen=True)
class Outcome:
    """What became of a row: how far the logits are apart where both gave some, or what was said."""

    row: Row
    kind: Kind
    told: str = ""
    apart: float | None = None


def outcomes(rows: Sequence[Row]) -> Iterator[Outcome]:
    """One by one, with the bases that they share."""
    for row in rows:
        yield outcome(row)


def outcome(row: Row) -> Outcome:
    """One row, tried."""
    if row.family is None:
        return Outcome(row, "no place", row.why)
    bare, base, adapters = _pair(row.family, tuple(row.values.items()))
    parts = sequences(LENGTHS)
    with warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            expected = by_peft(bare, row, Path(folder), parts)
        except Exception as error:  # whatever PEFT raises, it does not have this
            return Outcome(row, "PEFT refuses", _line(error, folder))
        try:
            load_adapter(adapters, "row", read_adapter(Path(folder)), BaseId(None))
        except TopworkError as error:
            return Outcome(row, "refused", _line(error, folder))
        found = logits(base, batch_of(parts, "row"))
        adapters.remove("row")
    apart = relative(found, expected)
    moved = relative(expected, logits(base, batch_of(parts)))
    idle = "" if moved > SEEN or "never" in row.label else "it changes nothing, so that nothing is shown"
    return Outcome(row, "equal" if apart < ALLOWED and not idle else "wrong", idle, apart)


def by_peft(bare: PreTrainedModel, row: Row, folder: Path, parts: Sequence[Tensor]) -> Tensor:
    """The logits of an adapter whose folder is written, each sequence in a call of its own."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(bare), _config(row.config, {**row.options, "task_type": "CAUSAL_LM"}))
    _shake(model)
    model.eval()
    found = []
    with torch.no_grad():
        for part in parts:
            out = model(input_ids=part[None], attention_mask=torch.ones_like(part[None]), use_cache=False)
            found.append(out.logits[0][-len(part) :])
    model.save_pretrained(str(folder))
    return torch.cat(found)


def _config(name: str, options: Mapping[str, Any]) -> Any:
    made = {
        key: _config(value[0], value[1]) if isinstance(value, tuple) else copy.deepcopy(value)
        for key, value in options.items()
    }
    return getattr(peft if hasattr(peft, name) else lora_config, name)(**made)


def _shake(model: nn.Module) -> None:
    """Trained weights are not the first ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(SHAKEN * torch.randn(parameter.shape, generator=generator))


@cache
def _pair(family: str, values: tuple[tuple[str, Any], ...]) -> tuple[PreTrainedModel, Base, Adapters]:
    """The same weights for PEFT, and as a base with adapters."""
    model = tiny_model(family, **dict(values))
    model.config.name_or_path = ""
    base = as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]
    return model, base, Adapters(base.module)


def _line(error: Exception, folder: str) -> str:
    """In one line, without the folder."""
    told = " ".join(str(error).split()).replace(f"{folder}/adapter_config.json", "it").replace(folder, "it")
    return f"{type(error).__name__}: {told}" if not isinstance(error, TopworkError) else told
