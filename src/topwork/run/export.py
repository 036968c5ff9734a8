"""`topwork export`: an adapter or a model in the format that another program reads, looked at with that program's eyes
before it is written, and read back by it after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topwork.adapters.foreign import CONFIG
from topwork.adapters.graft import bare_base
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, check_base
from topwork.common.errors import RequestError
from topwork.common.files import write_folder, write_json
from topwork.export.preflight import Finding, exported_parts, preflight, refuse
from topwork.export.read_back import ReadBack
from topwork.export.readers import Reader, reader_of, type_of
from topwork.models.quantized import stored_quantization
from topwork.models.source import ALIASES
from topwork.plan.count import base_skeleton
from topwork.run.export_check import asked, stored_by, tokenizer_of
from topwork.run.exporters import ADAPTER_WRITERS, MODEL_WRITERS, OUT, AdapterJob, Written
from topwork.run.folder import check_out
from topwork.run.given import Given, given_adapter, is_adapter

Log = Callable[[str], None]
RECORD = "export.json"
CHECKED_PROMPTS = 4


@dataclass(frozen=True)
class Exported:
    """What was written, or with `dry_run` would be.

    findings   what the reader would have made of the adapter's features, and what was done
    figures    the format's own: rank, modules, bytes …
    read_back  by whom the written folder was read, on how much, and the largest difference
    use        command lines for whoever has the folder
    """

    folder: Path
    format: str
    type: str | None
    reader: str
    findings: Sequence[Finding] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    read_back: Sequence[ReadBack] = ()
    use: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """What export.json and --json say."""
        return {
            "format": self.format, "type": self.type, "reader": self.reader, "figures": dict(self.figures),
            "findings": [finding.as_json() for finding in self.findings],
            "read_back": [each.as_json() for each in self.read_back], "use": list(self.use),
        }  # fmt: skip


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
) -> Exported:
    """Write a run's adapter, a PEFT folder or a model to the folder `out` as another program reads it.

    format   peft, hf, gguf, gguf-adapter, ollama, vllm, sglang or lorax (`export/readers.py`)
    type     the type of the numbers, where a format has several
    model    the base of a PEFT folder, where the one that its file names is not to be found here
    force    also where the base is known to be another than the adapter was trained on
    dry_run  only say what the reader would make of it
    check    on how many prompts (eight at most) what the reader makes of it is compared with what it is; 0 for none,
             which spares loading the base

    Raises RequestError for what cannot be asked for, AdapterError with all that the format cannot carry, RunError for
    a full disk or a reader that reads something else; `out` is whole or not there.
    """
    reader, place, out = reader_of(format), _named(Path(place), log), Path(out)
    kind = type_of(reader, type)
    check_out(out, place if place.exists() else None, "what is exported", overwrite)
    if is_adapter(place):
        given = given_adapter(place, model)
        how = _How(reader, kind, overwrite, force, dry_run, check, log)
        return _adapter(given, out, how) if reader.reads == "adapter" else _merged(given, out, how)
    if model is not None:
        raise RequestError(f"--model {model}: {place} is no adapter, which is what has a base; leave --model out")
    return _model(str(place), out, _How(reader, kind, overwrite, force, dry_run, check, log))


@dataclass(frozen=True)
class _How:
    """What was asked for, read."""

    reader: Reader
    type: str | None
    overwrite: bool
    force: bool
    dry_run: bool
    check: int
    log: Log

    def exported(self, out: Path, findings: Sequence[Finding], written: Written = Written()) -> Exported:
        use = tuple(line.replace(OUT, str(out)) for line in written.use)
        return Exported(
            out, self.reader.format, self.type, self.reader.reader, findings, written.figures, written.read_back, use
        )


def _adapter(given: Given, out: Path, how: _How) -> Exported:
    """A format that carries an adapter."""
    skeleton = base_skeleton(given.model)
    bare = bare_base(skeleton)
    findings = _looked_at(given, bare, how)
    if how.dry_run:
        return how.exported(out, findings)
    tokenizer = tokenizer_of(given.model, given.template, how.log)
    parts = exported_parts(given.saved, bare, lambda: stored_by(given.model, skeleton, how.log))
    compared = asked(given, tokenizer, how.check, how.force, how.log)
    job = AdapterJob(given, how.reader, how.type, bare, parts, tokenizer, compared, how.log)
    done: list[Exported] = []

    def fill(folder: Path) -> None:
        written = ADAPTER_WRITERS[how.reader.format](job, folder)
        done.append(how.exported(out, findings, written))
        write_json(folder / RECORD, done[0].as_json())

    write_folder(out, fill, how.overwrite)
    return done[0]


def _looked_at(given: Given, bare: Bare, how: _How) -> list[Finding]:
    """The findings, told; AdapterError with those that nothing can be done about."""
    named = given.model.model_name_or_path
    warning = check_base(given.saved, BaseId(ALIASES.get(named, named)), how.force, named)
    if warning and given.saved.base.name:
        how.log(f"warning: {warning}")
    quantized = given.quantization.active or stored_quantization(bare.config) is not None
    findings = preflight(given.saved, bare, how.reader, quantized)
    for finding in findings:
        if not finding.refused and (finding.unseen or finding.action != "kept"):
            how.log(finding.line(how.reader))
    refuse(findings, given.saved, how.reader)
    return findings


def _model(name: str, out: Path, how: _How) -> Exported:
    """A whole model."""
    if how.reader.format not in MODEL_WRITERS:
        raise RequestError(
            f"--format {how.reader.format} is for adapters, and {name} is a model, if anything; give a run's folder or "
            f"a PEFT folder, or one of {', '.join(MODEL_WRITERS)}"
        )
    raise NotImplementedError


def _merged(given: Given, out: Path, how: _How) -> Exported:
    raise NotImplementedError


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
