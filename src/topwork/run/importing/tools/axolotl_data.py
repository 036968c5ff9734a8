"""Axolotl's data sets: `type` says how a row is read, other keys which columns."""

from typing import Any

from topwork.run.importing.convert import LOADING, off_is, optional, packed, switch
from topwork.run.importing.draft import Draft
from topwork.run.importing.records import Key, Lacking, Needless, Put, Result, lacking, needless, to, together
from topwork.run.importing.sources import Source, cut, need_data, place, put_sources

_ALPACA_TEXT = (
    "instruction, input and output are read, and the model's chat template stands around them, not Alpaca's 'Below "
    "is an "
    "instruction …'"
)
_QUESTIONS = ("alpaca_chat.load_qa", "context_qa", "explainchoice", "concisechoice")
_TEXTS = ("completion", "pretrain")
_ALPACAS = ("alpaca", "gpteacher", "alpaca_chat", "alpaca_w_system", "alpaca_instruct", "orcamini")


def _template(value: Any, _: Draft) -> Result:
    name = str(value)
    if name == "chatml":
        return Put({"data.chat_template": "chatml"})
    if name == "jinja":
        return Needless("chat_template_jinja says it")
    if name.startswith("tokenizer_default"):
        return Needless("the model's own chat template, as here")
    return Lacking(f"the model's own chat template is used here, which {name} mostly is; else give a Jinja file")


def _excess(value: Any, _: Draft) -> Result:
    return Put({"data.too_long": {"raise": "refuse"}.get(str(value), str(value))})


def _inputs(value: Any, _: Draft) -> Result:
    return Put({"data.train_on": "all" if value is True else "answers"})


_DATA_KEYS = (
    together("path", "data.train"),
    together("name", "data.train", "the data set's configuration"),
    together("split", "data.train"),
    together("data_files", "data.train"),
    together("type", "data.format"),
    together("field", "data.columns"),
    together("text_column", "data.columns"),
    together("field_messages", "data.columns"),
    together("field_tools", "data.columns"),
    together("message_property_mappings", "data.message_keys"),
    together("message_field_role", "data.message_keys"),
    together("message_field_content", "data.message_keys"),
    together("field_thinking", "data.message_keys"),
    together("roles", "data.roles"),
    together("field_human", "data.columns"),
    together("field_model", "data.columns"),
)
_DATA_REST = (
    *lacking("shards shards_idx", "of a data set the first rows may be taken (max_rows), no shards"),
    to(
        "roles_to_train",
        "data.train_on",
        off_is((["assistant"], ["gpt"]), "the assistant's turns are learned; data.train_on: all learns everything"),
    ),
    to("train_on_eos", "", off_is(("turn",), "the token that ends a learned turn is learned, no other")),
    to("train_on_eot", "", off_is(("turn",), "the token that ends a learned turn is learned, no other")),
    to("chat_template", "data.chat_template", _template),
    to("chat_template_jinja", "data.chat_template"),
    *lacking(
        "message_field_training message_field_training_detail",
        "rows mark what is learned with a message's `weight` here",
    ),
    *lacking(
        "drop_system_message split_thinking conversation input_format input_transform field_chosen field_rejected "
        "step_separator max_completion_length train_on_last_step_only skip logprobs_field temperature",
        "it has no equal; prepare the rows so",
    ),
    *needless("ds_type preprocess_shards trust_remote_code template_thinking_key", LOADING),
    *lacking("revision", "a data set is read as it is now; download it for a revision"),
)


def _each(prefix: str) -> list[Key]:
    return [
        Key(f"{prefix}[].{key.theirs}", key.fate, key.ours, key.how, key.convert) for key in (*_DATA_KEYS, *_DATA_REST)
    ]


DATA = (
    *(key for prefix in ("datasets", "test_datasets", "pretraining_dataset") for key in _each(prefix)),
    to("sequence_len", "data.max_length"),
    to("excess_length_strategy", "data.too_long", _excess, default="drop"),
    to("train_on_inputs", "data.train_on", _inputs),
    to("chat_template", "data.chat_template", _template),
    to("chat_template_jinja", "data.chat_template"),
    to("chat_template_kwargs", "data.chat_template_kwargs"),
    to("default_system_message", "data.system"),
    to("dataset_exact_deduplication", "data.duplicates", switch("data.duplicates", "drop")),
    to("streaming", "data.streaming", optional("data.streaming")),
    to("sample_packing", "", packed("sequence_len")),
    *needless("eot_tokens", "the token that ends a turn is found in the template"),
    *needless(
        "sample_packing_* pad_to_sequence_len pad_to_multiple_of multipack_real_batches batch_flattening "
        "max_packed_sequence_len "
        "pretrain_multipack_* streaming_multipack_* total_num_tokens total_supervised_tokens "
        "pretraining_sample_concatenation",
        "a batch is one row of tokens without padding, in which no sequence sees another",
    ),
    *needless(
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num "
        "dataset_shard_idx "
        "skip_prepare_dataset num_dataset_shards_to_save shuffle_merged_datasets shuffle_before_merging_datasets "
        "remove_unused_columns "
        "dataloader_* is_preprocess preprocess_iterable push_dataset_to_hub",
        LOADING,
    ),
    *lacking(
        "min_sample_len max_prompt_len curriculum_sampling use_pose pose_*",
        "rows are taken as they are, in the seed's order; prepare them so",
    ),
)


def gather(draft: Draft) -> None:
    """`data`, of `datasets` (or `pretraining_dataset`) and `test_datasets`."""
    train = [source for prefix in ("datasets", "pretraining_dataset") for source in _sources(draft, prefix)]
    if train:
        put_sources(draft, "data.train", train)
    elif not draft.refused:
        need_data(draft, "datasets", "no data set is given")
    if train and all(source.format == "text" for source in train):
        _whole_texts(draft)
    held_out = _sources(draft, "test_datasets")
    if held_out:
        put_sources(draft, "data.eval", held_out)
        draft.values.pop("data.eval_fraction", None)


def _whole_texts(draft: Draft) -> None:
    """Plain text is cut up there, and all of it is learned, here too."""
    if not draft.has("excess_length_strategy"):
        draft.put("data.too_long", "split", "excess_length_strategy")
        draft.say("excess_length_strategy", "mapped", "plain text is cut up into sequences", "data.too_long")


def _sources(draft: Draft, prefix: str) -> list[Source]:
    found = []
    for each in draft.given:
        at = each.key.partition(".")[0]
        if each.key.startswith(f"{prefix}[") and at not in found:
            found.append(at)
    return [source for at in found for source in _source(draft, at)]


def _source(draft: Draft, at: str) -> list[Source]:
    path = draft.value(f"{at}.path")
    if path is None:
        draft.missing.append(f"data.train: {at} has no path that can be read; name a file or a Hub data set")
        return []
    split, rows = cut(draft, f"{at}.split", draft.value(f"{at}.split"))
    format, columns = _read(draft, at)
    keys = tuple(each.key for each in draft.given if each.key.startswith(f"{at}."))
    return [
        Source(each, split, format, columns, max_rows=rows, keys=keys)
        for each in place(str(path), draft.value(f"{at}.name"), draft.value(f"{at}.data_files"))
    ]


def _read(draft: Draft, at: str) -> tuple[str | None, dict[str, str]]:
    """The format and the columns of a data set."""
    kind = draft.value(f"{at}.type")
    if isinstance(kind, dict):
        return _own(draft, at, kind)
    name = str(kind or "")
    base = name.partition(":")[0]
    if base in _QUESTIONS:
        return "prompt_completion", {"prompt": "question", "completion": "answer"}
    if base.split(".")[0] in _ALPACAS:
        draft.note(f"{at}.type", _ALPACA_TEXT)
        return "alpaca", {}
    if base.startswith("sharegpt"):
        return "sharegpt", _columns(draft, at, "conversations")
    if base.startswith("chat_template") or base in ("llama2_chat", "messages.chat"):
        return "messages", _columns(draft, at, "messages")
    if base in _TEXTS or (not name and at.startswith("pretraining")):
        field = draft.value(f"{at}.field") or draft.value(f"{at}.text_column")
        return "text", {"text": field} if field and field != "text" else {}
    if kind is not None and not draft.refused:
        draft.say(f"{at}.type", "no equal", "how a row is read is recognised from the rows; see data.format for others")
    return None, {}


def _columns(draft: Draft, at: str, field: str) -> dict[str, str]:
    """Of conversations; what a message's keys and roles are called goes into `data`."""
    _message_keys(draft, at)
    _roles(draft, at)
    named = {field: draft.value(f"{at}.field_messages"), "tools": draft.value(f"{at}.field_tools")}
    return {ours: theirs for ours, theirs in named.items() if theirs and theirs != ours}


def _message_keys(draft: Draft, at: str) -> None:
    mappings = dict(draft.value(f"{at}.message_property_mappings") or {})
    for ours in ("role", "content"):
        theirs = draft.value(f"{at}.message_field_{ours}")
        if theirs:
            mappings.setdefault(ours, theirs)
    thinking = draft.value(f"{at}.field_thinking")
    if thinking:
        mappings.setdefault("reasoning_content", thinking)
    renamed = {theirs: ours for ours, theirs in mappings.items() if theirs != ours}
    if renamed:
        parts = ("message_property_mappings", "message_field_role", "message_field_content", "field_thinking")
        draft.put(
            "data.message_keys",
            {**draft.values.get("data.message_keys", {}), **renamed},
            *(f"{at}.{part}" for part in parts),
        )


def _roles(draft: Draft, at: str) -> None:
    roles = draft.value(f"{at}.roles") or {}
    listed = {
        name: ours for ours, theirs in roles.items() for name in (theirs if isinstance(theirs, list) else [theirs])
    }
    renamed = {str(theirs): ours for theirs, ours in listed.items() if theirs != ours}
    if renamed:
        draft.put("data.roles", {**draft.values.get("data.roles", {}), **renamed}, f"{at}.roles")


def _own(draft: Draft, at: str, kind: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    """A prompt of one's own: columns, and a template over them that becomes the prompt's text."""
    asked, more = kind.get("field_instruction") or "instruction", kind.get("field_input") or "input"
    columns = {"prompt": asked, "completion": kind.get("field_output") or "output"}
    if kind.get("field_system"):
        columns["system"] = kind["field_system"]
    form = kind.get("format") or kind.get("no_input_format")
    if form:
        columns["prompt"] = str(form).replace("{instruction}", f"{{{asked}}}").replace("{input}", f"{{{more}}}")
        draft.put("data.chat_template", "raw", f"{at}.type")
        draft.note(f"{at}.type", "its format is the prompt's whole text, so no chat template stands around it")
    if form and kind.get("format") and kind.get("no_input_format"):
        draft.note(f"{at}.type", "no_input_format has no equal: rows without an input are asked in `format` too")
    if kind.get("system_prompt"):
        draft.put("data.system", kind["system_prompt"], f"{at}.type")
    return "prompt_completion", columns
