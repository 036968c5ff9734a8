"""Unsloth's data, which its notebooks make with functions: what they load is read, what they do with it is told."""

from topwork.run.importing.draft import Draft
from topwork.run.importing.records import Given
from topwork.run.importing.sources import Source, cut, need_data, place, put_sources

_MAPPED = (
    "what functions make of the rows (map, formatting_func) is not read: the data set's own columns are, as "
    "data.format and "
    "data.columns say; `topwork lint` shows them"
)


def gather(draft: Draft) -> None:
    """The model where it is named by its place, `data`, and what is learned."""
    name = draft.value("from_pretrained.0")
    if isinstance(name, str):
        draft.put("model.model_name_or_path", name, "from_pretrained.0")
    studio = any(each.key.startswith(("training.", "lora.")) for each in draft.given)
    sources = _studio(draft) if studio else _loaded(draft)
    if sources:
        put_sources(draft, "data.train", sources)
    elif not draft.refused:
        need_data(draft, "data.dataset" if studio else "load_dataset", "no data set is given that can be read")
    if studio:
        _studio_defaults(draft)
    else:
        _script(draft)


def _loaded(draft: Draft) -> list[Source]:
    path = draft.value("load_dataset.0") or draft.value("load_dataset.path")
    if not isinstance(path, str):
        return []
    split, rows = cut(draft, "load_dataset.split", draft.value("load_dataset.split"))
    name = draft.value("load_dataset.1") or draft.value("load_dataset.name")
    keys = tuple(each.key for each in draft.given if each.key.startswith("load_dataset."))
    return [
        Source(each, split, max_rows=rows, keys=keys)
        for each in place(path, name, draft.value("load_dataset.data_files"))
    ]


def _script(draft: Draft) -> None:
    draft.put("data.too_long", "truncate", "from_pretrained.max_seq_length")
    if any(each.key in ("map", "SFTTrainer.formatting_func") for each in draft.given):
        draft.remarks.append(_MAPPED)
    if draft.has("train_on_responses_only") or draft.value("assistant_only_loss") is True:
        draft.put("data.train_on", "answers", "train_on_responses_only", "assistant_only_loss")
    elif "data.train" in draft.values:
        draft.add_default(Given("train_on_responses_only", "not called: all is learned"), "data.train_on")
        draft.values["data.train_on"] = "all"
    grafted = any(each.key.startswith("get_peft_model.") for each in draft.given)
    if grafted and "adapter.method" not in draft.values:
        draft.put("adapter.method", "lora", "get_peft_model.r")
    elif "adapter.method" not in draft.values:
        draft.remarks.append("get_peft_model is not called with what can be read; lora is taken, as it is here")


def _studio(draft: Draft) -> list[Source]:
    path = draft.value("data.dataset")
    return [Source(str(path), keys=("data.dataset",))] if path else []


def _studio_defaults(draft: Draft) -> None:
    """What Studio takes where its file is one of a model's defaults alone."""
    lora = any(each.key.startswith("lora.") for each in draft.given)
    if lora and "adapter.method" not in draft.values:
        draft.put("adapter.method", "lora")
    if "data.train" in draft.values and "data.eval" not in draft.values:
        draft.add_default(Given("eval_fraction", 0.0), "data.eval_fraction")
    draft.put("data.too_long", "truncate", "training.max_seq_length")
