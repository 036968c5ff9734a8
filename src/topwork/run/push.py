"""`topwork push`: an adapter or a model with its card to a repository on the Hugging Face Hub, in one commit."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from topwork.common.errors import RequestError, shortened
from topwork.common.files import write_folder
from topwork.reporting.card import CARD, SAMPLES, render_card
from topwork.reporting.card_source import CardSource, is_hub_id
from topwork.reporting.card_use import PLACE
from topwork.reporting.wording import size
from topwork.run.folder import check_out
from topwork.run.given import run_of
from topwork.run.pushing.hub import Standing, check_repo, commit, open_hub, standing
from topwork.run.pushing.upload import Content, Upload, gather, refuse_secrets

Log = Callable[[str], None]
FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
UNWRITTEN = "[More Information Needed]"
"""What stands in the card that PEFT and transformers leave to be filled in."""
OURS = re.compile(
    r"adapter_model\..*|adapter_config\.json|topwork\.json|training/.*|(merge|combine|export|convert)\.json"
    r"|(model|pytorch_model)[^/]*\.(safetensors|bin)|(model|pytorch_model).*\.index\.json|chat_template\.jinja"
    r"|added_tokens\.json|special_tokens_map\.json|tokenizer[^/]*"
)
"""Files of an earlier push that readers would take for part of this one."""


def push(
    run: Path | str,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_name: str | None = None,
    dry_run: Path | str | None = None,
    samples: int = SAMPLES,
    force: bool = False,
    log: Log = print,
) -> dict[str, Any]:
    """Upload a run's adapter, a PEFT folder, or what merge, combine or export wrote, with a model card, to OWNER/NAME;
    returns the files and their bytes, and the commit's address.

    private    make the repository a private one; one that stands and is public is refused then
    revision   the branch, made where there is none
    base_name  the base's id on the Hub, for an adapter that was trained on a local folder
    dry_run    write what would be uploaded into this new folder, and upload nothing
    samples    so many answers to held-out rows are shown
    force      also over a repository that holds an adapter of another base, or something of another kind

    A README.md that stands in the folder is taken in the card's place, OWNER/NAME in it read as `repo`.

    Raises RequestError for what cannot be pushed, RunError where the Hub cannot be reached; it shows all or nothing.
    """
    check_repo(repo)
    if dry_run is not None:
        check_out(Path(dry_run), Path(run), "what is pushed", overwrite=None)
    inside, checkpoint = run_of(Path(run))
    upload, files = _prepared(inside if checkpoint is None else Path(run), repo, base_name, samples, log)
    told = {name: _bytes(content) for name, content in sorted(files.items())}
    done: dict[str, Any] = {"repo": repo, "files": told, "removed": [], "commit": None, "folder": None}
    if dry_run is not None:
        write_folder(Path(dry_run), lambda place: _write(place, files))
        return done | {"folder": str(dry_run)}
    api = open_hub()
    before = standing(api, repo, revision)
    _refuse_other(repo, upload.source, before, private, force)
    log(f"uploading {len(files)} files, {size(sum(told.values()))}, to {repo}")
    removed, text = _removed(before, files), message or f"{upload.source.name}: {_what(upload.source)}"
    return done | {
        "removed": list(removed),
        "commit": commit(api, repo, files, removed, before, private, revision, text),
    }


def _prepared(
    folder: Path, repo: str, base_name: str | None, samples: int, log: Log
) -> tuple[Upload, dict[str, Content]]:  # fmt: skip
    """What goes up, its card with it. Raises RequestError for what may not."""
    upload = gather(folder, repo, base_name, samples, log)
    files = {**upload.files, CARD: _card(folder, upload.source, samples, log).encode()}
    refuse_secrets(files)
    if upload.left:
        log(f"not uploaded: {', '.join(upload.left)}")
    return upload, files


def _card(folder: Path, source: CardSource, samples: int, log: Log) -> str:
    """The folder's own, where somebody has written one; else a new one."""
    own = folder / CARD
    text = own.read_text("utf-8") if own.is_file() else ""
    if not text or UNWRITTEN in text:
        return render_card(source, samples)
    log(f"the card is {own}")
    text = text.replace(PLACE, source.repo or PLACE)
    _check_card(own, text)
    return text


def _check_card(path: Path, text: str) -> None:
    """Raises RequestError for front matter that the Hub would refuse, or that names a base by a path."""
    from huggingface_hub import ModelCard

    found = FRONT.match(text)
    try:
        values = yaml.safe_load(found.group(1)) if found else {}
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise RequestError(f"{path} has front matter that cannot be read: {shortened(str(error), 300)}") from error
    base = (values or {}).get("base_model")
    for name in base if isinstance(base, list) else [base]:
        if name is not None and not is_hub_id(str(name)):
            raise RequestError(
                f"{path} names the base_model {name!r}, which is no id on the Hub; mend it or take it out"
            )


def _refuse_other(repo: str, source: CardSource, before: Standing | None, private: bool, force: bool) -> None:
    if before is None:
        return
    if private and not before.private:
        raise RequestError(
            f"{repo} is there already and is public; make it private in its settings first, or leave --private out"
        )
    if force:
        return
    anyway = "name another repository, or replace it with --force"
    weights = [name for name in before.files if re.fullmatch(r"(model|pytorch_model)[^/]*\.(safetensors|bin)", name)]
    if source.kind == "adapter" and before.base is not None and before.base != source.base:
        raise RequestError(f"{repo} holds an adapter of {before.base}, and this is one of {source.base}; {anyway}")
    if source.kind == "adapter" and before.base is None and weights:
        raise RequestError(f"{repo} holds a whole model ({weights[0]}), and this is an adapter; {anyway}")
    if source.kind == "model" and before.base is not None:
        raise RequestError(f"{repo} holds an adapter of {before.base}, and this is a whole model; {anyway}")


def _removed(before: Standing | None, files: Mapping[str, Content]) -> tuple[str, ...]:
    """What an earlier push has left there and this one has not. GGUF files of other types stay beside each other."""
    there = before.files if before is not None else ()
    return tuple(name for name in there if name not in files and OURS.fullmatch(name))


def _what(source: CardSource) -> str:
    made = {"": "adapter", "merge": "merged model", "combine": "combined adapter"}.get(source.made_by, "")
    return made or f"{source.made.get('format') or source.kind} of `topwork {source.made_by}`"


def _bytes(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _write(place: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
