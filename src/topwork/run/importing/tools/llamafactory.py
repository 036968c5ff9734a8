"""LLaMA-Factory's YAML and JSON, and its dataset_info.json. Keys, meanings and defaults as in the package llamafactory
0.9.5 (`hparams/`, `data/parser.py`, `model/model_utils/quantization.py`); the keys of its `v1` stand beside."""

from dataclasses import replace
from typing import Any

from topwork.run.importing.convert import (
    DISTRIBUTED,
    KERNELS,
    LOADING,
    LOGGING,
    RECOMPUTED,
    dtype,
    fraction,
    listed_targets,
    names,
    optional,
    packed,
    revision,
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
from topwork.run.importing.tools.arguments import training_arguments
from topwork.run.importing.tools.llamafactory_data import gather

_STAGES = {
    "dpo": "preferences",
    "kto": "preferences",
    "rm": "a reward model",
    "ppo": "reinforcement learning",
}
_IMAGES = "images, videos and audio are not read here; text is"


def _stage(value: Any, _: Draft) -> Result:
    if value in ("sft", "pt"):
        return Needless("sft is the objective here; plain text is learned whole")
    return Refused(f"it trains {_STAGES.get(str(value), 'by another objective')}; Topwork has sft alone so far")


def _type(value: Any, _: Draft) -> Result:
    if value in ("lora", "full"):
        return Put({"adapter.method": value})
    if value == "freeze":
        return Refused("it trains a few whole layers, which has no equal: take lora with layers_to_transform, or full")
    return Refused(
        f"{value} has no equal: the methods here are lora, dora, ia3, vera, loha, lokr, oft, prefix, prompt, bitfit "
        "and full"
    )


def _rank(value: Any, draft: Draft) -> Result:
    double = {} if draft.has("lora_alpha") else {"adapter.lora_alpha": 2 * whole(value)}
    return Put(
        {"adapter.r": whole(value), **double}, "" if draft.has("lora_alpha") else "lora_alpha is twice that there"
    )


def _bits(value: Any, _: Draft) -> Result:
    if whole(value) in (4, 8):
        return Put({f"quantization.load_in_{whole(value)}bit": True})
    return Lacking("bases are held in 4 or 8 bits here (quantization.load_in_4bit, load_in_8bit)")


def _method(value: Any, _: Draft) -> Result:
    name = str(value).lower()
    if name in ("bnb", "bitsandbytes"):
        return Needless("bitsandbytes' formats, as here")
    return Lacking(f"{name}: a base is held in NF4, FP4 or int8 here; name the unquantized model")


def _validated(value: Any, _: Draft) -> Result:
    return Put({"data.eval_fraction": 0.0}) if is_off(value) else fraction(value, _)


def _on_prompt(value: Any, _: Draft) -> Result:
    return Put({"data.train_on": "all"}) if value is True else Needless("answers alone, as here")


def _last(value: Any, _: Draft) -> Result:
    return Put({"data.train_on": "last_answer"}) if value is True else Needless("every answer, as here")


def _thinking(value: Any, _: Draft) -> Result:
    if value is True:
        return Needless("the template's own way with thinking, as here")
    return Put({"data.chat_template_kwargs": {"enable_thinking": False}}, "where the template reads it")


def _template(value: Any, _: Draft) -> Result:
    if value == "chatml":
        return Put({"data.chat_template": "chatml"})
    return Lacking(f"the model's own chat template is used here, which {value} mostly is; else give a Jinja file")


def _tokens(value: Any, _: Draft) -> Result:
    """A text with commas between the tokens."""
    if not isinstance(value, str):
        return Lacking("expected tokens in one text, with commas between them")
    return Put({"model.new_tokens": list(dict.fromkeys(token.strip() for token in value.split(",") if token.strip()))})


def _pissa(value: Any, _: Draft) -> Result:
    return Put({"adapter.init_lora_weights": "pissa"}) if value is True else Needless("off, as here")


def _predicting(value: Any, draft: Draft) -> Result:
    if value is True and draft.value("do_train") is not True:
        return Refused("it answers, and trains nothing: `topwork eval`")
    return Needless("`topwork eval` writes answers and scores them")


def _global(value: Any, _: Draft) -> Result:
    return Put({"training.batch_size": whole(value)}, "over all devices, as here")


def _micro(value: Any, draft: Draft) -> Result:
    if draft.has("global_batch_size"):
        return Needless("global_batch_size is the step's whole batch")
    return Put({"training.batch_size": whole(value) * draft.devices})


def _bnb(value: Any, _: Draft) -> Result:
    return _method("bnb" if value == "auto" else value, _)


def _old(draft: Draft) -> bool:
    """Whether the file is not for its second trainer (`v1`), whose keys are others."""
    return not draft.has("model") and not draft.has("train_dataset")


_MODEL = (
    to("model_name_or_path", "model.model_name_or_path"),
    to("model", "model.model_name_or_path"),
    to("model_revision", "model.revision", revision),
    to("trust_remote_code", "model.trust_remote_code", optional("model.trust_remote_code")),
    *needless("infer_dtype", "for its inference"),
    to("compute_dtype", "model.dtype", dtype),
    to(
        "pure_bf16",
        "model.dtype",
        lambda value, _: Put({"model.dtype": "bfloat16"}) if value else Needless("off, as here"),
    ),
    to("quantization_bit", "quantization.load_in_4bit", _bits),
    to("quantization_method", "", _method),
    to("quantization_type", "quantization.bnb_4bit_quant_type"),
    to("double_quantization", "quantization.bnb_4bit_use_double_quant"),
    to("quant_config.name", "", _bnb),
    to("quant_config.quantization_bit", "quantization.load_in_4bit", _bits),
    *needless("quant_config.* quantization_device_map", "how weights are loaded"),
    to("adapter_name_or_path", "adapter.init_from", how="training goes on from these weights"),
    *needless(
        "create_new_adapter adapter_folder cache_dir use_fast_tokenizer low_cpu_mem_usage hf_hub_token ms_hub_token "
        "om_hub_token "
        "print_param_status offload_folder use_kv_cache model_max_length device_map block_diag_attn model_class "
        "init_config*",
        LOADING,
    ),
    to("add_tokens", "model.new_tokens", _tokens),
    *needless("resize_vocab", "embedding and head grow where tokens are new"),
    *lacking(
        "add_special_tokens new_special_tokens_config init_special_tokens",
        "tokens are added as ordinary ones (model.new_tokens); special ones in a copy of the model's folder",
    ),
    *lacking(
        "rope_scaling shift_attn mixture_of_depths train_from_scratch moe_aux_loss_coef fp8*",
        "the model's config is taken as it is, and its weights",
    ),
    to("split_special_tokens", "data.split_special_tokens", optional("data.split_special_tokens")),
    *lacking("image_* video_* media_dir use_audio_in_video audio_sampling_rate crop_to_patches", _IMAGES),
    *needless(
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
        "what target_modules does not name stays as it is",
    ),
)

_ADAPTER = (
    to("stage", "training.objective", _stage),
    to("finetuning_type", "adapter.method", _type, default="lora", needed=_old),
    to("peft_config.name", "adapter.method", _type),
    to("peft_config.r", "adapter.r"),
    to("peft_config.lora_alpha", "adapter.lora_alpha"),
    to("peft_config.lora_dropout", "adapter.lora_dropout"),
    to("peft_config.target_modules", "adapter.target_modules", listed_targets),
    to("peft_config.adapter_name_or_path", "adapter.init_from"),
    *lacking("peft_config.*", "it has no equal; see adapter's options"),
    to("lora_rank", "adapter.r", _rank, default=8, needed=_old),
    to("lora_alpha", "adapter.lora_alpha"),
    to("lora_dropout", "adapter.lora_dropout"),
    to("lora_target", "adapter.target_modules", listed_targets, default="all", needed=_old),
    to("additional_target", "adapter.modules_to_save", names("adapter.modules_to_save")),
    to("use_rslora", "adapter.use_rslora", optional("adapter.use_rslora")),
    to("use_dora", "adapter.use_dora", optional("adapter.use_dora")),
    to("pissa_init", "adapter.init_lora_weights", _pissa),
    *needless(
        "pissa_iter pissa_convert", "PiSSA begins by an exact decomposition; `topwork export` writes it as plain LoRA"
    ),
    to("loraplus_lr_ratio", "training.loraplus_lr_ratio"),
    *lacking("loraplus_lr_embedding", "one learning rate is for all; LoRA+'s ratio is for B"),
    *lacking(
        "use_llama_pro use_galore galore_* use_apollo apollo_* use_badam badam_* use_adam_mini use_muon",
        "the optimizers are AdamW's, over all that is trained",
    ),
    *lacking(
        "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha",
        "the loss is the log-likelihood of the learned tokens",
    ),
    *needless(
        "freeze_trainable_* freeze_extra_modules oft_* module_dropout pref_* dpo_* kto_* simpo_gamma ppo_* "
        "ref_model* reward_model* ld_alpha",
        "another method's or objective's own",
    ),
)

_DATA = (
    together("dataset", "data.train"),
    together("eval_dataset", "data.eval"),
    together("dataset_dir", "data.train", "its dataset_info.json tells the files and columns"),
    together("train_dataset", "data.train"),
    to("cutoff_len", "data.max_length", default=2048),
    together("max_samples", "data.train", "the first rows of each data set"),
    to("val_size", "data.eval_fraction", _validated, default=0.0, needed=lambda draft: not draft.has("eval_dataset")),
    to("train_on_prompt", "data.train_on", _on_prompt),
    to("mask_history", "data.train_on", _last),
    to("default_system", "data.system"),
    to("enable_thinking", "data.chat_template_kwargs", _thinking),
    to("template", "", _template),
    to("streaming", "data.streaming", optional("data.streaming")),
    to("packing", "", packed("cutoff_len")),
    to("neat_packing", "", packed("cutoff_len")),
    together("mix_strategy", "data.train"),
    together("interleave_probs", "data.train"),
    *needless(
        "preprocessing_* overwrite_cache buffer_size ignore_pad_token_for_loss tokenized_path data_shared_file_system "
        "eval_on_each_dataset eval_num_beams batching_*",
        LOADING,
    ),
    *lacking("tool_format preserve_thinking", "the model's own chat template decides it"),
)

_REST = (
    to("global_batch_size", "training.batch_size", _global),
    to("micro_batch_size", "training.batch_size", _micro),
    to("early_stopping_steps", "training.early_stopping_patience", how="both count validations"),
    *needless("disable_gradient_checkpointing", RECOMPUTED),
    *needless("enable_activation_checkpointing use_reentrant_gc use_unsloth_gc", RECOMPUTED),
    *needless(
        "flash_attn use_unsloth enable_liger_kernel upcast_* use_v1_kernels kernel_config* disable_shuffling", KERNELS
    ),
    *needless("eval_strategy evaluation_strategy", "val_size and eval_dataset say whether it validates"),
    *needless(
        "plot_loss include_effective_tokens_per_second compute_accuracy use_swanlab swanlab_* enable_torch_profiler "
        "profile*",
        LOGGING,
    ),
    *needless(
        "dist_config* ray_* use_ray master_* use_mca use_hyper_parallel hyper_parallel_args use_kt kt_* chunk_size "
        "cpu_infer tensor_model_parallel_size "
        "pipeline_model_parallel_size expert_model_parallel_size sequence_parallel overlap_* "
        "use_distributed_optimizer bias_activation_fusion "
        "apply_rope_fusion moe_* recompute_granularity",
        DISTRIBUTED,
    ),
    *needless(
        "predict_with_generate max_new_tokens do_sample temperature top_p top_k num_beams repetition_penalty "
        "length_penalty "
        "skip_special_tokens sample_backend max_length task task_dir lang n_shot save_dir download_mode save_epochs "
        "save_ckpt_as_hf",
        "`topwork eval` writes answers and scores them, with every run",
    ),
    *refused("export_dir", "it merges and exports, and trains nothing: `topwork merge`, `topwork export`"),
    to("do_predict", "", _predicting),
    *refused("infer_backend", "it answers, and trains nothing: `topwork chat`, `topwork serve`"),
    *needless("export_* vllm_* sglang_*", "for export and inference: `topwork export`, `topwork serve`"),
    *lacking("optim_config* lr_scheduler_config*", "see training.optim and training.lr_scheduler_type"),
)

_OWN = {key.theirs for key in (*_MODEL, *_ADAPTER, *_DATA, *_REST)}


def _shared() -> tuple[Key, ...]:
    """transformers' arguments; its second trainer has defaults of its own, which its files mostly give."""

    def narrowed(key: Key) -> Key:
        inner = key.needed
        return replace(key, needed=lambda draft: _old(draft) and (inner is None or inner(draft)))

    return tuple(
        narrowed(key) if key.has_default else key for key in training_arguments(5e-5) if key.theirs not in _OWN
    )


LLAMAFACTORY = Tool(
    "llamafactory",
    (*_MODEL, *_ADAPTER, *_DATA, *_REST, *_shared()),
    frozenset(
        [
            "stage",
            "finetuning_type",
            "template",
            "cutoff_len",
            "lora_rank",
            "lora_target",
            "dataset",
            "dataset_dir",
            "model_class",
            "train_dataset",
            "peft_config.name",
            "quantization_bit",
            "preprocessing_num_workers",
            "plot_loss",
        ]
    ),
    gather,
    "llamafactory 0.9.5",
)
