"""What of a folder goes to a repository: each file's name there, and its content or where it lies.

Names and contents tell nothing of this machine: paths in configurations and records are cut to their last parts.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from transformers.dynamic_module_utils import get_relative_import_files

from topwork.adapters.foreign import adapter_folder
from topwork.adapters.peft_format import SavedAdapter, read_adapter
from topwork.common.errors import AdapterError, CheckpointError, ModelError, RequestError, shortened
from topwork.common.files import MANIFEST, read_object, read_text, verify_folder
from topwork.models.config import ModelConfig
from topwork.models.source import ALIASES, embedded_file
from topwork.models.tokenizer import open_tokenizer
from topwork.models.writing import clean_config, write_tokenizer
from topwork.plan.lint.secrets import keys, masked
from topwork.reporting.card_source import (
    MADE,
    TRAINING,
    CardSource,
    data_name,
    is_hub_id,
    last_part,
    portable_recipe,
    read_source,
    without_places,
)  # fmt: skip
from topwork.run.folder import EVALUATION, RECIPE, RESULT, TEMPLATE, finished_recipe
from topwork.run.given import given_adapter
from topwork.run.provenance import PROVENANCE

Content = Path | bytes
Log = Callable[[str], None]
CONFIG, TENSORS, OWN, CARD = "adapter_config.json", "adapter_model.safetensors", "topwork.json", "README.md"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", TEMPLATE,
)  # fmt: skip
MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json", "Modelfile", "LICENSE", "NOTICE")
TEXTS = ("Modelfile", TEMPLATE)
"""Files that go up as they lie and may hold what somebody wrote: a system message."""
RECORDS = tuple(f"{name}.json" for name in MADE)
WEIGHTS = ("*.safetensors", "*.gguf")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
"""Files that tell where they were loaded from. (Records tell more; of both a copy without paths goes up.)"""


@dataclass(frozen=True)
class Upload:
    """source  what the card is made of
    files   by their names in the repository
    left    names in the folder that stay here
    """

    source: CardSource
    files: dict[str, Content]
    left: tuple[str, ...] = ()


def gather(folder: Path, repo: str, base: str | None, samples: int, log: Log) -> Upload:
    """What goes up of a run's folder, an adapter's, or a model's. Raises RequestError, and AdapterError for an adapter
    that cannot be read."""
    if not folder.is_dir():
        raise RequestError(f"there is no folder {folder}; give a run's folder, or what merge, combine or export wrote")
    if base is not None and not is_hub_id(base):
        raise RequestError(f"--base-name {base}: expected the id of a model on the Hub, OWNER/NAME")
    if (folder / RECIPE).is_file():
        finished_recipe(folder)
    source = read_source(folder, None, repo, base)
    if source.kind != "adapter":
        return Upload(source, _model(folder, source), _left(folder, source))
    own = adapter_folder(folder)
    files = _adapter(own, source) | _known(own / TRAINING, None, f"{TRAINING}/")
    if own != folder:
        files |= _tokenizer(finished_recipe(folder).model, folder / TEMPLATE, log)
        files |= _training(source, samples)
    elif not source.tokenizer:
        added = _tokenizer_of_base(folder, log)
        files, source = files | added, replace(source, tokenizer=bool(added))
    return Upload(source, files, _left(own, source))


def refuse_secrets(files: Mapping[str, Content]) -> None:
    """RequestError where a text that was made of the user's own holds what looks like a key."""
    for name, content in sorted(files.items()):
        if isinstance(content, Path):
            content = content.read_bytes() if name in TEXTS or name.startswith(f"{TRAINING}/") else b""
        found = next(keys(content.decode("utf-8", "ignore")), None)
        if found is not None:
            raise RequestError(
                f"{name} holds what looks like a key ({masked(found)}); take it out of the rows or the recipe. Answers "
                "to held-out rows stay here with --samples 0"
            )


def _adapter(folder: Path, source: CardSource) -> dict[str, Content]:
    saved = read_adapter(folder)
    _refuse_unreadable(saved, source)
    if source.base is None:
        raise RequestError(
            f"the adapter's base is {source.local or 'not named'}, which nobody else finds by that name; name it as it "
            "is on the Hub: --base-name OWNER/NAME"
        )
    config = {**source.adapter, "base_model_name_or_path": source.base}
    if isinstance(config.get("tokenizer_name_or_path"), str):  # of prompt tuning: the base's, wherever it lay
        config["tokenizer_name_or_path"] = source.base
    config = {key: None if _is_place(key, value) else value for key, value in config.items()}
    own = {"base_model": source.base, "base_fingerprint": saved.base.fingerprint}
    return {
        **_known(folder, (*TOKENIZER, *RECORDS, "LICENSE", "NOTICE")),
        CONFIG: _json(config), TENSORS: folder / TENSORS, OWN: _json(own),
    }  # fmt: skip


def _refuse_unreadable(saved: SavedAdapter, source: CardSource) -> None:
    if not source.adapter.get("peft_type"):
        raise RequestError(
            f"{saved.path} holds {saved.config.method}, for which PEFT has no form, so that nobody could load it; fold "
            "it into its base (`topwork merge RUN OUT`) and push OUT"
        )
    broken = sorted(key for key, tensor in saved.tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise AdapterError(f"{saved.path}: {broken[0]} holds NaN or infinity; train it again, or take a checkpoint")


def _tokenizer(model: ModelConfig, template: Path, log: Log) -> dict[str, Content]:
    """The base's tokenizer with the template that the adapter learned by: readers write prompts as training did."""
    tokenizer, _ = open_tokenizer(model, log)
    with TemporaryDirectory() as place:
        write_tokenizer(
            tokenizer, Path(place), read_text(template, "bring back a copy of it") if template.is_file() else None
        )
        return {name: path.read_bytes() for name, path in _files(Path(place))}


def _tokenizer_of_base(adapter: Path, log: Log) -> dict[str, Content]:
    """The same for an adapter alone, where its base is to be found here."""
    model = given_adapter(adapter).model
    for alias, known in ALIASES.items():  # a package that is installed may have it
        if known == model.model_name_or_path and embedded_file(known) is not None:
            model = ModelConfig(model_name_or_path=alias)
    try:
        return _tokenizer(model, adapter / TEMPLATE, log)
    except ModelError as error:
        log(f"without a tokenizer, which is the base's: {shortened(str(error), 200)}")
        return {}


def _training(source: CardSource, samples: int) -> dict[str, Content]:
    """The run's records, in a folder of their own."""
    recipe = yaml.safe_dump(portable_recipe(source), sort_keys=False, allow_unicode=True)
    provenance = json.loads(json.dumps(source.provenance))
    for side in (provenance.get("data") or {}).values():
        if side.get("name"):
            side["name"] = ", ".join(data_name(each, side) for each in str(side["name"]).split(", "))
        if side.get("files"):
            side["files"] = {last_part(path): digest for path, digest in side["files"].items()}
    if provenance:
        provenance["base"]["id"] = source.base
    evaluation = without_places(source.evaluation)
    if evaluation:
        evaluation["data"] = ", ".join(data_name(each, {}) for each in str(evaluation.get("data")).split(", "))
        evaluation["samples"] = list(evaluation.get("samples") or ())[:samples]
    records = {RESULT: without_places(source.result), PROVENANCE: provenance, EVALUATION: evaluation}
    found: dict[str, Content] = {f"{TRAINING}/{name}": _json(value) for name, value in records.items() if value}
    return {f"{TRAINING}/{RECIPE}": recipe.encode(), **found}


def _model(folder: Path, source: CardSource) -> dict[str, Content]:
    if (folder / MANIFEST).is_file():
        try:
            verify_folder(folder, but=(CARD,))
        except CheckpointError as error:
            raise RequestError(str(error)) from error
    files = _known(folder, (*MODEL, *TOKENIZER, *RECORDS)) | _known(folder / TRAINING, None, f"{TRAINING}/")
    weights = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    if source.kind == "model" and not any(path.suffix == ".safetensors" for path in weights):
        raise RequestError(f"{folder} has a config.json and no .safetensors; there is no model in it to push")
    _refuse_missing_shards(folder)
    return files | _code(folder) | {path.name: path for path in weights}


def _code(folder: Path) -> dict[str, Content]:
    """The model's own code, where its config names some that lies beside it: without it nobody could load the model.
    No other script of the folder."""
    values = (
        read_object(folder / "config.json", "bring back a copy of it") if (folder / "config.json").is_file() else {}
    )
    modules = {str(name).partition(".")[0] for name in (values.get("auto_map") or {}).values() if "--" not in str(name)}
    named = [folder / f"{module}.py" for module in sorted(modules)]
    files = {path for path in named if path.is_file()}
    files |= {Path(other) for path in sorted(files) for other in get_relative_import_files(path)}
    return {path.name: path.read_bytes() for path in sorted(files) if path.is_file()}


def _refuse_missing_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    named = sorted(set(read_object(index, "bring back a copy of it").get("weight_map", {}).values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise RequestError(f"{folder} is not whole: {missing[0]} is missing, which {index.name} names")


def _known(folder: Path, names: tuple[str, ...] | None, prefix: str = "") -> dict[str, Content]:
    """The files of these names that are there (all of a folder for None), cleaned where a path may stand in them."""
    return {
        prefix + name: _clean(name, path.read_bytes()) if name in (*CONFIGS, *RECORDS) else path
        for name, path in _files(folder)
        if names is None or name in names
    }


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    if folder.is_dir():
        yield from ((path.name, path) for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != ".")


def _clean(name: str, content: bytes) -> bytes:
    """A file without what speaks of this machine."""
    if name not in (*CONFIGS, *RECORDS):
        return content
    values = json.loads(content)
    if name in RECORDS:
        return _json(without_places(values))
    return _json({key: value for key, value in clean_config(values).items() if not _is_place(key, value)})


def _is_place(key: str, value: Any) -> bool:
    """Where something was loaded from: `name_or_path`, and files of older tokenizers (`special_tokens_map_file`)."""
    path = isinstance(value, str) and (value[:1] in ("/", "~") or value[1:3] in (":\\", ":/"))
    return key == "name_or_path" or (path and key.endswith(("_file", "_path", "_dir")))


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _left(folder: Path, source: CardSource) -> tuple[str, ...]:
    """What stays: what no reader of a model looks at, or what may be somebody's (optimizer states, pickles, logs)."""
    known = {*MODEL, *TOKENIZER, *RECORDS, CONFIG, TENSORS, OWN, CARD, MANIFEST, TRAINING}
    weights = set(source.files) | {path.name for pattern in WEIGHTS for path in folder.glob(pattern)}
    weights |= _code(folder).keys()
    weights = set() if source.kind == "adapter" else weights
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in known | weights))
