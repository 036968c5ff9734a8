"""TRL's data: what its files, command lines and scripts name, and what it learns of the rows."""

from topwork.run.importing.draft import Draft
from topwork.run.importing.sources import Source, cut, is_placeholder, need_data, place, put_sources

_LEARNED = (
    "TRL learns every token of rows with messages or text, and completions alone of rows with prompt and "
    "completion. Here "
    "answers are learned in all of them; for everything: data.train_on: all"
)
_MAPPED = "rows that a function makes (map, formatting_func) are not read: the data set's own columns are"
_MODEL = "AutoModelForCausalLM.from_pretrained.0"


def gather(draft: Draft) -> None:
    """The model of a script, `data`, and what is learned."""
    _model(draft)
    sources = _scripted(draft) or _mixed(draft) or _named(draft)
    if sources:
        put_sources(draft, "data.train", sources)
    elif not draft.refused:
        need_data(draft, "dataset_name", "no data set is given that can be read")
    _text(draft, sources)
    _validated(draft)
    _learned(draft)
    scripted = any(each.key.startswith("SFTTrainer.") for each in draft.given)
    if scripted and not draft.has("LoraConfig.r"):
        draft.put("adapter.method", "full")
        draft.remarks.append("no LoraConfig: all weights are trained (adapter.method: full)")


def _model(draft: Draft) -> None:
    for key in ("SFTTrainer.model", "SFTTrainer.0", _MODEL):
        named = draft.value(key)
        if isinstance(named, str):
            draft.put("model.model_name_or_path", named, key)


def _scripted(draft: Draft) -> list[Source]:
    """What `load_dataset` is called with."""
    path = draft.value("load_dataset.0") or draft.value("load_dataset.path")
    if path is None:
        return []
    split, rows = cut(draft, "load_dataset.split", draft.value("load_dataset.split"))
    name = draft.value("load_dataset.1") or draft.value("load_dataset.name")
    keys = tuple(each.key for each in draft.given if each.key.startswith("load_dataset."))
    paths = place(str(path), name, draft.value("load_dataset.data_files"))
    return [Source(each, split, max_rows=rows, keys=keys) for each in paths]


def _mixed(draft: Draft) -> list[Source]:
    found = []
    for index in range(len({each.key.partition(".")[0] for each in draft.given if each.key.startswith("datasets[")})):
        at = f"datasets[{index}]"
        path = draft.value(f"{at}.path")
        if path is None:
            continue
        split, rows = cut(draft, f"{at}.split", draft.value(f"{at}.split"))
        keys = tuple(each.key for each in draft.given if each.key.startswith(f"{at}."))
        named = place(str(path), draft.value(f"{at}.name"), draft.value(f"{at}.data_files"))
        weight = draft.value(f"{at}.fraction")
        found += [Source(each, split, max_rows=rows, weight=weight, keys=keys) for each in named]
    return found


def _named(draft: Draft) -> list[Source]:
    path = draft.value("dataset_name")
    if not path or is_placeholder(str(path)):
        return []
    split = draft.value("dataset_train_split")
    keys = ("dataset_name", "dataset_config", "dataset_train_split")
    split, rows = cut(draft, "dataset_train_split", split)
    return [Source(place(str(path), draft.value("dataset_config"))[0], split, max_rows=rows, keys=keys)]


def _text(draft: Draft, sources: list[Source]) -> None:
    field = draft.value("dataset_text_field") or draft.value("SFTTrainer.dataset_text_field")
    key = "dataset_text_field" if draft.has("dataset_text_field") else "SFTTrainer.dataset_text_field"
    made = any(each.key in ("map", "SFTTrainer.formatting_func") for each in draft.given)
    if made:
        draft.remarks.append(_MAPPED)
    if field and not made and sources:
        draft.put("data.format", "text", key)
        if field != "text":
            draft.put("data.columns", {"text": field}, key)
        draft.say(key, "mapped", "plain text, all of which is learned", "data.format, data.columns")


def _validated(draft: Draft) -> None:
    """With a strategy, the test split of the same data set; a script's own eval_dataset is not read."""
    asked = draft.value("eval_strategy", "no") not in ("no", False) or draft.value("evaluation_strategy", "no") != "no"
    if not asked or not draft.has("dataset_name") or "data.train" not in draft.values:
        return
    split = draft.value("dataset_test_split") or "test"
    path = place(str(draft.value("dataset_name")), draft.value("dataset_config"))[0]
    put_sources(draft, "data.eval", [Source(path, split, keys=("eval_strategy", "dataset_test_split"))])


def _learned(draft: Draft) -> None:
    if draft.value("assistant_only_loss") is True or draft.value("completion_only_loss") is True:
        draft.put("data.train_on", "answers", "assistant_only_loss", "completion_only_loss")
    elif draft.value("completion_only_loss") is False:
        draft.put("data.train_on", "all", "completion_only_loss")
    elif draft.has("train_on_responses_only"):
        draft.put("data.train_on", "answers", "train_on_responses_only")
    elif "data.format" not in draft.values and "data.train" in draft.values:
        draft.remarks.append(_LEARNED)
