"""LLaMA-Factory's data sets: names that a dataset_info.json, beside the data, tells the files and columns of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from topwork.common.errors import did_you_mean
from topwork.run.importing.draft import Draft
from topwork.run.importing.records import Given
from topwork.run.importing.sources import Source, need_data, put_sources

INFO = "dataset_info.json"
_LEVELS = 4
_MOST_BYTES = 4 * 2**20
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_MEDIA = ("images", "videos", "audios")


def gather(draft: Draft) -> None:
    """`data`, of `dataset` and `eval_dataset` and what dataset_info.json says of them."""
    if draft.has("model") or draft.has("train_dataset"):
        _second(draft)
        return
    texts = draft.value("stage") == "pt"  # which are put together there, and cut up into sequences
    draft.put("data.too_long", "split" if texts else "truncate", "cutoff_len", "stage")
    train = _named(draft, "dataset")
    if train:
        put_sources(draft, "data.train", train)
    elif not draft.refused and not draft.missing:
        need_data(draft, "dataset", "no data set is given")
    held_out = _named(draft, "eval_dataset")
    if held_out:
        put_sources(draft, "data.eval", held_out)
    if draft.value("interleave_probs"):
        draft.say("interleave_probs", "no equal", "data sets are put together here; a source's weight says how often")


def _named(draft: Draft, key: str) -> list[Source]:
    value = draft.value(key)
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])
    if not names:
        return []
    folder, info = _information(draft)
    if info is None:
        draft.missing.append(
            f"data.train: {', '.join(names)} ({key}) are names in {draft.value('dataset_dir', 'data')}/{INFO}, which "
            f"is "
            "not there; name the files"
        )
        return []
    unknown = [name for name in names if name not in info]
    for name in unknown:
        draft.missing.append(f"data.train: {folder}/{INFO} has no {name!r}{did_you_mean(name, info)}; name its file")
    return [source for name in names if name in info if (source := _source(draft, key, name, info[name], folder))]


def _information(draft: Draft) -> tuple[str, dict[str, Any] | None]:
    """The folder of the data and what its dataset_info.json says; None where there is none. It is looked for from the
    current folder on, from the file's, and from those above that."""
    given = str(draft.value("dataset_dir", "data"))
    above = [draft.folder, *draft.folder.resolve().parents[:_LEVELS]]
    for base in (Path(), *above):
        path = base / given / INFO
        if path.is_file():
            return str(path.parent), _json(draft, path)
    return given, None


def _json(draft: Draft, path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        draft.remarks.append(f"{path} cannot be read ({error})")
        return None
    return read if isinstance(read, dict) else None


def _source(draft: Draft, key: str, name: str, entry: Mapping[str, Any], folder: str) -> Source | None:
    if entry.get("ranking") or "kto_tag" in entry.get("columns", {}):
        draft.refused.append(f"{key}: {name} holds preferences; Topwork has sft alone so far")
    path = entry.get("hf_hub_url") or (f"{folder}/{entry['file_name']}" if "file_name" in entry else None)
    if path is None:
        draft.missing.append(f"data.train: {name} is neither a file nor a Hub data set; download it and name its files")
        return None
    if any(column in entry.get("columns", {}) for column in _MEDIA):
        draft.remarks.append(f"{name} has images, videos or audios, which are not read here; its text is")
    subset = f":{entry['subset']}" if entry.get("subset") and entry.get("hf_hub_url") else ""
    format, columns = _format(draft, key, entry)
    rows = draft.value("max_samples") or entry.get("num_samples")
    return Source(
        f"{path}{subset}", entry.get("split"), format, columns, max_rows=rows, keys=(key, "dataset_dir", "max_samples")
    )


def _format(draft: Draft, key: str, entry: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    columns = {ours: theirs for ours, theirs in entry.get("columns", {}).items() if ours not in _MEDIA}
    if draft.value("stage") == "pt":
        named = columns.get("prompt", "text")
        return "text", {} if named == "text" else {"text": named}
    form = entry.get("formatting", "alpaca")
    if form == "alpaca":
        renamed = {_ALPACA.get(ours, ours): theirs for ours, theirs in columns.items() if ours != "messages"}
        return "alpaca", {ours: theirs for ours, theirs in renamed.items() if ours != theirs}
    _tags(draft, key, entry.get("tags", {}))
    ours = "messages" if form == "openai" else "conversations"
    named = {ours: columns.get("messages", "conversations")} | {
        name: columns[name] for name in ("system", "tools") if name in columns
    }
    return _FORMATS[form], {name: theirs for name, theirs in named.items() if name != theirs}


def _tags(draft: Draft, key: str, tags: Mapping[str, str]) -> None:
    roles = {tags[tag]: role for tag, role in _TAGS.items() if tag in tags and tags[tag] != role}
    keys = {tags[tag]: ours for tag, ours in (("role_tag", "role"), ("content_tag", "content")) if tag in tags}
    for ours, found in (("data.roles", roles), ("data.message_keys", {a: b for a, b in keys.items() if a != b})):
        if found:
            draft.put(ours, {**draft.values.get(ours, {}), **found}, key, "dataset_dir")


# Its second trainer


def _second(draft: Draft) -> None:
    """What the files of `v1` mean where they say nothing, and their data."""
    defaults: dict[str, Any] = {
        "training.learning_rate": 1e-4,
        "training.num_train_epochs": 3,
        "training.batch_size": draft.devices,
    }
    defaults |= {"data.max_length": 2048, "training.seed": 42, "data.eval_fraction": 0.0, "training.warmup_ratio": 0.0}
    defaults |= {"training.load_best_model_at_end": False, "training.lr_scheduler_type": "constant"}
    if "peft_config" not in {each.key.partition(".")[0] for each in draft.given}:
        defaults["adapter.method"] = "full"
    if draft.value("max_steps"):
        del defaults["training.num_train_epochs"]
    for ours, value in defaults.items():
        if ours not in draft.values:
            draft.add_default(Given(ours.rpartition(".")[2], value), ours)
    draft.put("data.too_long", "truncate", "cutoff_len")
    for key, ours in (("train_dataset", "data.train"), ("eval_dataset", "data.eval")):
        sources = _listed(draft, key)
        if sources:
            put_sources(draft, ours, sources)
        elif ours == "data.train" and not draft.refused:
            need_data(draft, key, "no data set is given")


def _listed(draft: Draft, key: str) -> list[Source]:
    value = draft.value(key)
    if not isinstance(value, str):
        return []
    if not value.endswith((".yaml", ".yml")):
        return [Source(value, keys=(key,))]
    above = (Path(), draft.folder, *draft.folder.resolve().parents[:_LEVELS])
    found = next((base / value for base in above if (base / value).is_file()), None)
    entries = yaml.safe_load(found.read_text(encoding="utf-8")) if found is not None else None
    if found is None or not isinstance(entries, dict):
        draft.missing.append(f"data.train: {value} ({key}), which lists the data, is not there; name the files")
        return []
    root = Path(str(found).removesuffix(value))
    return [
        Source(
            str(entry["path"] if entry.get("source") != "local" else root / entry["path"]),
            format=_FORMATS.get(str(entry.get("converter"))),
            max_rows=entry.get("size"),
            keys=(key,),
        )
        for entry in entries.values()
    ]
