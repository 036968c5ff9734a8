"""The base as vLLM is given it: as it lies there, or, where it is held in 4 or 8 bits, dequantized into a folder of its
own. (vLLM reads bitsandbytes' checkpoints with a plugin only, and an adapter was trained on just these values.)"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from topwork.adapters.graft import bare_base
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId
from topwork.common.errors import CheckpointError, ModelError
from topwork.common.files import verify_folder, write_folder, write_json
from topwork.merging.merge import dequantize
from topwork.models.config import ModelConfig
from topwork.models.quantized import is_packed
from topwork.models.skeleton import skeleton
from topwork.models.source import Source, find_source
from topwork.models.writing import write_model
from topwork.quantization.config import QuantizationConfig
from topwork.run.loading import open_base

ORIGIN = "topwork-origin.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class HandedOver:
    """A base for vLLM.

    model     a folder, or a Hub id with its `revision`
    skeleton  its modules without weights, as adapters are fitted to it
    id        what adapters know it by; no fingerprint where the weights were not looked at
    """

    model: str
    revision: str | None
    dtype: str
    skeleton: Bare
    id: BaseId

    @property
    def options(self) -> list[str]:
        """Those of vLLM's that say so."""
        revision = [] if self.revision is None else ["--revision", self.revision]
        return ["--dtype", self.dtype, *revision]


def hand_over(model: ModelConfig, quantization: QuantizationConfig, work: Path, say: Say) -> HandedOver:
    """Find the base, and write it dense where it is not. Raises ModelError."""
    source = find_source(model, say)
    try:
        known = AutoConfig.from_pretrained(
            source.folder, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name} has no config that can be read: {error}") from error
    packed = is_packed(known, source.name) or quantization.active
    if packed:
        folder, fingerprint = _dense(model, quantization, source, work, say)
        known = AutoConfig.from_pretrained(folder)
        source = Source(source.name, str(folder), None)
    else:
        fingerprint = None
    bare = bare_base(skeleton(known, model.trust_remote_code))
    return HandedOver(source.folder, source.revision, model.dtype, bare, BaseId(source.name, fingerprint))


def _dense(
    model: ModelConfig, quantization: QuantizationConfig, source: Source, work: Path, say: Say
) -> tuple[Path, str | None]:
    """The dequantized base's folder, written once for a base and its quantization; and the base's fingerprint."""
    folder, wanted = work / "base", _origin(model, quantization, source)
    found = _written(folder)
    if found is not None and found["of"] == wanted:
        return folder, found["fingerprint"]
    say(f"{source.name} is held in fewer bits, which vLLM does not read: writing it dequantized to {folder}")
    base = open_base(model.model_copy(update={"device": "cpu"}), say, quantization if quantization.active else None)
    dequantize(base.module)

    def fill(place: Path) -> None:
        write_model(base, place)
        write_json(place / ORIGIN, {"of": wanted, "fingerprint": base.fingerprint})

    write_folder(folder, fill, replace=True)
    return folder, base.fingerprint


def _origin(model: ModelConfig, quantization: QuantizationConfig, source: Source) -> dict[str, Any]:
    """What tells one dequantized base from another: the name, the options, and the size and time of each file."""
    files = [path for path in sorted(Path(source.folder).glob("*")) if path.is_file()]
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {
        "name": source.name, "folder": source.folder, "revision": source.revision, "dtype": model.dtype,
        "quantization": quantization.model_dump(mode="json"), "files": stats,
    }  # fmt: skip


def _written(folder: Path) -> Mapping[str, Any] | None:
    """What a folder from before says of itself, where it is whole."""
    try:
        verify_folder(folder)
        found: dict[str, Any] = json.loads((folder / ORIGIN).read_text("utf-8"))
        return found if "of" in found and "fingerprint" in found else None
    except (OSError, ValueError, CheckpointError):
        return None
