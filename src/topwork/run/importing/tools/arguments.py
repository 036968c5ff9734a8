"""transformers' TrainingArguments, which TRL, Unsloth and LLaMA-Factory share (transformers 5.23.0)."""

from typing import Any

from topwork.run.importing.convert import (
    DISTRIBUTED,
    HUB,
    KERNELS,
    LOADING,
    LOGGING,
    RECOMPUTED,
    batch,
    dtype,
    epochs,
    every,
    off_is,
    optimizer,
    ratio,
    schedule,
    sinks,
    steps,
    warmup,
)
from topwork.run.importing.draft import Draft
from topwork.run.importing.records import Key, Lacking, Needless, Put, Result, is_off, lacking, needless, to


def _half(name: str) -> Any:
    def convert(value: Any, draft: Draft) -> Result:
        if "model.dtype" in draft.values:
            return Needless("model.dtype is told elsewhere")
        return Put({"model.dtype": name}) if value is True else Needless("off; model.dtype says it")

    return convert


def _best(value: Any, _: Draft) -> Result:
    return Put({"training.load_best_model_at_end": bool(value)})


def _when_evaluating(value: Any, _: Draft) -> Result:
    if is_off(value):
        return Put({"data.eval_fraction": 0.0}, "nothing is held out, and nothing validated")
    if value == "epoch":
        return Lacking("validation counts steps here (training.eval_steps); left out, ten times a run")
    return Needless("eval_steps says how often")


def _no_smoothing(value: Any, _: Draft) -> Result:
    return Needless("off, as here") if is_off(value) else Lacking("labels are not smoothed here")


def training_arguments(
    rate: float, share: float | int = 0, size: int = 8, passes: int = 1, epochs_: float = 3.0, seed: int = 42
) -> tuple[Key, ...]:
    """A record for each; what the tool changes of transformers' defaults is given."""
    sizes = batch("per_device_train_batch_size", size, "gradient_accumulation_steps", passes)
    return (
        to("per_device_train_batch_size", "training.batch_size", sizes, default=size),
        to("gradient_accumulation_steps", "training.batch_size", sizes, default=passes),
        to(
            "num_train_epochs",
            "training.num_train_epochs",
            epochs,
            default=epochs_,
            needed=lambda draft: float(draft.value("max_steps") or 0) <= 0,
        ),
        to("max_steps", "training.max_steps", steps),
        to("learning_rate", "training.learning_rate", default=rate),
        to("lr_scheduler_type", "training.lr_scheduler_type", schedule, default="linear"),
        to(
            "warmup_steps",
            "training.warmup_steps",
            warmup,
            default=share,
            needed=lambda draft: not draft.has("warmup_ratio"),
        ),
        to("warmup_ratio", "training.warmup_ratio", ratio),
        to("seed", "training.seed", default=seed),
        *_SAME,
        *_REST,
    )


_SAME = (
    to("optim", "training.optim", optimizer),
    to("weight_decay", "training.weight_decay"),
    to("adam_beta1", "training.adam_beta1"),
    to("adam_beta2", "training.adam_beta2"),
    to("adam_epsilon", "training.adam_epsilon"),
    to("max_grad_norm", "training.max_grad_norm"),
    to("eval_steps", "training.eval_steps", every("training.eval_steps")),
    to("save_steps", "training.save_steps", every("training.save_steps")),
    to("save_total_limit", "training.save_total_limit"),
    to("logging_steps", "training.logging_steps", every("training.logging_steps")),
    to("load_best_model_at_end", "training.load_best_model_at_end", _best, default=False),
    to("report_to", "training.report_to", sinks),
    to("output_dir", "output_dir"),
    to("bf16", "model.dtype", _half("bfloat16")),
    to("fp16", "model.dtype", _half("float16")),
    to("label_smoothing_factor", "", _no_smoothing),
    *needless("gradient_checkpointing", RECOMPUTED),
    to(
        "lr_scheduler_kwargs",
        "",
        lambda value, _: Needless("none") if is_off(value) else Lacking("schedules end at zero here"),
    ),
)
EVALUATED = (
    to(
        "eval_strategy",
        "data.eval_fraction",
        _when_evaluating,
        default="no",
        needed=lambda draft: not draft.has("evaluation_strategy"),
    ),
    to("evaluation_strategy", "data.eval_fraction", _when_evaluating),
)
"""For tools that validate when asked."""

_REST = (
    *needless("gradient_checkpointing_kwargs* activation_checkpointing* activation_offloading", RECOMPUTED),
    *needless(
        "do_train do_eval do_predict prediction_loss_only eval_delay eval_on_start eval_do_concat_batches "
        "eval_accumulation_steps include_for_metrics batch_eval_metrics per_device_eval_batch_size "
        "eval_use_gather_object metric_for_best_model greater_is_better",
        "it validates by itself, by the loss",
    ),
    *needless(
        "save_strategy save_only_model save_safetensors save_on_each_node overwrite_output_dir "
        "restore_callback_states_from_checkpoint",
        "checkpoints are whole, and written by themselves",
    ),
    *needless("resume_from_checkpoint ignore_data_skip", "the command line's --resume"),
    *needless(
        "dataloader_* remove_unused_columns label_names data_seed group_by_length length_column_name "
        "train_sampling_strategy auto_find_batch_size",
        LOADING,
    ),
    *needless(
        "logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_* disable_tqdm run_name project "
        "trackio_* include_* skip_memory_metrics debug",
        LOGGING,
    ),
    *needless("push_to_hub* hub_*", HUB),
    *needless(
        "fsdp* deepspeed ddp_* local_rank accelerator_config* parallelism_config* average_tokens_across_devices "
        "use_cpu "
        "tp_size",
        DISTRIBUTED,
    ),
    *needless(
        "tf32 torch_compile* use_liger_kernel liger_kernel_config* torch_empty_cache_steps use_cache "
        "half_precision_backend "
        "jit_mode_eval full_determinism bf16_full_eval fp16_full_eval enable_jit_checkpoint",
        KERNELS,
    ),
    *lacking("neftune_noise_alpha", "no noise is put on embeddings; lora_dropout is the nearest"),
    *lacking("optim_args optim_target_modules", "the optimizers are AdamW's, over all that is trained"),
)


def model_dtype(name: str) -> Key:
    return to(name, "model.dtype", dtype)


def plain_template(name: str) -> Key:
    """A named chat template of the tool's own."""
    why = "the model's own chat template is used here; another one: a Jinja file, or chatml"

    def convert(value: Any, _: Draft) -> Result:
        return Put({"data.chat_template": "chatml"}) if value == "chatml" else Lacking(why)

    return Key(name, "no equal", "data.chat_template", why, convert)


ANY_LOSS = off_is(("nll", "chunked_nll", "default"), "the loss is the log-likelihood of the learned tokens")
