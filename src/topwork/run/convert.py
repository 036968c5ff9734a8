"""`topwork convert`: adapters and models of others' making, turned into what is read here, and read again."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from topwork.adapters.files import PREFIX
from topwork.adapters.graft import bare_base
from topwork.adapters.method import Bare
from topwork.adapters.names import on_modules, own_names
from topwork.adapters.peft_format import SavedAdapter, fitted_shapes, read_adapter, saved_adapter
from topwork.common.errors import AdapterError, RequestError
from topwork.common.files import write_bytes, write_folder, write_json
from topwork.common.os_errors import check_link, explained, why
from topwork.export.peft import CONFIG, TENSORS, plain_config, plain_tensors
from topwork.models.config import ModelConfig
from topwork.models.gguf import convert_into
from topwork.plan.built import base_skeleton
from topwork.run.converting.kinds import Found, recognised
from topwork.run.converting.mlx import mlx_adapter
from topwork.run.folder import check_out

RECORD = "convert.json"
Log = Callable[[str], None]


@dataclass(frozen=True)
class Converted:
    """What was made of what.

    kind     what it was: `gguf model`, `gguf adapter`, `mlx adapter` or `peft adapter`
    file     the name of the file that held it
    made     `model` or `adapter`
    modules  how many modules an adapter has parts at
    changed  what is said otherwise now, for people
    fitted   whether an adapter was tried on its base's modules
    """

    kind: str
    file: str
    made: str
    modules: int = 0
    changed: tuple[str, ...] = ()
    fitted: bool = False

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@explained()
def convert(
    place: Path | str, out: Path | str, model: str | None = None, overwrite: bool = False, log: Log = print
) -> Converted:
    """Turn what stands at `place` into a folder `out` that is read here: a GGUF model into a Hugging Face folder, the
    adapters of others into a PEFT folder.

    model  an adapter's base; needed for a GGUF adapter, whose weights have llama.cpp's names

    Raises RequestError for what is not recognised, AdapterError and ModelError for what cannot be read; `out` is whole
    or not there.
    """
    place, out = Path(place), Path(out)
    check_link(place)
    found = recognised(place, log)
    check_out(out, place if place.is_dir() else None, "what is converted", overwrite)
    if found.kind == "gguf model":
        if model is not None:
            raise RequestError(f"--model {model}: {found.file} is a model itself; leave --model out")
        done = Converted(found.kind, found.file.name, "model")
        write_folder(out, lambda folder: _model(found, folder, done, log), overwrite)
        return done
    bare = bare_base(base_skeleton(ModelConfig(model_name_or_path=model))) if model is not None else None
    tensors, config, changed = _READERS[found.kind](found, bare, model)
    saved_adapter(config, tensors, {}, str(place))  # what cannot be read is told by the name that it was given
    results: list[Converted] = []

    def fill(folder: Path) -> None:
        write_bytes(folder / TENSORS, save(dict(sorted(tensors.items())), metadata={"format": "pt"}))
        write_json(folder / CONFIG, config)
        results.append(_checked(replace(read_adapter(folder), path=str(place)), found, bare, changed))
        write_json(folder / RECORD, results[0].as_json())

    write_folder(out, fill, overwrite)
    for line in changed:
        log(line)
    return results[0]


def _model(found: Found, folder: Path, done: Converted, log: Log) -> None:
    convert_into(found.file, folder, log)
    log("its weights are in bfloat16, in which bases are read from GGUF here")
    write_json(folder / RECORD, done.as_json())


def _checked(saved: SavedAdapter, found: Found, bare: Bare | None, changed: tuple[str, ...]) -> Converted:
    """What was written and read again as any adapter is, tried on the base's modules where the base is known."""
    if not saved.tensors:
        raise AdapterError(f"{found.file} holds no tensors, so there is nothing to convert; fetch or save it again")
    broken = [key for key, tensor in saved.tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(f"{found.file}: {broken[0]} holds values that are not finite (NaN or infinity)")
    paths = {key.rpartition(".lora_")[0] or key.rpartition(".")[0] for key in saved.tensors}
    if bare is not None:
        fitted_shapes(bare, saved)
    return Converted(found.kind, found.file.name, "adapter", len(paths), changed, bare is not None)


_Read = tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]
"""Tensors by PEFT's names, adapter_config.json's values, and what is said otherwise now."""


def _gguf(found: Found, bare: Bare | None, model: str | None) -> _Read:
    from topwork.export.gguf.adapter_file import lowered_of, read_gguf_adapter

    if bare is None:
        raise RequestError(
            f"{found.file} names weights as llama.cpp does; give the adapter's base with --model, by which they get "
            "transformers' names"
        )
    adapter = read_gguf_adapter(found.file)
    plain = lowered_of(found.file, adapter, bare.config.to_dict(), bare.modules)
    scales = sorted({update.scaling for update in adapter.updates.values()})
    changed = [f"alpha {adapter.alpha:g} is now in B (scale {', '.join(f'{scale:g}' for scale in scales)})"]
    return plain_tensors(plain), plain_config(plain, bare, model), tuple(changed if scales != [1.0] else [])


def _mlx(found: Found, bare: Bare | None, model: str | None) -> _Read:
    adapter = mlx_adapter(str(found.file), found.config, _tensors(found), bare)
    plain, tensors = adapter.lowered, plain_tensors(adapter.lowered)
    scale = next(iter(plain.updates.values())).scaling
    base = model if model is not None else adapter.base
    config = plain_config(plain, bare, base)
    if adapter.lengths:
        config["use_dora"] = True
        tensors |= {f"{PREFIX}{path}.lora_magnitude_vector": m for path, m in adapter.lengths.items()}
    return tensors, config, (f"A and B are transposed, and the scale {scale:g} is now in B",)


def _peft(found: Found, bare: Bare | None, model: str | None) -> _Read:
    if not found.config:
        raise AdapterError(
            f"{found.file} has no readable {CONFIG} beside it, which says its rank and scale; they are not guessed"
        )
    named = own_names(_tensors(found), str(found.file))
    tensors, changed = named.tensors, named.changed
    if bare is not None:
        tensors, moved = on_modules(tensors, bare.modules)
        changed += tuple(f"{theirs} is {ours} in this base" for theirs, ours in sorted(moved.items())[:1])
    tensors = {PREFIX + key if "." in key else key: tensor.contiguous() for key, tensor in tensors.items()}
    config = found.config if model is None else {**found.config, "base_model_name_or_path": model}
    return tensors, config, changed


_READERS: dict[str, Callable[[Found, Bare | None, str | None], _Read]] = {
    "gguf adapter": _gguf, "mlx adapter": _mlx, "peft adapter": _peft,
}  # fmt: skip


def _tensors(found: Found) -> dict[str, Tensor]:
    try:
        return load_file(found.file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{found.file} cannot be read ({why(error)}); fetch it again") from error
