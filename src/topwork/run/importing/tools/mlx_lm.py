"""mlx-lm's YAML and command line. Keys, meanings and defaults as in the package mlx-lm 0.32.2 (`lora.py`,
`tuner/utils.py`, `tuner/datasets.py`, `tuner/trainer.py`)."""

from pathlib import Path
from typing import Any

from topwork.common.errors import TopworkError
from topwork.models.config_files import find_config
from topwork.run.importing.convert import (
    KERNELS,
    LOADING,
    LOGGING,
    RECOMPUTED,
    every,
    optional,
    whole,
)
from topwork.run.importing.draft import Draft, Told
from topwork.run.importing.records import (
    Convert,
    Given,
    Lacking,
    Needless,
    Put,
    Refused,
    Result,
    Tool,
    lacking,
    needless,
    to,
    together,
)
from topwork.run.importing.sources import Source, cut, is_placeholder, need_data, put_sources

_WIKI = "mlx-community/WikiSQL"
_PASSES = "iters count passes there, each of batch_size rows; steps here are grad_accumulation_steps passes each"


def _accumulated(draft: Draft) -> int:
    return max(1, whole(draft.value("grad_accumulation_steps", 1)))


def _batch(_: Any, draft: Draft) -> Result:
    size, passes = whole(draft.value("batch_size", 4)), _accumulated(draft)
    return Put({"training.batch_size": size * passes}, f"{size} rows x {passes} passes; the rows of all devices")


def _iters(value: Any, draft: Draft) -> Result:
    return Put({"training.max_steps": max(1, whole(value) // _accumulated(draft))}, _PASSES)


def _counted(ours: str) -> Convert:
    """Every so many passes, as steps."""

    def convert(value: Any, draft: Draft) -> Result:
        return every(ours)(max(1, whole(value) // _accumulated(draft)), draft)

    return convert


def _method(value: Any, _: Draft) -> Result:
    if value in ("lora", "dora", "full"):
        return Put({"adapter.method": value})
    return Refused(f"{value}: its methods are lora, dora and full")


def _scale(value: Any, draft: Draft) -> Result:
    rank = whole(draft.value("lora_parameters.rank", 8))
    alpha = float(value) * rank
    return Put(
        {"adapter.lora_alpha": int(alpha) if alpha.is_integer() else alpha},
        f"its scale is the factor itself; lora_alpha / r here: {value:g} x {rank}",
    )


def _keys(value: Any, _: Draft) -> Result:
    return Put({"adapter.target_modules": [str(name) for name in value]})


def _layers(value: Any, draft: Draft) -> Result:
    """The last layers; which they are needs the model's config."""
    count = whole(value)
    if count < 0:
        return Needless("all layers, as here")
    if draft.value("fine_tune_type") == "full":
        return Lacking(f"the last {count} layers whole; full trains all of them")
    total = _layers_of(draft.value("model"))
    if total is None:
        return Lacking(
            f"the last {count} layers; how many there are is in the model's config, which is not at hand: all layers "
            f"are "
            f"trained unless adapter.layers_to_transform lists those {count}"
        )
    if count >= total:
        return Needless(f"all {total} layers, as here")
    return Put({"adapter.layers_to_transform": list(range(total - count, total))}, f"the last of {total} layers")


def _layers_of(model: Any) -> int | None:
    """How many layers a model has, where its config is to be had."""
    try:
        values = find_config(str(model)).values()
    except (TopworkError, OSError, ValueError):
        return None
    inner = values["text_config"] if isinstance(values.get("text_config"), dict) else values
    return next((inner[name] for name in ("num_hidden_layers", "n_layer") if isinstance(inner.get(name), int)), None)


def _model(value: Any, draft: Draft) -> Result:
    if is_placeholder(str(value)):
        draft.missing.append(f"model.model_name_or_path: {value} stands for one; name a Hub id or a folder")
        return Lacking("a place to fill in")
    note = ""
    if str(value).startswith("mlx-community/") or str(value).lower().endswith(("bit", "-q4", "-q8", "mlx")):
        note = "weights in MLX's own packing are not read here: name the model that it was made of, and load_in_4bit"
    return Put({"model.model_name_or_path": "Qwen/Qwen3-0.6B" if value == "Qwen/Qwen3-0.6b" else value}, note)


def _optimizer(value: Any, _: Draft) -> Result:
    if value == "adamw":
        return Put({"training.optim": "adamw"}, "mlx's AdamW does not correct the means of the first steps, ours does")
    if value == "adam":
        return Put(
            {"training.optim": "adamw", "training.weight_decay": 0.0},
            "without decay it is Adam; mlx's corrects no means",
        )
    return Lacking("there are adamw, adamw_8bit and paged_adamw_8bit here, and adamw is taken: its results differ")


def _betas(value: Any, _: Draft) -> Result:
    return Put({"training.adam_beta1": float(value[0]), "training.adam_beta2": float(value[1])})


def _decaying(draft: Draft) -> bool:
    return draft.value("optimizer") == "adamw"


def _schedule(value: Any, _: Draft) -> Result:
    name = str(value)
    ours = {"cosine_decay": "cosine", "linear_schedule": "linear"}.get(name)
    if ours is None:
        return Put({"training.lr_scheduler_type": "cosine"}, f"{name} has no equal; cosine is the nearest here")
    return Put({"training.lr_scheduler_type": ours}, "from arguments' first value to zero at the run's end")


def _arguments(value: Any, _: Draft) -> Result:
    rest = f"; [{', '.join(map(str, value[1:]))}] (its length and end) have no equal" if len(value) > 1 else ""
    return Put({"training.learning_rate": float(value[0])}, f"the first is the peak{rest}")


def _masked(value: Any, _: Draft) -> Result:
    if value is True:
        return Put({"data.train_on": "last_answer"}, "all but the last message is masked there")
    return Put({"data.train_on": "all"}, "prompts are learned too")


def _sinks(value: Any, _: Draft) -> Result:
    known = [name for name in ("wandb",) if name in str(value)]
    return Put({"training.report_to": known}) if known else Needless("metrics.jsonl has them all")


def gather(draft: Draft) -> None:
    """`data`, and what mlx-lm does of itself."""
    _data(draft)
    draft.put("data.too_long", "truncate", "max_seq_length")
    for key, ours, value in (
        ("clip_grad_norm", "training.max_grad_norm", 0.0),
        ("lr_schedule", "training.lr_scheduler_type", "constant"),
        ("warmup", "training.warmup_ratio", 0.0),
        ("load_best", "training.load_best_model_at_end", False),
    ):
        if ours not in draft.values and not (key == "warmup" and "training.warmup_steps" in draft.values):
            draft.add_default(Given(key, value), ours)


def _data(draft: Draft) -> None:
    named = sorted({each.key.partition(".")[0] for each in draft.given if each.key.startswith("hf_dataset")})
    if named:
        for ours, split in (("data.train", "train_split"), ("data.eval", "valid_split")):
            sources = [source for at in named if (source := _hub(draft, at, split))]
            if sources and (ours == "data.train" or any(draft.has(f"{at}.{split}") for at in named)):
                put_sources(draft, ours, sources)
        if "data.eval" not in draft.values:
            draft.add_default(Given("valid_split", 0.0), "data.eval_fraction")
        return
    folder = str(draft.value("data", _WIKI))
    if not any(each.key == "data" for each in draft.given):
        draft.told.append(Told(Given("data", _WIKI), "mapped", "data.train"))
    if is_placeholder(folder) or any(each.key == "data" and each.code for each in draft.given):
        need_data(draft, "data", f"{folder} stands for a folder")
        return
    local = any((base / folder).is_dir() for base in (Path(), draft.folder))
    if local or folder.startswith((".", "/", "~")):
        for ours, name in (("data.train", "train"), ("data.eval", "valid")):
            if name == "train" or any((base / folder / "valid.jsonl").is_file() for base in (Path(), draft.folder)):
                put_sources(draft, ours, [Source(f"{folder.rstrip('/')}/{name}.jsonl", keys=("data",))])
    else:
        put_sources(draft, "data.train", [Source(folder, keys=("data",))])
        put_sources(draft, "data.eval", [Source(folder, "valid", keys=("data",))])
    if "data.eval" not in draft.values:
        draft.add_default(Given("valid.jsonl", 0.0), "data.eval_fraction")


def _hub(draft: Draft, at: str, part: str) -> Source | None:
    path = draft.value(f"{at}.path") or draft.value(f"{at}.name")
    if path is None:
        need_data(draft, at, "no path is given")
        return None
    split, rows = cut(draft, f"{at}.{part}", draft.value(f"{at}.{part}") or part.removesuffix("_split"))
    names = {"prompt": "prompt", "completion": "completion", "messages": "chat", "text": "text"}
    columns = {ours: draft.value(f"{at}.{theirs}_feature") for ours, theirs in names.items()}
    given = {ours: column for ours, column in columns.items() if column and column != ours}
    format = (
        "prompt_completion"
        if columns["prompt"]
        else "messages"
        if columns["messages"]
        else "text"
        if columns["text"]
        else None
    )
    keys = tuple(each.key for each in draft.given if each.key.startswith(f"{at}."))
    return Source(str(path), split, format, given, max_rows=rows, keys=keys)


_KEYS = (
    to("model", "model.model_name_or_path", _model, default="Qwen/Qwen3-0.6b"),
    to("trust_remote_code", "model.trust_remote_code", optional("model.trust_remote_code")),
    to("fine_tune_type", "adapter.method", _method, default="lora"),
    to("num_layers", "adapter.layers_to_transform", _layers, default=16),
    to("lora_parameters.rank", "adapter.r", default=8),
    to("lora_parameters.scale", "adapter.lora_alpha", _scale, default=20.0),
    to("lora_parameters.dropout", "adapter.lora_dropout", default=0.0),
    to("lora_parameters.keys", "adapter.target_modules", _keys),
    *lacking("lora_parameters.alpha", "mlx-lm refuses it, too: its scale is alpha / rank"),
    *lacking("lora_parameters.*", "it has no equal; see adapter's options"),
    to("batch_size", "training.batch_size", _batch, default=4),
    to("grad_accumulation_steps", "training.batch_size", _batch),
    to("iters", "training.max_steps", _iters, default=1000),
    to(
        "learning_rate",
        "training.learning_rate",
        default=1e-5,
        needed=lambda draft: not draft.has("lr_schedule.arguments"),
    ),
    to("lr_schedule.name", "training.lr_scheduler_type", _schedule),
    to("lr_schedule.arguments", "training.learning_rate", _arguments),
    to("lr_schedule.warmup", "training.warmup_steps"),
    *needless("lr_schedule.warmup_init", "the warm-up begins at 1 / (steps + 1) of the peak here"),
    to("optimizer", "training.optim", _optimizer, default="adam"),
    to("optimizer_config.adamw.weight_decay", "training.weight_decay", default=0.01, needed=_decaying),
    to("optimizer_config.adamw.betas", "training.adam_beta1", _betas),
    to("optimizer_config.adamw.eps", "training.adam_epsilon"),
    to("optimizer_config.adam.betas", "training.adam_beta1", _betas),
    to("optimizer_config.adam.eps", "training.adam_epsilon"),
    *lacking("optimizer_config.*", "the optimizers are AdamW's, with its bias correction"),
    to("max_seq_length", "data.max_length", default=2048),
    to("mask_prompt", "data.train_on", _masked, default=False),
    to("seed", "training.seed"),
    to("steps_per_eval", "training.eval_steps", _counted("training.eval_steps"), default=200),
    to("save_every", "training.save_steps", _counted("training.save_steps"), default=100),
    to("steps_per_report", "training.logging_steps", _counted("training.logging_steps"), default=10),
    to("adapter_path", "output_dir"),
    to("report_to", "training.report_to", _sinks),
    *needless("grad_checkpoint", RECOMPUTED),
    together("data", "data.train", "a folder of train.jsonl and valid.jsonl, or a Hub id"),
    *(
        together(f"{at}.{name}", "data.train")
        for at in ("hf_dataset", "hf_dataset[]")
        for name in (
            "path",
            "name",
            "train_split",
            "valid_split",
            "prompt_feature",
            "completion_feature",
            "chat_feature",
            "text_feature",
        )
    ),
    *needless(
        "hf_dataset.test_split hf_dataset[].test_split hf_dataset.config* hf_dataset[].config*",
        "`topwork eval` reads a test split (evaluation.data)",
    ),
    *lacking(
        "resume_adapter_file", "`topwork convert` makes PEFT's format of it; then name that folder in adapter.init_from"
    ),
    to(
        "training_mode",
        "",
        lambda value, _: (
            Needless("sft, as here")
            if value in ("normal", "sft")
            else Refused(f"{value}: Topwork has sft alone so far")
        ),
    ),
    *needless(
        "train test test_batches val_batches", "validation reads all that is held out; `topwork eval` reads a test set"
    ),
    *needless("clear_cache_threshold", KERNELS),
    *needless("project_name wandb", LOGGING),
    *needless("config", LOADING),
)

MLX_LM = Tool(
    "mlx-lm",
    _KEYS,
    frozenset(
        [
            "lora_parameters.rank",
            "lora_parameters.scale",
            "fine_tune_type",
            "iters",
            "num_layers",
            "adapter_path",
            "steps_per_eval",
            "mask_prompt",
            "grad_checkpoint",
            "save_every",
            "steps_per_report",
            "val_batches",
        ]
    ),
    gather,
    "mlx-lm 0.32.2",
)
