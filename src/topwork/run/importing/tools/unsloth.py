"""Unsloth: notebooks and scripts with FastLanguageModel, and the YAML of its Studio. Keys, meanings and defaults as in
the packages unsloth 2026.3.4 (`models/loader.py`, `models/llama.py`, `models/rl.py`) and 2026.10.9 (Studio)."""

from dataclasses import replace
from typing import Any

from topwork.run.importing.convert import (
    KERNELS,
    LOADING,
    LOGGING,
    RECOMPUTED,
    batch,
    biases,
    dtype,
    every,
    listed_targets,
    names,
    number_of,
    optimizer,
    optional,
    packed,
    schedule,
    sink,
    starting,
    targets,
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
from topwork.run.importing.tools.arguments import ANY_LOSS, EVALUATED, plain_template, training_arguments
from topwork.run.importing.tools.unsloth_data import gather

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_IMAGES = "images and audio are not read here; its language model's layers are trained by target_modules"


def _scripted(draft: Draft) -> bool:
    return any(each.key.startswith(("from_pretrained.", "get_peft_model.")) for each in draft.given)


def _grafted(draft: Draft) -> bool:
    return any(each.key.startswith("get_peft_model.") for each in draft.given)


def _four(value: Any, draft: Draft) -> Result:
    others = ("load_in_8bit", "load_in_16bit", "load_in_fp8", "full_finetuning")
    if value is not True or any(draft.value(f"from_pretrained.{name}") for name in others):
        return Needless("off, or another is on")
    return Put({"quantization.load_in_4bit": True})


def _full(value: Any, _: Draft) -> Result:
    return Put({"adapter.method": "full"}) if value is True else Needless("off, as here")


def _loftq(value: Any, _: Draft) -> Result:
    return Needless("off, as here") if is_off(value) else Put({"adapter.init_lora_weights": "loftq"})


def _vision(value: Any, _: Draft) -> Result:
    return Lacking(_IMAGES) if value is True else Needless("as here")


def _seed(value: Any, draft: Draft) -> Result:
    if draft.has("seed"):
        return Needless("seed decides the adapter's first weights here, too")
    return Put({"training.seed": value})


def _length(value: Any, _: Draft) -> Result:
    return Put({"data.max_length": value}) if whole(value) > 0 else Lacking("the model's whole context; give a length")


def _type(value: Any, _: Draft) -> Result:
    if value in ("lora", "qlora"):
        return Put({"adapter.method": "lora"})
    return (
        Put({"adapter.method": "full"}) if value == "full" else Refused(f"{value}: the methods here are lora and full")
    )


def _some(ours: str) -> Any:
    """Of Studio: zero is none."""
    return lambda value, _: Put({ours: number_of(value)}) if float(value) > 0 else Needless("none, as here")


def _epochs(value: Any, draft: Draft) -> Result:
    if float(draft.value("training.max_steps") or 0) > 0:
        return Needless("max_steps goes before it")
    return Put({"training.num_train_epochs": number_of(value)})


_LOADED = (
    together("from_pretrained.0", "model.model_name_or_path"),
    to("from_pretrained.model_name", "model.model_name_or_path"),
    to("from_pretrained.max_seq_length", "data.max_length", _length, default=2048, needed=_scripted),
    to("from_pretrained.dtype", "model.dtype", dtype),
    to("from_pretrained.load_in_4bit", "quantization.load_in_4bit", _four, default=True, needed=_scripted),
    to("from_pretrained.load_in_8bit", "quantization.load_in_8bit", optional("quantization.load_in_8bit")),
    to("from_pretrained.full_finetuning", "adapter.method", _full),
    to("from_pretrained.revision", "model.revision"),
    to("from_pretrained.trust_remote_code", "model.trust_remote_code", optional("model.trust_remote_code")),
    *needless("from_pretrained.load_in_16bit", "the base is in model.dtype where it is not quantized"),
    *lacking("from_pretrained.load_in_fp8 from_pretrained.qat_scheme", "bases are held in NF4, FP4 or int8 here"),
    *lacking("from_pretrained.rope_scaling from_pretrained.resize_model_vocab", "the model's config is taken as it is"),
    *needless("from_pretrained.random_state", "get_peft_model's decides the first weights"),
    *needless("from_pretrained.*", LOADING),
)

_GRAFTED = (
    to("get_peft_model.r", "adapter.r", default=16, needed=_grafted),
    to("get_peft_model.lora_alpha", "adapter.lora_alpha", default=16, needed=_grafted),
    to("get_peft_model.lora_dropout", "adapter.lora_dropout", default=0.0, needed=_grafted),
    to("get_peft_model.target_modules", "adapter.target_modules", targets, default=LINEAR, needed=_grafted),
    to("get_peft_model.bias", "adapter.bias", biases),
    to("get_peft_model.use_rslora", "adapter.use_rslora", optional("adapter.use_rslora")),
    to("get_peft_model.use_dora", "adapter.use_dora", optional("adapter.use_dora")),
    to("get_peft_model.loftq_config", "adapter.init_lora_weights", _loftq),
    to("get_peft_model.init_lora_weights", "adapter.init_lora_weights", starting),
    to("get_peft_model.modules_to_save", "adapter.modules_to_save", names("adapter.modules_to_save")),
    to("get_peft_model.layers_to_transform", "adapter.layers_to_transform"),
    to("get_peft_model.layers_pattern", "adapter.layers_pattern"),
    to("get_peft_model.random_state", "training.seed", _seed),
    to("get_peft_model.finetune_vision_layers", "", _vision),
    *needless(
        "get_peft_model.finetune_language_layers get_peft_model.finetune_attention_modules "
        "get_peft_model.finetune_mlp_modules",
        "target_modules says which",
    ),
    *lacking("get_peft_model.target_parameters get_peft_model.qat_scheme", "it has no equal; see adapter's options"),
    *needless("get_peft_model.*", KERNELS),
)

_TRAINER = (
    *refused(
        "DPOTrainer GRPOTrainer KTOTrainer ORPOTrainer CPOTrainer RewardTrainer PPOTrainer RLOOTrainer GKDTrainer "
        "OnlineDPOTrainer BCOTrainer DistillationTrainer",
        "it trains by another objective; Topwork has sft alone so far",
    ),
    *refused("FastSentenceTransformer", "it trains embeddings; Topwork trains language models"),
    together("load_dataset.0", "data.train"),
    together("load_dataset.path", "data.train"),
    together("load_dataset.1", "data.train"),
    together("load_dataset.name", "data.train"),
    together("load_dataset.split", "data.train"),
    together("load_dataset.data_files", "data.train"),
    *needless("load_dataset.*", LOADING),
    together("train_on_responses_only", "data.train_on"),
    *needless("train_on_responses_only.*", "the template's turns say where answers are"),
    *needless("standardize_sharegpt standardize_data_formats map", "the data set's own columns are read"),
    plain_template("get_chat_template.chat_template"),
    *needless("get_chat_template.*", "the tokenizer's"),
    *needless("SFTTrainer.max_seq_length", "told where the model is loaded"),
    together("SFTTrainer.dataset_text_field", "data.columns"),
    together("SFTTrainer.formatting_func", "data.train"),
    to("SFTTrainer.packing", "", packed("max_seq_length")),
    together("SFTTrainer.eval_dataset", "data.eval"),
    *needless("SFTTrainer.*", "told at what it names"),
    together("dataset_text_field", "data.columns"),
    to("packing", "", packed("max_seq_length")),
    *needless("max_seq_length", "told where the model is loaded"),
    *needless("max_length", "told where the model is loaded"),
    together("assistant_only_loss", "data.train_on"),
    together("completion_only_loss", "data.train_on"),
    to("loss_type", "", ANY_LOSS),
    *EVALUATED,
    *lacking("embedding_learning_rate", "one learning rate is for all that is trained"),
    *needless("dataset_num_proc dataset_kwargs* eval_packing padding_free packing_strategy", LOADING),
)

_STUDIO = (
    to("model", "model.model_name_or_path"),
    together("data.dataset", "data.train"),
    *needless("data.format_type", "recognised from the rows"),
    to("training.training_type", "adapter.method", _type),
    to("training.max_seq_length", "data.max_length"),
    to("training.load_in_4bit", "quantization.load_in_4bit", optional("quantization.load_in_4bit")),
    to("training.output_dir", "output_dir"),
    to("training.num_epochs", "training.num_train_epochs", _epochs),
    to("training.learning_rate", "training.learning_rate"),
    to(
        "training.batch_size",
        "training.batch_size",
        batch("training.batch_size", 1, "training.gradient_accumulation_steps", 1),
    ),
    to(
        "training.gradient_accumulation_steps",
        "training.batch_size",
        batch("training.batch_size", 1, "training.gradient_accumulation_steps", 1),
    ),
    to("training.warmup_steps", "training.warmup_steps"),
    to("training.max_steps", "training.max_steps", _some("training.max_steps")),
    to("training.save_steps", "training.save_steps", every("training.save_steps")),
    to("training.weight_decay", "training.weight_decay"),
    to("training.random_seed", "training.seed"),
    to("training.packing", "", packed("max_seq_length")),
    to(
        "training.train_on_completions",
        "data.train_on",
        lambda value, _: Put({"data.train_on": "answers" if value else "all"}),
    ),
    *needless("training.gradient_checkpointing", RECOMPUTED),
    to("training.optim", "training.optim", optimizer),
    to("training.lr_scheduler_type", "training.lr_scheduler_type", schedule),
    *lacking("training.*", "it has no equal; see training's options"),
    to("lora.lora_r", "adapter.r"),
    to("lora.lora_alpha", "adapter.lora_alpha"),
    to("lora.lora_dropout", "adapter.lora_dropout"),
    to("lora.target_modules", "adapter.target_modules", listed_targets),
    to("lora.use_rslora", "adapter.use_rslora", optional("adapter.use_rslora")),
    to("lora.use_dora", "adapter.use_dora", optional("adapter.use_dora")),
    to("lora.use_loftq", "adapter.init_lora_weights", _loftq),
    *needless("lora.finetune_* lora.vision_all_linear", "target_modules says which"),
    to("logging.enable_tensorboard", "training.report_to", sink("tensorboard")),
    to("logging.enable_wandb", "training.report_to", sink("wandb")),
    *lacking("audio_type audio_input is_vision is_audio", "images and audio are not read here; text is"),
    *needless("logging.* inference.*", LOGGING),
)


def _arguments() -> tuple[Key, ...]:
    """transformers', of which Unsloth changes some defaults; Studio's files have none of them."""
    own = {key.theirs for key in (*_LOADED, *_GRAFTED, *_TRAINER, *_STUDIO)}
    taken = training_arguments(5e-5, share=0.1, size=4, passes=2, seed=3407)
    first = "get_peft_model.random_state"
    decay = {"weight_decay": 0.01, "optim": "adamw_8bit"}

    def scripted(key: Key) -> Key:
        inner = key.needed
        given = replace(key, default=decay[key.theirs]) if key.theirs in decay else key
        if not given.has_default:
            return given
        if key.theirs == "seed":
            return replace(given, needed=lambda draft: _scripted(draft) and not draft.has(first))
        return replace(given, needed=lambda draft: _scripted(draft) and (inner is None or inner(draft)))

    return tuple(scripted(key) for key in taken if key.theirs not in own)


UNSLOTH = Tool(
    "unsloth",
    (*_LOADED, *_GRAFTED, *_TRAINER, *_STUDIO, *_arguments()),
    frozenset(
        (
            "from_pretrained.model_name",
            "from_pretrained.max_seq_length",
            "get_peft_model.r",
            "training.training_type",
            "lora.lora_r",
            "training.random_seed",
            "training.max_seq_length",
            "get_peft_model.lora_alpha",
            "from_pretrained.load_in_4bit",
        )
    ),
    gather,
    "unsloth 2026.3.4 and 2026.10.9",
)
