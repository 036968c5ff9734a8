"""A model card: README.md with the front matter that the Hugging Face Hub reads, made from a run's folder or from what
merge, combine and export wrote.

The same folder gives the same bytes. Nothing in it tells a path of this machine, and every value is escaped.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from topwork.common.errors import shortened
from topwork.common.files import write_text
from topwork.reporting import markdown
from topwork.reporting.card_facts import (
    combined_rows,
    combined_scores,
    data_notes,
    data_rows,
    findings,
    made_rows,
    method_name,
    method_rows,
    not_again,
    ranks,
    read_back,
    score_rows,
)  # fmt: skip
from topwork.reporting.card_source import CardSource, data_name, hub_data, portable_recipe, read_source, without_places
from topwork.reporting.card_use import uses
from topwork.reporting.readers import entries, number, section
from topwork.reporting.sections import scores

if TYPE_CHECKING:
    from jinja2 import Environment

CARD = "README.md"
SAMPLES = 3
SHOWN = 1500
"""Characters of a sample's part."""


def card_of(
    folder: Path,
    run: Path | None = None,
    repo: str | None = None,
    base: str | None = None,
    samples: int = SAMPLES,
) -> str:
    """The card of a folder, as text.

    run      where its training is told, where `folder` is no run itself: what merge and export read
    repo     the repository that it will lie in; OWNER/NAME stands for it in the commands while there is none
    base     the base's name, where it is another than the files tell
    samples  so many answers to held-out rows are shown, which are the user's data

    Raises RequestError for a folder that holds neither an adapter nor a model.
    """
    return render_card(read_source(folder, run, repo, base), samples)


def add_card(folder: Path, run: Path | None = None) -> None:
    """Write the card of a folder that merge, combine or export has filled, without samples of anybody's rows."""
    write_text(folder / CARD, card_of(folder, run, samples=0))


def render_card(source: CardSource, samples: int = SAMPLES) -> str:
    """The card of what was read."""
    recipe = portable_recipe(source) if source.recipe else {}
    front = yaml.safe_dump(front_matter(source), sort_keys=False, allow_unicode=True, width=1000)
    body = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            source=source,
            summary=_summary(source),
            scores=score_rows(source),
            evaluated=_evaluated(source),
            made=made_rows(source),
            findings=[*findings(source), *read_back(source)],
            combined=combined_rows(source),
            combined_scores=combined_scores(source),
            data=data_rows(source),
            notes=data_notes(source),
            method=method_rows(source) if source.recipe or source.kind == "adapter" else [],
            uses=uses(source),
            samples=_samples(source, samples),
            warnings=without_places(entries(source.result, "warnings")),
            recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
            tokens_per_pass=source.provenance.get("tokens_per_pass"),
            not_again=not_again(source),
        )
    )
    return f"---\n{front}---\n\n{body.strip()}\n"


def front_matter(source: CardSource) -> dict[str, Any]:
    """What the Hub reads: https://huggingface.co/docs/hub/model-cards. Language and license are nobody's but the
    user's to say, and a base that is not on the Hub has no id there."""
    library = {"adapter": "peft", "model": "transformers"}.get(source.kind)
    if source.kind == "adapter" and not source.adapter.get("peft_type"):
        library = None
    found: dict[str, Any] = {"library_name": library} if library else {}
    if source.base:
        found |= {"base_model": source.base, "base_model_relation": _relation(source)}
    if sets := hub_data(source):
        found["datasets"] = sets
    found |= {"pipeline_tag": "text-generation", "tags": _tags(source)}
    if results := _results(source):
        found["model-index"] = [{"name": source.name, "results": results}]
    return found


def _relation(source: CardSource) -> str:
    """The Hub's words: a base with an adapter folded in is a finetune; a merge is one of several models."""
    if source.kind == "adapter" or source.gguf_adapter:
        return "adapter"
    return "quantized" if source.kind == "gguf" and not source.folded else "finetune"


def _tags(source: CardSource) -> list[str]:
    method, objective = method_name(source).lower(), section(source.recipe, "training").get("objective")
    if isinstance(objective, dict):
        objective = objective.get("name")
    named = [method.replace(" ", "-"), str(objective or ""), source.made_by if source.made_by == "combine" else ""]
    named += ["gguf" if source.kind == "gguf" else "", "topwork"]
    return list(dict.fromkeys(name for name in named if name))


def _results(source: CardSource) -> list[dict[str, Any]]:
    """The scores after training, in the form of a model-index; the ones before stand in the text."""
    metrics = [
        {
            "type": "exact_match" if score.is_field else score.name.replace(" ", "_").lower(),
            "name": f"exact match of {score.name}" if score.is_field else score.name,
            "value": round(score.after, 6),
        }
        for score in scores(source.evaluation)
        if score.after is not None
    ]
    loss = number(source.evaluation, "after", "loss")
    metrics += [{"type": "loss", "name": "loss", "value": round(loss, 6)}] if loss is not None else []
    if not metrics:
        return []
    named = markdown.one_line(_rows_name(source))
    dataset = {"name": named, "type": named}
    return [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}]


def _rows_name(source: CardSource) -> str:
    told = str(source.evaluation.get("data") or "held out of training")
    return ", ".join(data_name(path, {}) if "/" in path else path for path in told.split(", "))


def _evaluated(source: CardSource) -> str:
    """What the scores were taken on, as one sentence."""
    rows = number(source.evaluation, "rows")
    if rows is None:
        return ""
    graded = markdown.text(source.evaluation.get("grader", ""))
    beside = "" if source.kind == "adapter" else " Taken with the adapter beside its base, before it was folded in."
    return f"{rows:,.0f} rows ({markdown.text(_rows_name(source))}), graded as {graded}.{beside}"


def _summary(source: CardSource) -> str:
    """What it is, in one sentence."""
    base = f"[{markdown.text(source.base)}](https://huggingface.co/{source.base})" if source.base else _local(source)
    method = markdown.text(method_name(source))
    rank = f" (rank {ranks(source)[-1]})" if ranks(source) and source.kind == "adapter" else ""
    if source.kind == "adapter":
        made = "combined from several" if source.made_by == "combine" else "trained" if source.recipe else "written"
        article = "An" if method[:1] in "AEIO" else "A"
        return f"{article} {method} adapter{rank} for {base}, {made} with Topwork."
    if source.kind == "gguf":
        what = "A GGUF adapter for" if source.gguf_adapter else "GGUF files of"
        return f"{what} {base}{_folded(source, method)}, written with Topwork."
    return f"{base}{_folded(source, method)}, written with Topwork."


def _folded(source: CardSource, method: str) -> str:
    article = "an" if method[:1] in "AEIO" or not method else "a"
    return f" with {article} {method} adapter folded in".replace("  ", " ") if source.folded else ""


def _local(source: CardSource) -> str:
    return f"{markdown.code(source.local)} (a base of its maker's own)" if source.local else "its base"


def _samples(source: CardSource, count: int) -> list[dict[str, Any]]:
    rows = [row for row in entries(source.evaluation, "samples") if isinstance(row, dict)][:count]
    titles = {"prompt": "asked", "reference": "expected", "before": "before", "after": "after"}
    return [
        {title: shortened(str(row[key]), SHOWN) for key, title in titles.items() if row.get(key) is not None}
        for row in rows
    ]


def _environment() -> "Environment":
    """Markdown is escaped by filters, where a value's place decides how."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("topwork.reporting"), autoescape=False, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"text": markdown.text, "code": markdown.code, "fenced": markdown.fenced}
    return made
