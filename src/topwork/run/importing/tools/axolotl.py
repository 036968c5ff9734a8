"""Axolotl's YAML. Keys, meanings and defaults as in the package axolotl 0.19.0 (`utils/schemas/`, `loaders/`,
`prompt_strategies/`, `core/builders/`)."""

from collections.abc import Sequence
from typing import Any

from topwork.run.importing.convert import (
    DISTRIBUTED,
    HUB,
    KERNELS,
    LOGGING,
    PRECISION,
    RECOMPUTED,
    batch,
    epochs,
    every,
    fraction,
    names,
    optimizer,
    optional,
    ratio,
    schedule,
    sink,
    starting,
    steps,
    targets,
    warmup,
    whole,
)
from topwork.run.importing.draft import Draft
from topwork.run.importing.records import (
    Key,
    Lacking,
    Needless,
    Put,
    Result,
    Tool,
    is_off,
    lacking,
    needless,
    refused,
    to,
)
from topwork.run.importing.tools.axolotl_data import DATA, gather

_OURS = ("liger", "cut_cross_entropy", "kernels.")
_OTHER_OBJECTIVE = "it trains by another objective; Topwork has sft alone so far"
_IMAGES = "images and audio are not read here; text is"
_NO_EPOCH = "how often an epoch; steps are counted here (eval_steps, save_steps): left out, ten times a run"


def _adapter(value: Any, _: Draft) -> Result:
    if value in ("lora", "qlora"):
        four = {"quantization.load_in_4bit": True} if value == "qlora" else {}
        return Put({"adapter.method": "lora", **four})
    if value == "none":
        return Put({"adapter.method": "full"}, "without an adapter it trains all weights")
    return Lacking(
        "the methods here are lora, dora, ia3, vera, loha, lokr, oft, prefix, prompt, bitfit and full; lora is taken"
    )


def _linear(value: Any, _: Draft) -> Result:
    if value is not True:
        return Needless("off, as here")
    return Put({"adapter.target_modules": "all-linear"})


def _modules(value: Any, draft: Draft) -> Result:
    if draft.value("lora_target_linear") is True:
        return Needless("lora_target_linear takes every linear layer, these among them")
    return targets(value, draft)


def _half(value: Any, draft: Draft) -> Result:
    """bf16: without it and without fp16 the base is in float32."""
    if value in ("auto", "full", True, "true"):
        return Put({"model.dtype": "bfloat16"})
    if any(draft.value(key) is True for key in ("fp16", "float16", "bfloat16")):
        return Needless("another type is given")
    return Put({"model.dtype": "float32"}, "neither bf16 nor fp16: weights are in float32")


def _type(name: str) -> Any:
    return lambda value, _: Put({"model.dtype": name}) if value is True else Needless("off, as here")


def _batch_size(value: Any, draft: Draft) -> Result:
    return Put({"training.batch_size": whole(value) * draft.devices}, "it goes before gradient_accumulation_steps")


def _sizes(value: Any, draft: Draft) -> Result:
    if draft.has("batch_size"):
        return Needless("batch_size is the step's whole batch")
    return batch("micro_batch_size", 1, "gradient_accumulation_steps", 1)(value, draft)


def _plugins(value: Any, _: Draft) -> Result:
    rest = [
        str(name) for name in (value if isinstance(value, list) else [value]) if not any(o in str(name) for o in _OURS)
    ]
    if not rest:
        return Needless(KERNELS)
    return Lacking(f"{', '.join(name.rpartition('.')[2] for name in rest)}: plugins have no place here")


def _tokens(value: Any, _: Draft) -> Result:
    if not isinstance(value, list) or not all(isinstance(token, str) for token in value):
        return Lacking("expected a list of texts")
    return Put({"model.new_tokens": list(dict.fromkeys(value))})


def _by_32(value: Any, _: Draft) -> Result:
    return Put({"model.pad_to_multiple_of": 32}) if value is True else Needless("off, as here")


def _loftq(value: Any, _: Draft) -> Result:
    if whole(value) != 4:
        return Lacking("loftq is of the base's own 4-bit type here")
    return Put({"adapter.init_lora_weights": "loftq", "quantization.load_in_4bit": True})


_MODEL: Sequence[Key] = (
    to("base_model", "model.model_name_or_path"),
    to("revision_of_model", "model.revision"),
    to("trust_remote_code", "model.trust_remote_code", optional("model.trust_remote_code")),
    to("bf16", "model.dtype", _half),
    to("fp16", "model.dtype", _type("float16")),
    to("float16", "model.dtype", _type("float16")),
    to("bfloat16", "model.dtype", _type("bfloat16")),
    to("torch_dtype", "model.dtype"),
    to("load_in_4bit", "quantization.load_in_4bit", optional("quantization.load_in_4bit")),
    to("load_in_8bit", "quantization.load_in_8bit", optional("quantization.load_in_8bit")),
    to("bnb_config_kwargs.bnb_4bit_quant_type", "quantization.bnb_4bit_quant_type"),
    to("bnb_config_kwargs.bnb_4bit_use_double_quant", "quantization.bnb_4bit_use_double_quant"),
    to("bnb_config_kwargs.llm_int8_skip_modules", "quantization.llm_int8_skip_modules"),
    *needless("bnb_config_kwargs.*", PRECISION),
    *lacking("processor_type", _IMAGES),
    *lacking("image_size image_resize_algorithm freeze_mm_modules processor_kwargs", _IMAGES),
    *needless(
        "base_model_config tokenizer_config tokenizer_use_fast tokenizer_legacy tokenizer_type model_type "
        "type_of_model tokenizer_use_mistral_common base_model_ignore_patterns "
        "is_llama_derived_model is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model "
        "hf_use_auth_token tokenizer_save_jinja_files low_cpu_mem_usage experimental_skip_move_to_device",
        "the model's folder says it, and its tokenizer is taken as it is",
    ),
    *needless("special_tokens.pad_token", "nothing is padded here"),
    *lacking(
        "special_tokens* bos_token eos_token unk_token additional_special_tokens added_tokens_overrides",
        "the tokenizer's own special tokens are kept here; change them in a copy of the model's folder",
    ),
    *needless("pad_token", "nothing is padded here"),
    to("tokens", "model.new_tokens", _tokens),
    to("resize_token_embeddings_to_32x", "model.pad_to_multiple_of", _by_32),
    *needless("mean_resizing_embeddings", "new rows begin as the mean of the others"),
    *lacking(
        "shrink_embeddings fix_untrained_tokens",
        "rows are added here and none taken away or set anew; do it in a copy of the model's folder, and name that",
    ),
    *lacking(
        "overrides_of_model_config* overrides_of_model_kwargs* model_config* cls_model_config rope_scaling* "
        "reinit_weights",
        "the model's config is taken as it is; change it in a copy of its folder",
    ),
    *lacking(
        "gptq* model_quantization_config* use_onebitllms quantize_moe_experts nvfp4_merge_aware* gptq fp8* qat* "
        "quantization llmcompressor* moe_bnb_fast moe_dequant_chunk_size",
        "bases are held in NF4, FP4 or int8 here (quantization.load_in_4bit, load_in_8bit)",
    ),
)

_ADAPTER: Sequence[Key] = (
    to("adapter", "adapter.method", _adapter, default="none"),
    to("lora_r", "adapter.r"),
    to("lora_alpha", "adapter.lora_alpha"),
    to("lora_dropout", "adapter.lora_dropout", default=0.0),
    to("lora_target_linear", "adapter.target_modules", _linear),
    to("lora_target_modules", "adapter.target_modules", _modules),
    to("lora_modules_to_save", "adapter.modules_to_save", names("adapter.modules_to_save")),
    to("lora_rank_pattern", "adapter.rank_pattern"),
    to("lora_alpha_pattern", "adapter.alpha_pattern"),
    to("lora_exclude_modules", "adapter.exclude_modules"),
    to("lora_model_dir", "adapter.init_from", how="training goes on from these weights"),
    to("peft_layers_to_transform", "adapter.layers_to_transform"),
    to("peft_layers_pattern", "adapter.layers_pattern"),
    to("peft_use_dora", "adapter.use_dora", optional("adapter.use_dora")),
    to("peft_use_rslora", "adapter.use_rslora", optional("adapter.use_rslora")),
    to("peft_init_lora_weights", "adapter.init_lora_weights", starting),
    to("peft_trainable_token_indices", "adapter.trainable_token_indices"),
    to("peft.loftq_config.loftq_bits", "adapter.init_lora_weights", _loftq),
    to("loraplus_lr_ratio", "training.loraplus_lr_ratio"),
    *lacking(
        "loraplus_lr_embedding embedding_lr embedding_lr_scale lr_groups",
        "one learning rate is for all; LoRA+'s ratio is for B",
    ),
    to("lora_target_parameters", "adapter.target_parameters", names("adapter.target_parameters")),
    *lacking(
        "relora* jagged_restart* lisa_* unfrozen_parameters peft_layer_replication use_mora mora* spectrum_*",
        "it trains or restarts parts of the weights in turn, which has no equal",
    ),
    *needless("lora_fan_in_fan_out peft_ensure_weight_tying", "found by itself"),
    *needless("peft_autocast_adapter_dtype", PRECISION),
    *needless(
        "lora_on_cpu qlora_sharded_model_loading merge_lora merge_method",
        "how weights are loaded or merged (`topwork merge`)",
    ),
)

_TRAINING: Sequence[Key] = (
    to("micro_batch_size", "training.batch_size", _sizes, default=1),
    to("gradient_accumulation_steps", "training.batch_size", _sizes),
    to("batch_size", "training.batch_size", _batch_size),
    to("num_epochs", "training.num_train_epochs", epochs, default=1.0, needed=lambda draft: not draft.has("max_steps")),
    to("max_steps", "training.max_steps", steps),
    to("learning_rate", "training.learning_rate"),
    to("lr_scheduler", "training.lr_scheduler_type", schedule, default="cosine"),
    to("warmup_steps", "training.warmup_steps", warmup),
    to("warmup_ratio", "training.warmup_ratio", ratio),
    to("optimizer", "training.optim", optimizer),
    to("weight_decay", "training.weight_decay", default=0.0),
    to("adam_beta1", "training.adam_beta1"),
    to("adam_beta2", "training.adam_beta2"),
    to("adam_epsilon", "training.adam_epsilon"),
    to("max_grad_norm", "training.max_grad_norm"),
    to("seed", "training.seed", default=42),
    to("eval_steps", "training.eval_steps", every("training.eval_steps")),
    to("save_steps", "training.save_steps", every("training.save_steps")),
    to("save_total_limit", "training.save_total_limit"),
    to("logging_steps", "training.logging_steps", every("training.logging_steps")),
    to("early_stopping_patience", "training.early_stopping_patience"),
    to("load_best_model_at_end", "training.load_best_model_at_end", default=False),
    *needless("gradient_checkpointing", RECOMPUTED),
    to(
        "val_set_size",
        "data.eval_fraction",
        fraction,
        default=0.0,
        needed=lambda draft: "data.eval" not in draft.values,
    ),
    to("output_dir", "output_dir"),
    to("use_tensorboard", "training.report_to", sink("tensorboard")),
    to("use_wandb", "training.report_to", sink("wandb")),
    to("evals_per_epoch", "", lambda value, _: Needless("no validation") if is_off(value) else Lacking(_NO_EPOCH)),
    to("saves_per_epoch", "", lambda value, _: Needless("as here") if is_off(value) else Lacking(_NO_EPOCH)),
    *needless(
        "gradient_checkpointing_kwargs* selective_checkpointing* activation_offloading layer_offloading* tiled_mlp*",
        RECOMPUTED,
    ),
    *needless(
        "eval_strategy evaluation_strategy save_strategy save_only_model save_first_step save_safetensors "
        "metric_for_best_model greater_is_better dynamic_checkpoint*",
        "it validates and saves by itself, whole checkpoints, and knows the best by its loss",
    ),
    *needless("resume_from_checkpoint auto_resume_from_checkpoints", "the command line's --resume"),
    *needless(
        "eval_batch_size auto_find_batch_size group_by_length length_column_name",
        "what fits into memory is found by itself, and nothing is padded",
    ),
    *lacking(
        "optim_args* optim_target_modules adam_epsilon2 adam_beta3 dion_* qgalore_* lr_quadratic_warmup "
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_scheduler_kwargs eta_min torchdistx_path",
        "the optimizers are AdamW's, and schedules end at zero",
    ),
    *lacking("neftune_noise_alpha noisy_embedding_alpha", "no noise is put on embeddings; lora_dropout is the nearest"),
    *needless(
        "loss_watchdog_threshold loss_watchdog_patience",
        "a loss that is no number ends a run by itself; early_stopping_patience watches the validation's",
    ),
    *lacking("use_eaft eaft_* kd_* use_dft*", "the loss is the log-likelihood of the learned tokens"),
    *needless(
        "do_causal_lm_eval eval_causal_lm_metrics eval_max_new_tokens eval_table_size do_bench_eval bench_* "
        "generate_samples num_generation_samples generation_* lm_eval_* eval_sample_packing eval_sequence_len",
        "`topwork eval` writes answers and scores them, with every run",
    ),
)

_REST: Sequence[Key] = (
    *refused("rl reward_model process_reward_model ebft diffusion", _OTHER_OBJECTIVE),
    *refused("num_labels", "it trains a classifier's head; Topwork trains language models"),
    *needless(
        "trl* vllm* orpo_alpha simpo_gamma cpo_alpha kto_* rl_beta dpo_* rpo_alpha precompute_ref_log_probs "
        "center_rewards_coefficient",
        "the objective's own, which is told at rl",
    ),
    to("plugins", "", _plugins),
    *needless(
        "flash_* attn_implementation sdp_attention xformers_attention flex_* sage_attention eager_attention "
        "s2_attention liger_* "
        "cut_cross_entropy chunked_cross_entropy* lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "torch_compile* tf32 use_kernels use_scattermoe use_sonicmoe experts_implementation unsloth_* "
        "fused_attn_kernel "
        "gemma4_* large_head_attention sdpa_varlen ple_cpu_offload scaling_softmax* llama4_linearized_experts "
        "use_glm_dsa_kernels "
        "use_dsv4_kernels dsv4_* dense_mixer fp32_norms fp32_norm_classes float32 embeddings_skip_upcast gc_steps "
        "gc_collect_steps "
        "torch_empty_cache_steps",
        KERNELS,
    ),
    *needless(
        "deepspeed deepcompile fsdp* ddp* dp_* sequence_parallel_degree context_parallel_size heads_k_stride "
        "ring_attn_func "
        "tensor_parallel_size expert_* world_size local_rank device device_map max_memory gpu_memory_limit use_ray "
        "ray_* "
        "resources_per_worker accelerator_config*",
        DISTRIBUTED,
    ),
    *needless(
        "wandb_* use_mlflow mlflow_* hf_mlflow_log_artifacts use_comet comet_* swanlab_* use_swanlab use_trackio "
        "trackio_* use_otel_metrics "
        "otel_* profiler_* include_tokens_per_second include_tkps debug gradio_*",
        LOGGING,
    ),
    *needless("hub_*", HUB),
    *needless("strict axolotl_config_path capabilities env_capabilities", "the file's own"),
    *lacking("trainer_cls", "a trainer of one's own: `docs/training-loop.md`"),
)

AXOLOTL = Tool(
    "axolotl",
    (*_MODEL, *_ADAPTER, *_TRAINING, *DATA, *_REST),
    frozenset(
        [
            "base_model",
            "sequence_len",
            "micro_batch_size",
            "num_epochs",
            "val_set_size",
            "lora_target_linear",
            "sample_packing",
            "pretraining_dataset",
            "datasets[].type",
            "lora_model_dir",
            "dataset_prepared_path",
            "evals_per_epoch",
        ]
    ),
    gather,
    "axolotl 0.19.0",
)
