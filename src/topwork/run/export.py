"""`topwork export`: an adapter or a model in the format that another program reads, looked at with that program's eyes
before it is written, and read back by it after."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from topwork.adapters.graft import bare_base
from topwork.adapters.method import Bare
from topwork.adapters.other_makes import CONFIG
from topwork.adapters.peft_format import BaseId, check_base, settle
from topwork.common.errors import RequestError
from topwork.common.files import write_folder, write_json
from topwork.common.os_errors import check_link, explained
from topwork.export.gguf.hparams import hparams_of
from topwork.export.gguf.package import gguf_package
from topwork.export.preflight import Finding, exported_parts, preflight, refuse
from topwork.export.read_back import ReadBack
from topwork.export.readers import FEATURES, OLLAMA, OLLAMA_MERGED, Reader, reader_of, type_of
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.lazy import open_lazily
from topwork.models.quantized import stored_quantization
from topwork.models.source import ALIASES, Source, find_source
from topwork.models.tokenizer import load_config
from topwork.plan.built import base_skeleton
from topwork.reporting.card import add_card
from topwork.reporting.card_source import is_hub_id, last_part, without_places
from topwork.run.exporting.check import asked, stored_by, tokenizer_of
from topwork.run.exporting.gguf import write_adapter_file
from topwork.run.exporting.models import ModelJob, stem, write_gguf, write_hf
from topwork.run.exporting.ollama import takes_adapters, write_ollama_adapter, write_ollama_model
from topwork.run.exporting.peft import AdapterJob, write_lorax, write_peft, write_sglang, write_vllm
from topwork.run.exporting.written import OUT, Written
from topwork.run.folder import ADAPTER_NAME, check_beside_base, check_out
from topwork.run.given import Given, given_adapter, is_adapter
from topwork.run.merge import prepared_merge, told
from topwork.run.merging.inputs import merge_inputs
from topwork.run.merging.plan import opened, plan_merge

ADAPTER_WRITERS: dict[str, Callable[[AdapterJob, Path], Written]] = {
    "peft": write_peft, "vllm": write_vllm, "sglang": write_sglang, "lorax": write_lorax,
    "gguf-adapter": write_adapter_file, "ollama": write_ollama_adapter,
}  # fmt: skip
MODEL_WRITERS: dict[str, Callable[[ModelJob, Path], Written]] = {
    "hf": write_hf, "gguf": write_gguf, "ollama": write_ollama_model,
}  # fmt: skip
"""By format: each fills an empty folder, which then appears whole or not at all."""
Log = Callable[[str], None]
RECORD = "export.json"
CHECKED_PROMPTS = 4
GGUF_FORMATS = ("gguf", "ollama")
MERGED_TYPES = {"auto": None, "bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class Exported:
    """What was written, or with `dry_run` would be.

    base_model what others call the base: of an adapter, or of the model that was written
    findings   what the reader would have made of the adapter's features, and what was done
    figures    the format's own: rank, modules, bytes …
    read_back  by whom the written folder was read, on how much, and the largest difference
    use        command lines for whoever has the folder, which they call OUT
    checkpoint the step of the run's checkpoint that the adapter is of; None for a finished one
    """

    folder: Path
    format: str
    type: str | None
    reader: str
    base_model: str | None = None
    findings: Sequence[Finding] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    read_back: Sequence[ReadBack] = ()
    use: Sequence[str] = ()
    checkpoint: int | None = None

    def as_json(self) -> dict[str, Any]:
        """What export.json and --json say."""
        return {
            "format": self.format, "type": self.type, "reader": self.reader, "base_model": self.base_model,
            **({} if self.checkpoint is None else {"checkpoint": self.checkpoint}),
            "figures": dict(self.figures),
            "findings": [finding.as_json() for finding in self.findings],
            "read_back": [each.as_json() for each in self.read_back], "use": without_places(list(self.use)),
        }  # fmt: skip


@explained()
def export(
    place: Path | str,
    out: Path | str,
    format: str,
    type: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
    force: bool = False,
    dry_run: bool = False,
    check: int = CHECKED_PROMPTS,
    log: Log = print,
    *,
    checkpoint: str | int | None = None,
) -> Exported:
    """Write a run's adapter, a PEFT folder or a model to the folder `out` as another program reads it.

    format   peft, hf, gguf, gguf-adapter, ollama, vllm, sglang or lorax (`export/readers.py`)
    type     the type of the numbers, where a format has several
    model    the base, where the one that the run or the PEFT folder names is not to be found here
    force    also where the base is known to be another than the adapter was trained on
    dry_run  only say what the reader would make of it
    check    on how many prompts (eight at most) what the reader makes of it is compared with what it is; 0 for none,
             which spares loading the base
    checkpoint  a step of the run, `best` or `last`; left out, the finished adapter, or where there is none yet the
             newest checkpoint's

    Raises RequestError for what cannot be asked for, AdapterError with all that the format cannot carry, RunError for
    a full disk or a reader that reads something else; `out` is whole or not there.
    """
    check_link(Path(place))
    reader, place, out = reader_of(format), _named(Path(place), log), Path(out)
    kind = type_of(reader, type)
    check_out(out, place if place.exists() else None, "what is exported", overwrite)
    if reader.format in (*GGUF_FORMATS, "gguf-adapter") and not dry_run:
        gguf_package()  # before an adapter is merged for it
    if is_adapter(place):
        given = given_adapter(place, model, checkpoint, log)
        check_beside_base(out, given.model, overwrite)
        base = _called(given.saved.base.name or given.model.model_name_or_path)
        how = _How(reader, kind, overwrite, force, dry_run, check, log, base, given.run, given.checkpoint)
        if reader is OLLAMA and (why := _merged_for_ollama(given)):
            log(f"{why}: the adapter is merged into the model")
            how = replace(how, reader=OLLAMA_MERGED)
        return _adapter(given, out, how) if how.reader.reads == "adapter" else _merged(given, out, how)
    if model is not None:
        raise RequestError(f"--model {model}: {place} is no adapter, which is what has a base; leave --model out")
    if checkpoint is not None:
        raise RequestError(f"--checkpoint {checkpoint}: {place} is no run, which is what has them; leave it out")
    return _model(str(place), out, _How(reader, kind, overwrite, force, dry_run, check, log, _called(str(place))))


@dataclass(frozen=True)
class _How:
    """What was asked for, read; what the base is called, and the run and checkpoint that the adapter is of."""

    reader: Reader
    type: str | None
    overwrite: bool
    force: bool
    dry_run: bool
    check: int
    log: Log
    base: str | None
    run: Path | None = None
    checkpoint: int | None = None

    def exported(self, out: Path, findings: Sequence[Finding], written: Written = Written()) -> Exported:
        return Exported(
            out, self.reader.format, self.type, self.reader.reader, self.base, findings, written.figures,
            written.read_back, written.use, self.checkpoint,
        )  # fmt: skip


def _adapter(given: Given, out: Path, how: _How) -> Exported:
    """A format that carries an adapter."""
    skeleton = base_skeleton(given.model)
    bare = bare_base(skeleton)
    findings = _looked_at(given, bare, how)
    if how.dry_run:
        return how.exported(out, findings)
    tokenizer = tokenizer_of(given.model, given.template, given.folder, how.log)
    config, parts = exported_parts(given.saved, bare, lambda: stored_by(given.model, skeleton, how.log))
    compared = asked(given, tokenizer, how.check, how.force, how.log)
    given = replace(given, saved=replace(given.saved, config=config))
    job = AdapterJob(given, how.reader, how.type, bare, parts, tokenizer, compared, how.log)
    return _written(out, findings, how, lambda folder: ADAPTER_WRITERS[how.reader.format](job, folder))


def _looked_at(given: Given, bare: Bare, how: _How) -> list[Finding]:
    """The findings, told; AdapterError with those that nothing can be done about."""
    named = given.model.model_name_or_path
    place = Path(named).expanduser()  # a folder's relative name reads like an id on the Hub
    own = str(place.resolve()) if named != given.saved.base.name and place.exists() else ALIASES.get(named, named)
    warning = check_base(given.saved, BaseId(own), how.force, named)
    if warning and given.saved.base.name:
        how.log(f"warning: {warning}")
    quantized = given.quantization.active or stored_quantization(bare.config) is not None
    findings = preflight(given.saved, bare, how.reader, quantized)
    for note in settle(given.saved, bare).notes:
        how.log(f"note: {note}")
    for finding in findings:
        if not finding.refused and (finding.unseen or finding.action != "kept"):
            how.log(finding.line(how.reader))
    refuse(findings, given.saved, how.reader)
    return findings


def _model(name: str, out: Path, how: _How) -> Exported:
    """A model as it is."""
    if how.reader.format not in MODEL_WRITERS:
        raise RequestError(
            f"--format {how.reader.format} is for adapters, and {name} is a model, if anything; give a run's folder or "
            f"a PEFT folder, or one of {', '.join(MODEL_WRITERS)}"
        )
    model = ModelConfig(model_name_or_path=name)
    source = find_source(model, how.log)
    if how.reader.format in GGUF_FORMATS:
        hparams_of(load_config(source, False).to_dict())  # ModelError for a family that it has not
    if how.dry_run:
        return how.exported(out, [])
    job = ModelJob(
        stem(name), source, how.reader, how.type, tokenizer_of(model, None, None, how.log), how.check, how.log
    )
    return _written(out, [], how, lambda folder: MODEL_WRITERS[how.reader.format](job, folder))


def _merged_for_ollama(given: Given) -> str:
    """Why Ollama cannot have it as an adapter; empty where it can."""
    bare = bare_base(base_skeleton(given.model))
    if not takes_adapters(bare):
        return f"Ollama runs {bare.config.model_type} on its own engine, which has no adapters yet"
    instead = [f for f in preflight(given.saved, bare, OLLAMA) if f.action == "merge instead"]
    return f"Ollama has no place for {FEATURES[instead[0].feature]}" if instead else ""


def _merged(given: Given, out: Path, how: _How) -> Exported:
    """A format that carries a model: the adapter is merged, checked, and the result written in it."""
    bare = bare_base(base_skeleton(given.model))
    findings = _looked_at(given, bare, how)
    if how.reader.format in GGUF_FORMATS:
        hparams_of(bare.config.to_dict())  # before an hour of merging: ModelError for a family that it has not
    if how.dry_run:
        return how.exported(out, findings)
    if how.reader.format == "hf":
        merge = prepared_merge(given, out, _merged_type(how), "auto", how.force, how.log, how.check)

        def fill(folder: Path) -> Written:
            figures = merge(folder)
            return Written(figures, [f'AutoModelForCausalLM.from_pretrained("{OUT}")'], _checked(figures))

        return _written(out, findings, how, fill)
    return _merged_into_gguf(given, out, how, findings)


def _merged_into_gguf(given: Given, out: Path, how: _How, findings: Sequence[Finding]) -> Exported:
    """No merged folder on the disk beside the file: each weight is merged when it is written."""
    tokenizer = tokenizer_of(given.model, given.template, given.folder, how.log)
    inputs = merge_inputs(given, 0, None, how.log)
    plan = plan_merge(given, inputs, _merged_type(how), "auto", how.force, how.log)
    name = given.place.resolve().name

    def opening() -> tuple[Base, str]:
        base, adapters = opened(given, inputs, torch.float32, how.force)
        adapters.train(ADAPTER_NAME, False)
        return base, ADAPTER_NAME

    def fill(folder: Path) -> Written:
        model, aside = plan.model, folder / "merged"
        if model is None:  # it could only be merged in memory
            aside.mkdir()
            plan.write(aside)
            model = open_lazily(Source(name, str(aside), None))
        job = ModelJob(
            name, plan.source, how.reader, how.type, tokenizer, how.check, how.log, given, replace(model, name=name),
            opening,
        )  # fmt: skip
        written = MODEL_WRITERS[how.reader.format](job, folder)
        shutil.rmtree(aside, ignore_errors=True)
        return replace(written, figures={**written.figures, "merge": told(given, plan)})

    return _written(out, findings, how, fill)


def _merged_type(how: _How) -> str | None:
    """In which type an adapter is merged: of a folder its own, and where it is rounded afterwards anyway in fp32, so
    that it is rounded once."""
    if how.reader.format == "hf":
        return MERGED_TYPES[how.type or "auto"]
    return "bfloat16" if how.type == "bf16" else "float32"


def _checked(figures: Mapping[str, Any]) -> list[ReadBack]:
    """The merge's own check, which reads the folder as transformers does."""
    if "sequences" not in figures:
        return []
    return [ReadBack("transformers", figures["sequences"], figures["largest_relative_difference"])]


def _written(out: Path, findings: Sequence[Finding], how: _How, fill: Callable[[Path], Written]) -> Exported:
    """The folder, whole or not at all, and what stands in its export.json."""
    done: list[Exported] = []

    def whole(folder: Path) -> None:
        done.append(how.exported(out, findings, fill(folder)))
        write_json(folder / RECORD, done[0].as_json())
        add_card(folder, how.run)

    write_folder(out, whole, how.overwrite)
    return done[0]


def _called(name: str) -> str:
    """A model's id on the Hub, or the last part of its path."""
    known = ALIASES.get(name, name)
    return known if is_hub_id(known) else last_part(known)


def _named(place: Path, log: Log) -> Path:
    """PEFT puts an adapter that is named other than `default` into a folder of its name."""
    if is_adapter(place) or not place.is_dir() or (place / "config.json").is_file():
        return place
    inner = sorted(path.parent for path in place.glob(f"*/{CONFIG}"))
    if len(inner) > 1:
        names = ", ".join(str(path) for path in inner)
        raise RequestError(f"{place} holds {len(inner)} adapters; give one of them: {names}")
    if inner:
        log(f"{place} holds the adapter {inner[0].name!r}, in a folder of its name")
    return inner[0] if inner else place
