"""What a model card tells of the training: its data, its method, its scores. Rows of tables, in Markdown already."""

from collections.abc import Mapping
from typing import Any

from topwork.models.source import ALIASES, EMBEDDED
from topwork.reporting import wording
from topwork.reporting.card_source import CardSource, data_name, hub_data, last_part, without_places
from topwork.reporting.markdown import code, one_line, text
from topwork.reporting.readers import entries, number, section
from topwork.reporting.sections import scores

Rows = list[tuple[str, ...]]
LISTED = 12
"""So many files, or entries of a list, are told one by one."""
METHODS = {
    "LORA": "LoRA", "IA3": "IA3", "PREFIX_TUNING": "prefix tuning", "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning", "VERA": "VeRA", "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT",
}  # fmt: skip
LEARNED = {
    "answers": "the assistant's answers and the token that ends each; the prompt is masked",
    "last_answer": "the last answer alone and the token that ends it; all before it is masked",
    "all": "every token",
}


def method_name(source: CardSource) -> str:
    """LoRA, rsLoRA, DoRA, IA3 … as people call it; empty where nothing tells it."""
    config = source.adapter or section(source.recipe, "adapter")
    kind = str(config.get("peft_type") or config.get("topwork_method") or config.get("method") or "")
    if config.get("use_dora"):
        return "DoRA"
    name = METHODS.get(kind.upper(), kind)
    return f"rs{name}" if config.get("use_rslora") else name


def ranks(source: CardSource) -> list[int]:
    """The ranks of a LoRA's modules, each once, the largest last."""
    config = source.adapter or section(source.recipe, "adapter")
    found = {config.get("r"), *section(config, "rank_pattern").values()}
    return sorted(rank for rank in found if isinstance(rank, int))


def data_rows(source: CardSource) -> Rows:
    """(part, file or data set, rows, SHA-256) of what was learned and what was held out."""
    found: Rows = []
    named = {"train": "training", "eval": "held out"}
    for key, part in named.items():
        side = section(source.provenance, "data", key)
        rows = number(side, "rows")
        counted = wording.whole(rows) if rows is not None else "–"
        if not rows:
            continue
        files = section(side, "files")
        if not files:
            name = side.get("name") or "rows of the same, drawn by the seed"
            shown = code(data_name(str(name), side)) if side.get("name") else name
            found.append((part, shown, counted, code(side["sha256"]) if side.get("sha256") else "–"))
        for at, (path, digest) in enumerate(list(files.items())[:LISTED]):
            found.append((part if at == 0 else "", code(last_part(path)), counted if at == 0 else "", code(digest)))
        if len(files) > LISTED:
            found.append(("", f"and {len(files) - LISTED} more files", "", ""))
    return found


def data_notes(source: CardSource) -> list[str]:
    """How the rows were read, and what of them was learned."""
    data, told = section(source.recipe, "data"), section(source.result, "data")
    found = [f"Data sets of the Hub: {', '.join(map(code, hub_data(source)))}."] if hub_data(source) else []
    found += [f"Rows are {text(told['recognised'])}."] if told.get("recognised") else []
    sides = sorted((key, line) for key, line in told.items() if key not in ("recognised", "notes"))
    found += [f"{text(key)}: {text(line)}." for key, line in reversed(sides)]
    found += [f"{text(one_line(without_places(line)).rstrip('.'))}." for line in entries(told, "notes")]
    if data:
        found.append(f"Learned: {LEARNED.get(str(data.get('train_on')), 'what the recipe below says')}.")
    if digest := source.provenance.get("template_sha256"):
        found.append(f"Chat template: {_template(data)}, SHA-256 {code(digest)}.")
    return found


def _template(data: Mapping[str, Any]) -> str:
    given = data.get("chat_template")
    if given is None:
        return "the base model's own"
    shown = "" if "{" in str(given) else f", {code(last_part(str(given)))}"
    return f"not the base model's own{shown} (`chat_template.jinja` here)"


def method_rows(source: CardSource) -> Rows:
    """(name, value) of what decides a training."""
    training, provenance = section(source.recipe, "training"), source.provenance
    found: Rows = [("Method", text(method_name(source)))] if method_name(source) else []
    found += _adapter_rows(source.adapter or section(source.recipe, "adapter"))
    found += _base_rows(source)
    found += [(title, text(_value(training[key]))) for key, title in TRAINING.items() if _told(training.get(key))]
    found += _step_rows(source.result)
    told = {"seed": "Seed", "tokens_per_pass": "Tokens per pass", "hardware": "Hardware"}
    found += [(title, text(provenance[key])) for key, title in told.items() if provenance.get(key) is not None]
    versions = ", ".join(f"{name} {version}" for name, version in section(provenance, "versions").items())
    found += [("Versions", text(versions))] if versions else []
    resumed, together = _mappings(provenance, "resumed"), entries(provenance, "trained_together")
    if resumed:
        found.append(("Resumed", f"{len(resumed)} times" if len(resumed) > 1 else "once"))
    return found + ([("Trained together with", f"{len(together) - 1} others")] if len(together) > 1 else [])


def not_again(source: CardSource) -> str:
    """Why the recipe alone does not give the same bytes; empty where it does."""
    first = {name: source.provenance.get(name) for name in ("hardware", "versions")}
    if any({name: each.get(name) for name in first} != first for each in _mappings(source.provenance, "resumed")):
        return "It was resumed on another machine or with other versions, so that rounding differs from any single run."
    if len(entries(source.provenance, "trained_together")) > 1:
        return "It was trained in the same passes as others, so that its rounding differs from a run alone."
    return ""


def _base_rows(source: CardSource) -> Rows:
    trainable, share = (number(source.result, "parameters", name) for name in ("trainable", "share"))
    found: Rows = []
    if trainable is not None and share is not None:
        found.append(("Trained parameters", f"{wording.whole(trainable)} ({wording.share(share)})"))
    if fingerprint := section(source.provenance, "base").get("fingerprint"):
        found.append(("Base weights", code(fingerprint)))
    if copied := _copied(source):
        found.append(("Base as named", copied))
    if held := source.result.get("base_held_as"):
        found.append(("Base held", text(held)))
    if begun := section(source.provenance, "begun_from"):
        name = code(last_part(str(begun.get("path"))))
        found.append(("Begun from", f"the adapter {name}, its tensors' file {code(begun.get('sha256'))}"))
    return found


def _step_rows(result: Mapping[str, Any]) -> Rows:
    steps, planned, tokens = (number(result, name) for name in ("steps", "planned_steps", "tokens"))
    if steps is None:
        return []
    of = f" of {wording.whole(planned)}" if planned is not None and planned != steps else ""
    found: Rows = [("Steps", f"{wording.whole(steps)}{of}, {wording.whole(tokens or 0)} tokens")]
    best = number(result, "best_step")
    return [*found, ("Kept", f"the adapter of step {wording.whole(best)}")] if best else found


def _copied(source: CardSource) -> str | None:
    """An alias's weights may be those of a package, which are others than the Hub's."""
    alias = str(section(source.recipe, "model").get("model_name_or_path"))
    package, file = EMBEDDED.get(ALIASES.get(alias, ""), ("", ""))
    return f"{code(alias)}: where the package {code(package)} is installed, its {code(file)}" if package else None


TRAINING = {
    "objective": "Objective", "learning_rate": "Learning rate", "lr_scheduler_type": "Schedule",
    "warmup_ratio": "Warm-up (share)", "warmup_steps": "Warm-up (steps)", "optim": "Optimizer",
    "weight_decay": "Weight decay", "batch_size": "Sequences a step", "num_train_epochs": "Epochs (at most)",
    "max_grad_norm": "Largest gradient norm",
}  # fmt: skip


def _adapter_rows(config: Mapping[str, Any]) -> Rows:
    """Rank, scale and targets of a LoRA; of another method what its file says."""
    r, alpha = number(config, "r"), number(config, "lora_alpha")
    found: Rows = []
    if r and alpha is not None:
        scale, by = (alpha / r**0.5, "√r") if config.get("use_rslora") else (alpha / r, "r")
        found.append(("Rank, alpha", f"{r:g}, {alpha:g} (alpha/{by} = {scale:.4g})"))
    targets = config.get("target_modules")
    if targets:
        several = isinstance(targets, list)
        listed = targets[:LISTED] if several else [targets]
        more = f" and {len(targets) - LISTED} more" if several and len(targets) > LISTED else ""
        found.append(("Targets", ", ".join(map(code, listed)) + more))
    for key, title in ADAPTER.items():
        if _told(config.get(key)):
            found.append(
                (title, code(_value(config[key])) if isinstance(config[key], Mapping) else text(_value(config[key])))
            )
    return found


ADAPTER = {
    "rank_pattern": "Other ranks", "alpha_pattern": "Other alphas", "layers_to_transform": "Layers",
    "modules_to_save": "Trained whole", "trainable_token_indices": "Trained tokens", "lora_dropout": "Dropout",
    "feedforward_modules": "Scaled at their inputs", "num_virtual_tokens": "Virtual tokens",
}  # fmt: skip


def _told(value: Any) -> bool:
    return value not in (None, False, 0, 0.0, [], {}, "")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {each}" for key, each in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - LISTED} more" if len(value) > LISTED else ""
        return ", ".join(map(str, value[:LISTED])) + more
    return f"{value:g}" if isinstance(value, float) else str(value)


def score_rows(source: CardSource) -> Rows:
    """(measure, before, after, points, 95 % interval of after); what got worse stands there like what got better."""
    found: Rows = []
    for score in scores(source.evaluation):
        shown = [wording.share(value) if value is not None else "–" for value in (score.before, score.after)]
        name = code(score.name) if score.is_field else text(score.name)
        found.append((name, *shown, score.difference or "–", score.interval or "–"))
    pairs = {
        "loss": tuple(number(source.evaluation, when, "loss") for when in ("before", "after")),
        _validated(source): tuple(number(source.result, f"eval_loss_{when}") for when in ("before", "after")),
    }
    for name, pair in pairs.items():
        if pair[1] is not None:
            shown = [wording.loss(value) if value is not None else "–" for value in pair]
            found.append((name, *shown, "", ""))
    return found


def _validated(source: CardSource) -> str:
    """What the validation loss is called: an adapter that began from another has that one's before its first step."""
    begun = section(source.provenance, "begun_from")
    return "validation loss (before: with the adapter that it began from)" if begun else "validation loss"


def made_rows(source: CardSource) -> Rows:
    """(name, value) of what merge, combine, export or convert tells of its work; lists of many entries are counted."""
    return [
        (text(name.replace("_", " ")), shown)
        for name, value in sorted(without_places(source.made).items())
        if name not in TABLED and (shown := _shown(value)) is not None
    ]


TABLED = ("sources", "evaluation", "findings", "use", "read_back")
"""What of it has a place of its own."""


def read_back(source: CardSource) -> list[str]:
    """By which readers a written folder was read again, and how far what they read lies from what was written."""
    found = []
    for each in _mappings(source.made, "read_back"):
        largest, prompts = number(each, "largest"), number(each, "prompts")
        if largest is None:
            continue
        told = f"updates {largest:.1e} apart"
        if prompts:
            kind, unit = ("log-probabilities", "nats") if each.get("unit") == "nats" else ("logits", "of the largest")
            told = f"{kind} {largest:.1e} {unit} apart at most, on {wording.whole(prompts)} prompts"
        found.append(f"Read back by {text(each.get('by'))}: {told}.")
    return found


def findings(source: CardSource) -> list[str]:
    """What an adapter had that its reader would have taken wrongly, and what was done about it."""
    found = []
    for each in _mappings(source.made, "findings"):
        shown = f" ({text(each['found'])})" if each.get("found") else ""
        unseen = f", which {text(source.made.get('reader'))} {text(each['unseen'])}" if each.get("unseen") else ""
        found.append(f"{text(str(each.get('feature')).replace('_', ' '))}{shown}{unseen}: {text(each.get('action'))}.")
    return found


def combined_rows(source: CardSource) -> Rows:
    """(adapter, method, weight, SHA-256 of its content) of what was combined."""
    found: Rows = []
    for each in _mappings(source.made, "sources"):
        rank = f", rank {each['rank']}" if each.get("rank") else ""
        weight = number(each, "weight")
        shown = f"{weight:+g}" if weight is not None else "–"
        content = code(str(each["content"]).removeprefix("sha256:")) if each.get("content") else "–"
        found.append((code(last_part(each.get("name"))), text(f"{each.get('method') or ''}{rank}"), shown, content))
    return found


def combined_scores(source: CardSource) -> list[tuple[str, Rows]]:
    """For each source's rows what they are, and a table: (measure, the result, the source, the base …)."""
    found = []
    for tested in _mappings(source.made, "evaluation"):
        arms = section(tested, "scores")
        measures = [name for name in ("exact_match", "json_valid", "loss") if any(name in arm for arm in arms.values())]
        rows: Rows = [("", *(text(last_part(name)) for name in arms))]
        for name in measures:
            values = [number(arm, name) for arm in arms.values()]
            worded = wording.loss if name == "loss" else wording.share
            told = [worded(value) if value is not None else "–" for value in values]
            rows.append((text(name.replace("_", " ").replace("json", "JSON")), *told))
        named = data_name(one_line(tested.get("data", "")), {})
        found.append((f"{wording.whole(number(tested, 'rows') or 0)} rows ({text(named)})", rows))
    return found


def _mappings(values: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [each for each in entries(values, key) if isinstance(each, Mapping)]


def _shown(value: Any) -> str | None:
    if value in (None, "", [], {}):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return wording.whole(value) if isinstance(value, int) and abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        inner = [f"{text(key)}: {shown}" for key, each in value.items() if (shown := _shown(each)) is not None]
        return "; ".join(inner) if len(inner) <= LISTED else f"{len(inner)} entries"
    if isinstance(value, list):
        lines = [each for each in map(_shown, value) if each is not None]
        return "<br>".join(lines) if len(lines) <= LISTED else f"{len(lines)} entries"
    return code(value) if len(one_line(value)) >= 32 and " " not in one_line(value) else text(value)
