"""What vLLM takes of a configuration, found out before it is started: each adapter as the plain LoRA that it is, or
refused by name with the reason and what to do instead.

What there is to find, and the plain form, are `topwork export --format vllm`'s (`export/readers.py`, `preflight.py`,
`lowered.py`). What vLLM is given are folders that were written here, of tensors that were checked
(`adapters/foreign.py`); a stranger's folder it never sees.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from topwork.adapters.foreign import ForeignAdapter
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import fitted_shapes
from topwork.common.errors import AdapterError
from topwork.common.files import write_folder, write_json
from topwork.export.lowered import lowered
from topwork.export.peft import CONFIG, TENSORS, plain_config, plain_tensors
from topwork.export.preflight import Finding, needs_weights, preflight
from topwork.export.readers import VLLM, VLLM_RANKS

MERGE = "merge it (`topwork merge RUN OUT`) and serve the result as a base of its own, or serve it without vLLM"


@dataclass(frozen=True)
class Taken:
    """An adapter that vLLM will take.

    rank     of its modules
    changes  what was done to it, for people; none where it was plain
    """

    name: str
    content: str
    rank: int
    changes: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def key(self) -> str:
        """A name for exactly what vLLM is given: another content never comes under it."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        digest.update(save(self.tensors))
        return digest.hexdigest()[:24]

    def write(self, folder: Path) -> None:
        """The PEFT folder that vLLM reads, whole or not at all."""

        def fill(place: Path) -> None:
            (place / TENSORS).write_bytes(save(self.tensors, metadata={"format": "pt"}))
            write_json(place / CONFIG, self.config)

        write_folder(folder, fill, replace=True)


def for_vllm(name: str, found: ForeignAdapter, bare: Bare, most: int = VLLM_RANKS[-1]) -> Taken:
    """What vLLM is given of an adapter, on a base that may be a skeleton without weights.

    Raises AdapterError, with the adapter's name, the reason and what to do instead.
    """
    try:
        findings = preflight(found.saved, bare, VLLM)
        _refuse(findings)
        adapter = lowered(fitted_shapes(bare, found.saved), bare)
        if adapter.rank > most:
            raise AdapterError(
                f"its rank {adapter.rank} is over {most}, which this vLLM was started for; start it again with a "
                "larger vllm.max_lora_rank"
            )
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r} cannot be served by vLLM: {error}") from None
    changes = tuple(finding.line(VLLM) for finding in findings if finding.action in ("folded", "padded"))
    config = plain_config(adapter, bare, None)
    return Taken(name, found.content, adapter.rank, changes, config, plain_tensors(adapter))


def allowed_rank(ranks: Sequence[int], asked: int | None = None) -> int:
    """The least --max-lora-rank that holds these ranks and what was asked for. Raises AdapterError over the largest."""
    needed = max([*ranks, asked or 1])
    for rank in VLLM_RANKS:
        if rank >= needed:
            return rank
    raise AdapterError(f"rank {needed} is over the largest that vLLM takes, {VLLM_RANKS[-1]}; {MERGE}")


def _refuse(findings: Sequence[Finding]) -> None:
    refused = [finding.why(VLLM) for finding in findings if finding.refused]
    if refused:
        merge = any(finding.action == "merge instead" for finding in findings)
        raise AdapterError("; ".join([*refused, MERGE if merge else "serve it without vLLM"]))
    if needs_weights(findings):
        raise AdapterError(
            "it began with PiSSA or OLoRA in PEFT, for a base that lacks a part; make a plain LoRA of it (`topwork "
            "export … --format vllm`) and serve that"
        )
