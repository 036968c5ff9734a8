"""torchtune's YAML. Keys, meanings and defaults as in the package torchtune 0.6.1 (`models/*/_model_builders.py`,
`datasets/`, `recipes/`), the optimizers' as in PyTorch 2.13 and bitsandbytes 0.50.2."""

import re
from pathlib import Path
from typing import Any

from topwork.run.importing.convert import (
    DISTRIBUTED,
    KERNELS,
    LOADING,
    LOGGING,
    RECOMPUTED,
    batch,
    dtype,
    epochs,
    every,
    number_of,
    optional,
    packed,
    whole,
)
from topwork.run.importing.draft import Draft
from topwork.run.importing.records import (
    Key,
    Lacking,
    Needless,
    Put,
    Refused,
    Result,
    Tool,
    is_off,
    lacking,
    needless,
    refused,
    to,
    together,
)
from topwork.run.importing.tools.torchtune_data import gather

_OTHER = "it trains by another objective; Topwork has sft alone so far"
_IMAGES = "images are not read here"
_MODULES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_HUB = [
    "google/gemma-2b",
    "google/gemma-7b",
    "google/gemma-2-2b",
    "google/gemma-2-9b",
    "google/gemma-2-27b",
    "meta-llama/CodeLlama-7b-hf",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-7b-chat-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-70B-Instruct",
    "meta-llama/Meta-Llama-3.1-405B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "meta-llama/Llama-3.2-90B-Vision-Instruct",
    "meta-llama/Llama-3.3-70B-Instruct",
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2",
    "microsoft/Phi-3-mini-4k-instruct",
    "microsoft/phi-4",
    "Qwen/Qwen2-0.5B-Instruct",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2-7B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen2.5-32B-Instruct",
    "Qwen/Qwen2.5-72B-Instruct",
]
HUB_IDS = {hub.rpartition("/")[2].lower(): hub for hub in _HUB} | {"phi-3": "microsoft/Phi-3-mini-4k-instruct"}
"""The folders into which its shipped configs say `tune download` puts these models."""


def builder(draft: Draft) -> str:
    """The model's builder, `lora_llama3_2_1b`."""
    return str(draft.value("model._component_", "")).rpartition(".")[2]


def has_lora(draft: Draft) -> bool:
    return builder(draft).startswith(("lora_", "qlora_"))


def _component(_: Any, draft: Draft) -> Result:
    name = builder(draft)
    if "classifier" in name or "flux" in name:
        return Refused("it trains no language model")
    four = {"quantization.load_in_4bit": True} if name.startswith("qlora_") else {}
    note = "images are not read here; the language model is trained on text" if "vision" in name else ""
    return Put({"adapter.method": "lora" if has_lora(draft) else "full", **four}, note)


def _folder(value: Any, _: Draft) -> Result:
    """The folder of the weights, or the Hub id that is downloaded there."""
    path = Path(str(value))
    named = path.parent if path.name == "original" else path
    if (named / "config.json").is_file():
        return Put({"model.model_name_or_path": str(named)})
    hub = HUB_IDS.get(named.name.lower())
    if hub is not None:
        return Put({"model.model_name_or_path": hub}, "what is downloaded into that folder")
    return Put({"model.model_name_or_path": str(named)}, "the folder has to be a Hugging Face one, with a config.json")


def _attention(value: Any, draft: Draft) -> Result:
    """Module names as Hugging Face's: output_proj is o_proj; and with the MLP's and the head's."""
    fused = builder(draft).removeprefix("q").removeprefix("lora_").startswith(("phi3", "phi4"))
    table = _FUSED if fused else _MODULES
    found = list(dict.fromkeys(table[name] for name in value))
    if draft.value("model.apply_lora_to_mlp") is True:
        found += ["gate_up_proj", "down_proj"] if fused else list(_MLP)
    if draft.value("model.apply_lora_to_output") is True:
        found.append("lm_head")
    note = "q, k and v are one layer in Hugging Face's model, and take one adapter" if fused else ""
    return Put({"adapter.target_modules": found}, note)


def _also(value: Any, _: Draft) -> Result:
    return Put({}, "") if value is True else Needless("off: attention alone")


def _optimizer(value: Any, _: Draft) -> Result:
    name = str(value).rpartition(".")[2].lower()
    if name in ("adamw", "adamw8bit", "pagedadamw", "pagedadamw8bit", "pagedadamw32bit"):
        ours = {"adamw8bit": "adamw_8bit", "pagedadamw8bit": "paged_adamw_8bit"}.get(name, "adamw")
        return Put({"training.optim": ours})
    return Lacking("there are adamw, adamw_8bit and paged_adamw_8bit here, and adamw is taken: its results differ")


def _schedule(value: Any, _: Draft) -> Result:
    name = str(value).rpartition(".")[2]
    if "cosine" in name:
        return Put({"training.lr_scheduler_type": "cosine"})
    return Put({"training.lr_scheduler_type": "constant"}, f"{name} has no equal")


def _betas(value: Any, _: Draft) -> Result:
    return Put({"training.adam_beta1": float(value[0]), "training.adam_beta2": float(value[1])})


def _an_epoch(value: Any, draft: Draft) -> Result:
    """`max_steps_per_epoch` bounds each epoch; here the run."""
    total = whole(value) * max(1, whole(draft.value("epochs", 1)))
    return Put({"training.max_steps": total}, "for all epochs; fewer there where an epoch is shorter")


def _clip(value: Any, _: Draft) -> Result:
    return Put({"training.max_grad_norm": 0.0 if is_off(value) else number_of(value)})


def _loss(value: Any, _: Draft) -> Result:
    name = str(value).rpartition(".")[2]
    if re.search("CrossEntropy|CEWith", name):
        return Needless("the log-likelihood of the learned tokens, as here")
    return Refused(_OTHER)


_MODEL = (
    to("model._component_", "adapter.method", _component),
    to("checkpointer.checkpoint_dir", "model.model_name_or_path", _folder),
    to("dtype", "model.dtype", dtype),
    to("model.lora_attn_modules", "adapter.target_modules", _attention),
    to("model.apply_lora_to_mlp", "adapter.target_modules", _also),
    to("model.apply_lora_to_output", "adapter.target_modules", _also),
    to("model.lora_rank", "adapter.r", default=8, needed=has_lora),
    to("model.lora_alpha", "adapter.lora_alpha", default=16, needed=has_lora),
    to("model.lora_dropout", "adapter.lora_dropout", default=0.0, needed=has_lora),
    to("model.use_dora", "adapter.use_dora", optional("adapter.use_dora")),
    to("model.quantize_base", "quantization.load_in_4bit", optional("quantization.load_in_4bit")),
    *lacking("model.encoder_trainable model.decoder_trainable model.fusion_trainable model.image_size", _IMAGES),
    *lacking("model.*", "the model's config is taken as it is; change it in a copy of its folder"),
    *lacking(
        "checkpointer.adapter_checkpoint",
        "it begins from an adapter: convert it to PEFT's format, and name it in adapter.init_from",
    ),
    *needless("checkpointer.*", LOADING),
)

_TRAINING = (
    to("batch_size", "training.batch_size", batch("batch_size", 1, "gradient_accumulation_steps", 1)),
    to("gradient_accumulation_steps", "training.batch_size", batch("batch_size", 1, "gradient_accumulation_steps", 1)),
    to("epochs", "training.num_train_epochs", epochs),
    to("max_steps_per_epoch", "training.max_steps", _an_epoch),
    to("optimizer._component_", "training.optim", _optimizer),
    to("optimizer.lr", "training.learning_rate", default=1e-3),
    to("optimizer.weight_decay", "training.weight_decay", default=0.01),
    to("optimizer.betas", "training.adam_beta1", _betas),
    to("optimizer.eps", "training.adam_epsilon"),
    *needless("optimizer.fused optimizer.foreach optimizer.amsgrad", KERNELS),
    *lacking("optimizer.*", "the optimizers are AdamW's"),
    to("lr_scheduler._component_", "training.lr_scheduler_type", _schedule, default="constant"),
    to("lr_scheduler.num_warmup_steps", "training.warmup_steps", default=0),
    *lacking("lr_scheduler.*", "a cosine ends at zero here, after one half of a wave"),
    to("clip_grad_norm", "training.max_grad_norm", _clip, default=0.0),
    to("loss._component_", "", _loss),
    *needless("loss.*", "the loss' own"),
    to("seed", "training.seed"),
    to("output_dir", "output_dir"),
    to("log_every_n_steps", "training.logging_steps", every("training.logging_steps")),
    *needless("enable_activation_checkpointing", RECOMPUTED),
    *needless("enable_activation_offloading ac_mode ac_option", RECOMPUTED),
    *needless(
        "optimizer_in_bwd compile low_cpu_ram custom_sharded_layers memory_efficient_fsdp_wrap device enable_kv_cache",
        KERNELS,
    ),
    *needless("fsdp* tensor_parallel_* data_parallel_* context_parallel_*", DISTRIBUTED),
    *needless("metric_logger* log_peak_memory_stats log_level profiler*", LOGGING),
    *needless(
        "resume_from_checkpoint save_adapter_weights_only epochs_per_checkpoint",
        "a run is gone on with --resume; adapters are what is saved",
    ),
)

_TOKENS = (
    to("tokenizer.max_seq_len", "data.max_length"),
    *lacking(
        "tokenizer.prompt_template", "the model's own chat template is used here; another one: data.chat_template"
    ),
    *needless("tokenizer.*", "the model's folder has it"),
)

_DATASET = (
    "_component_ source data_files split subset column column_map conversation_column conversation_style "
    "train_on_input "
    "new_system_prompt name data_dir"
)


def _each(prefix: str) -> list[Key]:
    return [
        *(together(f"{prefix}.{name}", "data.train") for name in _DATASET.split()),
        *needless(
            f"{prefix}.add_eos {prefix}.trust_remote_code {prefix}.filter_fn {prefix}.split_across_pack", LOADING
        ),
        *lacking(f"{prefix}.*", "it has no equal; see data's options"),
    ]


_DATA = (
    to("dataset.packed", "", packed("max_seq_len")),
    to("dataset[].packed", "", packed("max_seq_len")),
    *_each("dataset[]"),
    *_each("dataset"),
    *needless("shuffle collate_fn dataloader*", LOADING),
    *lacking("dataset_val._component_", "its own data set for validation: name it in data.eval"),
    *lacking("dataset_val* datasets*", "other data sets: name them in data.train and data.eval"),
)

_REST = (
    *refused(
        "teacher_model._component_ ref_checkpointer._component_ reward_and_value_model._component_ "
        "policy_model._component_",
        _OTHER,
    ),
    *needless(
        "teacher_* kd_* ref_* ref_policy_* reward_* value_* policy_* ppo_* whiten_rewards min_response_length "
        "penalise_no_eos gamma lmbda "
        "kl_coeff stop_token_ids forward_batch_size max_generated_tokens num_steps",
        "the objective's own, which is told at the loss",
    ),
    *lacking(
        "quantizer._component_", "a quantized base is NF4, FP4 or int8 here; quantize-aware training has no equal"
    ),
    *needless("quantizer.*", "the quantizer's own"),
    *refused(
        "tasks prompt prompt.user prompt.system max_new_tokens",
        "it evaluates or generates, and trains nothing: `topwork eval`, `topwork chat`",
    ),
    *needless("prompt.* limit temperature top_k max_seq_length", "for evaluation and generation"),
)

TORCHTUNE = Tool(
    "torchtune",
    (*_MODEL, *_TRAINING, *_TOKENS, *_DATA, *_REST),
    frozenset(
        [
            "model._component_",
            "checkpointer._component_",
            "tokenizer._component_",
            "dataset._component_",
            "optimizer._component_",
            "loss._component_",
            "dataset[]._component_",
            "checkpointer.checkpoint_dir",
            "max_steps_per_epoch",
        ]
    ),
    gather,
    "torchtune 0.6.1",
)
