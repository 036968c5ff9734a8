"""torchtune's data sets: a builder each, with the data set that it reads where none is named."""

from dataclasses import dataclass, field

from topwork.run.importing.draft import Draft
from topwork.run.importing.records import Given
from topwork.run.importing.sources import Source, cut, need_data, place, put_sources


@dataclass(frozen=True)
class _Builder:
    """What a builder reads: its own data set, a format, columns (ours: theirs), and whether prompts are learned."""

    source: str | None
    format: str | None
    columns: dict[str, str] = field(default_factory=dict)
    prompts: bool = False
    name: str | None = None


_ASKED = {"input": "prompt", "output": "completion"}
BUILDERS = {
    "alpaca_dataset": _Builder("tatsu-lab/alpaca", "alpaca", prompts=True),
    "alpaca_cleaned_dataset": _Builder("yahma/alpaca-cleaned", "alpaca", prompts=True),
    "instruct_dataset": _Builder(None, "prompt_completion", {"prompt": "input", "completion": "output"}),
    "chat_dataset": _Builder(None, None),
    "text_completion_dataset": _Builder(None, "text"),
    "wikitext_dataset": _Builder("EleutherAI/wikitext_document_level", "text", {"text": "page"}),
    "cnn_dailymail_articles_dataset": _Builder("ccdv/cnn_dailymail", "text", {"text": "article"}, name="3.0.0"),
    "samsum_dataset": _Builder("Samsung/samsum", "prompt_completion", {"prompt": "dialogue", "completion": "summary"}),
    "grammar_dataset": _Builder("liweili/c4_200m", "prompt_completion", {"prompt": "input", "completion": "output"}),
    "slimorca_dataset": _Builder("Open-Orca/SlimOrca-Dedup", "sharegpt"),
}
_NO_LIMIT = 131_072
"""Longer than a row; the model's context bounds it."""
_ALPACA_TEXT = "instruction, input and output are read without Alpaca's 'Below is an instruction …' around them"
_PREFERENCES = ("stack_exchange_paired_dataset", "hh_rlhf_helpful_dataset", "preference_dataset")


def gather(draft: Draft) -> None:
    """`data`, and what is learned of it."""
    at = sorted({each.key.partition(".")[0] for each in draft.given if each.key.startswith("dataset[")}) or ["dataset"]
    sources = [source for each in at for source in _sources(draft, each)]
    if sources:
        put_sources(draft, "data.train", sources)
        _learned(draft, at)
    elif not any(each.key.startswith("optimizer.") and each.line for each in draft.given):
        draft.refused.append("it has neither a data set nor an optimizer, and trains nothing")
    elif not draft.refused and not draft.missing:
        need_data(draft, "dataset", "no data set is given that is known")
    if "data.max_length" in draft.values:
        draft.put("data.too_long", "truncate", "tokenizer.max_seq_len")
    else:
        draft.add_default(Given("tokenizer.max_seq_len", _NO_LIMIT), "data.max_length")
        draft.remarks.append(
            "tokenizer.max_seq_len is not given, so no row was cut: the model's context bounds them here"
        )
    draft.add_default(Given("dataset_val", "none"), "data.eval_fraction")
    draft.values["data.eval_fraction"] = 0.0


def _sources(draft: Draft, at: str) -> list[Source]:
    name = str(draft.value(f"{at}._component_", "")).rpartition(".")[2]
    if name in _PREFERENCES and not draft.refused:
        draft.refused.append(f"{at}: {name} holds preferences; Topwork has sft alone so far")
    found = BUILDERS.get(name)
    if found is None:
        if "multimodal" in str(draft.value(f"{at}._component_", "")) or "image" in name or "cauldron" in name:
            draft.missing.append(f"data.train: {name} ({at}) holds images, which are not read here; name rows of text")
        elif name and not draft.refused:
            draft.missing.append(
                f"data.train: {name} ({at}) is no data set that is known here; name its file or Hub id"
            )
        return []
    path = draft.value(f"{at}.source", found.source)
    if path is None:
        return []
    split, rows = cut(draft, f"{at}.split", draft.value(f"{at}.split"))
    keys = tuple(each.key for each in draft.given if each.key.startswith(f"{at}."))
    given = draft.value(f"{at}.name") or draft.value(f"{at}.subset") or (found.name if path == found.source else None)
    format, columns = _read(draft, at, name, found)
    system = draft.value(f"{at}.new_system_prompt")
    return [
        Source(each, split, format, columns, system, rows, keys=keys)
        for each in place(str(path), given, draft.value(f"{at}.data_files"))
    ]


def _read(draft: Draft, at: str, name: str, found: _Builder) -> tuple[str | None, dict[str, str]]:
    if name == "chat_dataset":
        style = "sharegpt" if draft.value(f"{at}.conversation_style") == "sharegpt" else "messages"
        ours = "conversations" if style == "sharegpt" else "messages"
        column = draft.value(f"{at}.conversation_column", ours)
        return style, {} if column == ours else {ours: column}
    if found.format == "text":
        column = draft.value(f"{at}.column") or found.columns.get("text", "text")
        return "text", {} if column == "text" else {"text": column}
    if found.format == "alpaca":
        draft.note(f"{at}._component_", _ALPACA_TEXT)
    mapped = draft.value(f"{at}.column_map") or {}
    names = _ASKED if found.format == "prompt_completion" else {}
    return found.format, {**found.columns, **{names.get(key, key): column for key, column in mapped.items()}}


def _learned(draft: Draft, at: list[str]) -> None:
    """`train_on_input`, and where it is left out the builder's own."""
    asked = [
        draft.value(f"{each}.train_on_input", found.prompts)
        for each in at
        if (found := BUILDERS.get(str(draft.value(f"{each}._component_", "")).rpartition(".")[2])) is not None
    ]
    keys = [f"{each}.train_on_input" for each in at]
    if not any(map(draft.has, keys)):
        draft.add_default(Given(keys[0], asked[0]), "data.train_on")
        keys = []
    origins = draft.origins.get("data.train_on", [])
    draft.put("data.train_on", "all" if all(asked) else "answers", *keys)
    draft.origins["data.train_on"] += origins
