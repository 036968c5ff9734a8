"""TRL: YAML of `trl sft --config`, command lines, and scripts with SFTConfig and LoraConfig. Keys, meanings and
defaults as in the packages trl 1.16.0 (`scripts/sft.py`, `trainer/sft_config.py`, `trainer/model_config.py`) and peft
0.21.2."""

from typing import Any

from topwork.run.importing.convert import (
    DISTRIBUTED,
    KERNELS,
    LOADING,
    PEFT_OF,
    PRECISION,
    biases,
    names,
    optional,
    packed,
    revision,
    starting,
    targets,
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
    together,
)
from topwork.run.importing.tools.arguments import ANY_LOSS, EVALUATED, model_dtype, plain_template, training_arguments
from topwork.run.importing.tools.trl_data import gather

_NONE_ADDED = "no tokens are added or renamed here; the model's own end its turns"


def _adapter(value: Any, _: Draft) -> Result:
    return Put({"adapter.method": "lora" if value is True else "full"})


def _with_lora(draft: Draft) -> bool:
    return draft.value("use_peft") is True


def _with_config(draft: Draft) -> bool:
    return any(each.key.startswith("LoraConfig.") for each in draft.given)


def _scripted(draft: Draft) -> bool:
    return any("." in each.key for each in draft.given)


def _quantized(prefix: str) -> Any:
    def needed(draft: Draft) -> bool:
        return draft.value(f"{prefix}load_in_4bit") is True

    return needed


def _answers(value: Any, _: Draft) -> Result:
    return Put({"data.train_on": "answers"}) if value is True else Needless("what is learned is told at the data")


def _template(value: Any, _: Draft) -> Result:
    if str(value).endswith((".jinja", ".j2")):
        return Put({"data.chat_template": str(value)})
    return Lacking("it is a tokenizer's; save its chat template as a Jinja file, and name that in data.chat_template")


def _held_out(value: Any, _: Draft) -> Result:
    if is_off(value):
        return Needless("as here")
    return Put({"data.eval_fraction": float(value)}) if float(value) < 1 else Lacking("a number of rows; give a share")


def _targets(value: Any, draft: Draft) -> Result:
    """Modules; where none are given PEFT takes those that it knows for the family, mostly these two."""
    result = targets(value, draft)
    if isinstance(result, Put) and value == ["q_proj", "v_proj"]:
        return Put(result.values, PEFT_OF)
    return result


def _length(value: Any, _: Draft) -> Result:
    return Put({"data.max_length": value})


def _cut(value: Any, _: Draft) -> Result:
    if value == "keep_start":
        return Put({"data.too_long": "truncate"})
    return Lacking("the end is cut off here (data.too_long: truncate), or oldest_turns")


def lora_config(prefix: str, r: int, alpha: float, dropout: float, needed: Any = None) -> tuple[Key, ...]:
    """PEFT's LoraConfig."""
    return (
        to(f"{prefix}r", "adapter.r", default=r, needed=needed),
        to(f"{prefix}lora_alpha", "adapter.lora_alpha", default=alpha, needed=needed),
        to(f"{prefix}lora_dropout", "adapter.lora_dropout", default=dropout, needed=needed),
        to(f"{prefix}target_modules", "adapter.target_modules", _targets, default=["q_proj", "v_proj"], needed=needed),
        to(f"{prefix}modules_to_save", "adapter.modules_to_save", names("adapter.modules_to_save")),
        to(f"{prefix}exclude_modules", "adapter.exclude_modules"),
        to(f"{prefix}use_rslora", "adapter.use_rslora", optional("adapter.use_rslora")),
        to(f"{prefix}use_dora", "adapter.use_dora", optional("adapter.use_dora")),
        to(f"{prefix}rank_pattern", "adapter.rank_pattern"),
        to(f"{prefix}alpha_pattern", "adapter.alpha_pattern"),
        to(f"{prefix}layers_to_transform", "adapter.layers_to_transform"),
        to(f"{prefix}layers_pattern", "adapter.layers_pattern"),
        to(f"{prefix}init_lora_weights", "adapter.init_lora_weights", starting),
        to(f"{prefix}trainable_token_indices", "adapter.trainable_token_indices"),
        to(f"{prefix}bias", "adapter.bias", biases),
        *needless(
            f"{prefix}task_type {prefix}inference_mode {prefix}fan_in_fan_out {prefix}revision "
            f"{prefix}base_model_name_or_path {prefix}peft_type {prefix}ensure_weight_tying",
            "found by itself",
        ),
        *lacking(
            f"{prefix}target_parameters", "parameters that are no module (a mixture's experts) take no adapter here"
        ),
        *lacking(f"{prefix}loftq_config", "adapter.init_lora_weights: loftq, over quantization.load_in_4bit"),
        *lacking(f"{prefix}*", "it has no equal; see adapter's options"),
    )


def quantization(prefix: str, double: str, kind: str, four: str = "load_in_4bit") -> tuple[Key, ...]:
    """bitsandbytes' options; where left out they are no double quantization, and `kind`."""
    return (
        to(f"{prefix}{four}", "quantization.load_in_4bit", optional("quantization.load_in_4bit")),
        to(f"{prefix}load_in_8bit", "quantization.load_in_8bit", optional("quantization.load_in_8bit")),
        to(f"{prefix}bnb_4bit_quant_type", "quantization.bnb_4bit_quant_type", default=kind, needed=_quantized(prefix)),
        to(f"{prefix}{double}", "quantization.bnb_4bit_use_double_quant", default=False, needed=_quantized(prefix)),
        to(f"{prefix}llm_int8_skip_modules", "quantization.llm_int8_skip_modules"),
        *needless(
            f"{prefix}bnb_4bit_compute_dtype {prefix}bnb_4bit_quant_storage {prefix}llm_int8_threshold "
            f"{prefix}llm_int8_has_fp16_weight {prefix}llm_int8_enable_fp32_cpu_offload",
            PRECISION,
        ),
    )


_MODEL = (
    to("model_name_or_path", "model.model_name_or_path"),
    to("model_revision", "model.revision", revision),
    model_dtype("dtype"),
    model_dtype("torch_dtype"),
    to("trust_remote_code", "model.trust_remote_code", optional("model.trust_remote_code")),
    *quantization("", "use_bnb_nested_quant", "nf4"),
    to("use_peft", "adapter.method", _adapter, default=False, needed=lambda draft: not _scripted(draft)),
    to("lora_r", "adapter.r", default=16, needed=_with_lora),
    to("lora_alpha", "adapter.lora_alpha", default=32, needed=_with_lora),
    to("lora_dropout", "adapter.lora_dropout", default=0.05, needed=_with_lora),
    to("lora_target_modules", "adapter.target_modules", _targets, default=["q_proj", "v_proj"], needed=_with_lora),
    to("lora_modules_to_save", "adapter.modules_to_save", names("adapter.modules_to_save")),
    to("use_rslora", "adapter.use_rslora", optional("adapter.use_rslora")),
    to("use_dora", "adapter.use_dora", optional("adapter.use_dora")),
    *lacking("lora_target_parameters", "parameters that are no module (a mixture's experts) take no adapter here"),
    *needless("lora_task_type", "a language model is trained"),
    *needless("attn_implementation use_kernels model_init_kwargs*", KERNELS),
)

_SCRIPT = (
    *lora_config("LoraConfig.", 8, 8, 0.0, _with_config),
    *quantization("BitsAndBytesConfig.", "bnb_4bit_use_double_quant", "fp4"),
    together("AutoModelForCausalLM.from_pretrained.0", "model.model_name_or_path"),
    to("AutoModelForCausalLM.from_pretrained.pretrained_model_name_or_path", "model.model_name_or_path"),
    model_dtype("AutoModelForCausalLM.from_pretrained.torch_dtype"),
    model_dtype("AutoModelForCausalLM.from_pretrained.dtype"),
    to("AutoModelForCausalLM.from_pretrained.revision", "model.revision"),
    to(
        "AutoModelForCausalLM.from_pretrained.trust_remote_code",
        "model.trust_remote_code",
        optional("model.trust_remote_code"),
    ),
    *quantization("AutoModelForCausalLM.from_pretrained.", "bnb_4bit_use_double_quant", "fp4"),
    *needless("AutoModelForCausalLM.from_pretrained.*", KERNELS),
    *refused(
        "DPOTrainer GRPOTrainer KTOTrainer ORPOTrainer CPOTrainer RewardTrainer PPOTrainer RLOOTrainer GKDTrainer "
        "OnlineDPOTrainer BCOTrainer DistillationTrainer",
        "it trains by another objective; Topwork has sft alone so far",
    ),
    together("SFTTrainer.model", "model.model_name_or_path"),
    together("SFTTrainer.0", "model.model_name_or_path"),
    together("SFTTrainer.dataset_text_field", "data.columns"),
    to("SFTTrainer.max_seq_length", "data.max_length", _length),
    to("SFTTrainer.packing", "", packed("max_length")),
    *needless("SFTTrainer.*", "told at what it names"),
    *needless(
        "map standardize_sharegpt standardize_data_formats train_on_responses_only* get_chat_template*",
        "the data set's own columns are read, with the model's own chat template",
    ),
    together("load_dataset.0", "data.train"),
    together("load_dataset.path", "data.train"),
    together("load_dataset.1", "data.train"),
    together("load_dataset.name", "data.train"),
    together("load_dataset.split", "data.train"),
    together("load_dataset.data_files", "data.train"),
    *needless("load_dataset.*", LOADING),
)

_DATA = (
    together("dataset_name", "data.train"),
    together("dataset_config", "data.train"),
    together("dataset_train_split", "data.train"),
    together("dataset_test_split", "data.eval"),
    together("datasets[].path", "data.train"),
    together("datasets[].name", "data.train"),
    together("datasets[].data_files", "data.train"),
    together("datasets[].split", "data.train"),
    together("datasets[].fraction", "data.train", "the first rows are another choice: max_rows, or weight"),
    *needless("datasets[].columns datasets[].data_dir", LOADING),
    to("streaming", "data.streaming", optional("data.streaming")),
    to("dataset_streaming", "data.streaming", optional("data.streaming")),
    to("test_split_size", "data.eval_fraction", _held_out),
    *EVALUATED,
    to("max_length", "data.max_length", _length, default=1024, needed=lambda draft: not draft.has("max_seq_length")),
    to("max_seq_length", "data.max_length", _length),
    to("truncation_mode", "data.too_long", _cut, default="keep_start"),
    together("dataset_text_field", "data.columns"),
    together("assistant_only_loss", "data.train_on"),
    together("completion_only_loss", "data.train_on"),
    to("chat_template_path", "data.chat_template", _template),
    plain_template("chat_template"),
    to("packing", "", packed("max_length")),
    *needless(
        "packing_strategy eval_packing padding_free pad_to_multiple_of pad_token use_mps_device",
        "a batch never has padding here",
    ),
    *needless(
        "dataset_num_proc dataset_kwargs* dataset_batch_size num_of_sequences chars_per_token shuffle_dataset", LOADING
    ),
    *lacking("eos_token", _NONE_ADDED),
    to("loss_type", "", ANY_LOSS),
    *lacking("router_aux_loss_coef", "the loss is the log-likelihood of the learned tokens"),
)

_REST = (
    *needless("env* config gradient_accumulation_kwargs", "the file's own"),
    *needless("num_processes ignore_bias_buffers", DISTRIBUTED),
)

TRL = Tool(
    "trl",
    (*_MODEL, *_DATA, *_SCRIPT, *_REST, *training_arguments(2e-5)),
    frozenset(
        [
            "dataset_name",
            "use_peft",
            "lora_target_modules",
            "dataset_train_split",
            "assistant_only_loss",
            "packing_strategy",
            "completion_only_loss",
            "use_bnb_nested_quant",
            "dataset_text_field",
            "max_length",
            "LoraConfig.r",
            "SFTTrainer.args",
            "SFTTrainer.model",
        ]
    ),
    gather,
    "trl 1.16.0, peft 0.21.2, transformers 5.23.0",
)
