"""Where a run comes from: hashes of base, data, template and recipe, versions, seed; and whether they still are.

RUN/provenance.json is written when a run begins and never changed after, but for a line per resume.
"""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import topwork
from topwork.common.devices import hardware
from topwork.common.errors import RequestError
from topwork.common.files import sha256_bytes, sha256_file, write_json
from topwork.data.config import DataConfig, Sources, told
from topwork.data.examples import Data, Example
from topwork.data.files.sources import locate, with_held_out
from topwork.data.streaming.examples import StreamedExamples
from topwork.models.base import Base
from topwork.quantization.linear import packed_kinds
from topwork.recipe.recipe import Recipe, recipe_yaml
from topwork.run.folder import read_json
from topwork.training.checkpoint import list_checkpoints
from topwork.training.trial import CHECKPOINTS

PROVENANCE = "provenance.json"


def provenance(
    recipe: Recipe, base: Base, data: Data, tokens_per_pass: int, together: Sequence[str] = ()
) -> dict[str, Any]:
    """What the adapter is made of. `examples_sha256` covers the very tokens and weights that are learned; of
    streamed rows it covers the files and how they are read.

    `together` are the folders' names of all that were trained in the same passes: rounding follows from them too.
    """
    return {
        "base": {"id": base.name, "fingerprint": base.fingerprint, "held_as": packed_kinds(base.module)},
        "data": {
            "train": _rows(recipe.data, recipe.data.train, data.train),
            "eval": _rows(recipe.data, with_held_out(recipe.data).eval, data.eval),
        },
        "template_sha256": sha256_bytes((data.template.jinja or "").encode()),
        "recipe_sha256": sha256_bytes(recipe_yaml(recipe).encode()),
        "seed": recipe.training.seed,
        "tokens_per_pass": tokens_per_pass,
        **({"trained_together": list(together)} if together else {}),
        **_surroundings(base),
    }


def refuse_other_inputs(folder: Path, now: dict[str, Any]) -> None:
    """Raises RequestError where a run would go on with another base, other rows or another template."""
    before = read_json(folder / PROVENANCE)
    if not before:
        return
    try:
        changed = [name for name, then, here in _identities(before, now) if then != here]
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{folder / PROVENANCE} is damaged ({error!r}), so that nothing tells whether base and rows are those that "
            "the run was begun with; bring back a copy of it, or start anew with --overwrite"
        ) from error
    if not list_checkpoints(folder / CHECKPOINTS):  # nothing is kept but what it began from
        changed += _begun_from_another(before, now)
    if changed:
        raise RequestError(
            f"{folder} was begun with {_listed(changed)} than there is now, under the same names; a resumed run would "
            "be neither the one nor the other. Bring back what was there, or start anew with --overwrite"
        )


def record(folder: Path, now: dict[str, Any], base: Base) -> None:
    """Write provenance.json for a run that begins; add a line to it for one that goes on."""
    before = read_json(folder / PROVENANCE)
    if before:
        before["resumed"] = [*before.get("resumed", []), _surroundings(base)]
    write_json(folder / PROVENANCE, before or now)


def _identities(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    def rows(values: dict[str, Any], name: str) -> Any:
        return values["data"][name]["examples_sha256"]

    return [
        ("another base", before["base"]["fingerprint"], now["base"]["fingerprint"]),
        ("a base in other bits", before["base"].get("held_as", {}), now["base"]["held_as"]),
        ("other training rows", rows(before, "train"), rows(now, "train")),
        ("other held-out rows", rows(before, "eval"), rows(now, "eval")),
        ("another chat template", before["template_sha256"], now["template_sha256"]),
    ]


def _begun_from_another(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    then, here = before.get("begun_from", {}).get("sha256"), now.get("begun_from", {}).get("sha256")
    return ["another adapter in adapter.init_from"] if then != here else []


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _rows(config: DataConfig, named: Sources | None, examples: Sequence[Example]) -> dict[str, Any]:
    files = {} if named is None else _file_hashes(config, named)
    single = {"sha256": next(iter(files.values()))} if len(files) == 1 else {"files": files} if files else {}
    return {
        "name": None if named is None else told(named),
        "rows": len(examples),
        "examples_sha256": _digest(examples),
        **single,
    }


def _file_hashes(config: DataConfig, named: Sources) -> dict[str, str]:
    """The SHA-256 of every file that rows were read from, by its path; data sets of the Hub have none."""
    found: dict[str, str] = {}
    for source in config.sources(named):
        located = locate(source)
        for file in located.files if located is not None else ():
            inner = sorted(file.path.rglob("*")) if file.path.is_dir() else [file.path]
            found |= {str(path): sha256_file(path) for path in inner if path.is_file()}
    return found


def _digest(examples: Sequence[Example]) -> str:
    if isinstance(examples, StreamedExamples):  # its tokens are not known before they are needed
        return examples.digest
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes())
        digest.update(example.weights.tobytes())
    return digest.hexdigest()


def _surroundings(base: Base) -> dict[str, Any]:
    found = {"python": platform.python_version(), "topwork": topwork.__version__}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"hardware": hardware(base.device), "versions": found}
