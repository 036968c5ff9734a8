"""Who reads what `topwork export` writes, and what each would make of an adapter's features if nobody looked.

One record for each format. For every feature that an adapter can have it says what is done about it, and what the
reader would do with it in silence or refuse at a late hour. `preflight.py` finds the features; a test goes through all
rows. Read in the readers' sources: PEFT 0.21, vLLM 0.32, SGLang 0.5.23, llama.cpp b11549, Ollama and LoRAX of 2026.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from topwork.common.errors import RequestError, did_you_mean

Action = Literal["kept", "folded", "padded", "expanded", "merged", "merge instead", "refused"]
"""kept           the reader takes it as it is
folded         its scale, or what it began as, goes into A and B
padded         A and B get zeros up to one rank
expanded       what it chooses is written out as names, or as updates of zeros in the layers that have none
merged         it becomes part of a whole model's weights
merge instead  the format cannot carry it, and the merged model can
refused        nothing can carry it"""
FEATURES: dict[str, str] = {
    "rslora": "rsLoRA (alpha / sqrt(r))",
    "alpha_pattern": "alphas by module (alpha_pattern)",
    "unequal_ranks": "unequal ranks (rank_pattern)",
    "fractional_alpha": "a lora_alpha that is no whole number",
    "some_layers": "some layers only (layers_to_transform)",
    "regex_targets": "target_modules as an expression",
    "beginning": "a beginning taken out of the base (PiSSA, OLoRA)",
    "quantized_base": "a base in 4 or 8 bits in training",
    "dora": "DoRA",
    "biases": "trained biases (bias, lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
    "trained_tokens": "trained tokens (trainable_token_indices)",
    "embedding_lora": "LoRA at the embedding",
    "head_lora": "LoRA at the head",
    "tied_lora": "LoRA at a head or embedding that are tied",
    "large_rank": "a large rank",
    "parameters": "LoRA of experts or their router (target_parameters)",
    "ia3": "IA3",
    "bitfit": "BitFit",
    "full": "full fine-tuning",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
    "other_method": "another of PEFT's methods",
    "grown_vocabulary": "a vocabulary that grew",
    "not_finite": "NaN or infinity",
}
"""What an adapter can have beside A and B of one rank at linear layers, and what people call it."""


@dataclass(frozen=True)
class Verdict:
    """What is done about a feature, and what the reader would do `unseen`."""

    action: Action
    unseen: str = ""


@dataclass(frozen=True)
class Reader:
    """A format and who reads it.

    format        as --format says
    reader        as messages call who reads it
    reads         an adapter, or a whole model
    verdicts      by feature, for all FEATURES
    plain         whether it is given the plain form (`lowered.py`)
    ranks         what the one rank of the plain form may be; None for any up to `most`
    most          the largest rank; None for any
    whole_layers  whether a module's name that has an update in one layer needs one in all
    ends          model types whose embedding and head it adapts; None for all
    types         what --type may say, the default first; empty where there is nothing to choose
    advice        what to export where this format cannot carry a feature that a merged model can
    """

    format: str
    reader: str
    reads: Literal["adapter", "model"]
    verdicts: Mapping[str, Verdict]
    plain: bool = True
    ranks: tuple[int, ...] | None = None
    most: int | None = None
    whole_layers: bool = False
    ends: frozenset[str] | None = None
    types: tuple[str, ...] = ()
    advice: str = "export the merged model (--format hf)"


def _by_action(actions: Mapping[Action, str], unseen: Mapping[str, str]) -> dict[str, Verdict]:
    """Verdicts from lists of features under what is done about them; ValueError unless each feature stands once."""
    found = {
        name: Verdict(action, "" if action == "merged" else unseen.get(name, ""))
        for action, names in actions.items()
        for name in names.split()
    }
    if found.keys() != FEATURES.keys() or sum(len(names.split()) for names in actions.values()) != len(FEATURES):
        raise ValueError(f"verdicts for {sorted(found.keys() ^ FEATURES.keys())} are missing, unknown or given twice")
    return found


_SCALES = "scales every module by lora_alpha / r of the config"
_UNKNOWN = "knows LoRA alone"
_EXPERTS = "is given A and B of linear layers alone"
_ALWAYS = {
    "prefix": "has no place for learned keys and values before the text",
    "prompt": "has no place for learned embeddings before the text",
    "grown_vocabulary": "would find rows that this base has not",
    "not_finite": "would answer NaN",
    "quantized_base": "serves the base's 16-bit weights; the adapter was trained against the quantized ones",
}
_BEGINNING = "would take A and B for an update of the whole base, which they were trained without"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

VLLM_ENDS = frozenset({
    "llama", "phi3", "qwen3", "qwen3_moe", "granite", "granitemoe", "exaone4", "apertus", "cohere", "cohere2",
    "mixtral", "phimoe", "lfm2", "nemotron",
})  # fmt: skip
"""Model types whose classes in vLLM name `embedding_modules`: it refuses an adapter of the embedding or head of others
(mistral, qwen2, gemma to gemma3 among them), which then are modules that it does not expect."""

PEFT = Reader(
    "peft", "PEFT", "adapter",
    _by_action(
        {
            "kept": "rslora alpha_pattern unequal_ranks fractional_alpha some_layers regex_targets dora biases "
                    "modules_to_save trained_tokens embedding_lora head_lora tied_lora large_rank parameters ia3 "
                    "prefix prompt other_method quantized_base",
            "folded": "beginning",
            "merge instead": "bitfit full",
            "refused": "grown_vocabulary not_finite",
        },
        _ALWAYS | {
            "beginning": "computes it again from whatever base it is given, and changes that base for every other "
                         "adapter",
            "bitfit": "has no form for biases alone", "full": "has no form for a whole model", "prefix": "",
            "prompt": "",
        },
    ),
    plain=False,
)  # fmt: skip
VLLM = Reader(
    "vllm", "vLLM", "adapter",
    _by_action(
        {
            "folded": "rslora alpha_pattern fractional_alpha beginning",
            "padded": "unequal_ranks",
            "expanded": "regex_targets",
            "kept": "some_layers embedding_lora head_lora quantized_base",
            "merge instead": "dora biases modules_to_save trained_tokens tied_lora large_rank parameters ia3 bitfit "
                             "full other_method",
            "refused": "prefix prompt grown_vocabulary not_finite",
        },
        _ALWAYS | {
            "rslora": "scales the update of experts by alpha / r (#55545)",
            "alpha_pattern": "overlooks it in older versions",
            "unequal_ranks": "scales by the config's r in older versions",
            "fractional_alpha": "declares lora_alpha a whole number",
            "beginning": "refuses the folder",
            "dora": "refuses it", "biases": "refuses them", "modules_to_save": "refuses them",
            "trained_tokens": "refuses tensors that it does not expect",
            "tied_lora": "has one module for both, so that an update of one would reach the other",
            "large_rank": "takes no rank over 512",
            "parameters": "overlooks or refuses what PEFT writes of them (#41384, #52194)",
            "ia3": _UNKNOWN, "bitfit": _UNKNOWN, "full": _UNKNOWN, "other_method": _UNKNOWN,
        },
    ),
    most=VLLM_RANKS[-1], ends=VLLM_ENDS,
)  # fmt: skip
_PLAIN_LORA: dict[Action, str] = {
    "folded": "rslora alpha_pattern fractional_alpha beginning",
    "padded": "unequal_ranks",
    "expanded": "regex_targets",
    "kept": "some_layers embedding_lora head_lora quantized_base large_rank",
    "merge instead": "dora biases modules_to_save trained_tokens tied_lora parameters ia3 bitfit full other_method",
    "refused": "prefix prompt grown_vocabulary not_finite",
}
"""What is done for a reader of A and B at linear layers, embedding and head, at any rank and one scale."""
SGLANG = Reader(
    "sglang", "SGLang", "adapter",
    _by_action(
        _PLAIN_LORA,
        _ALWAYS | {
            "rslora": _SCALES, "alpha_pattern": _SCALES, "unequal_ranks": _SCALES, "beginning": _BEGINNING,
            "regex_targets": "reads names alone", "dora": "refuses it",
            "modules_to_save": "overlooks whole modules", "trained_tokens": "overlooks them",
            "tied_lora": "has one weight for both", "parameters": "does not know what PEFT calls them (#25528)",
            "ia3": _UNKNOWN, "bitfit": _UNKNOWN, "full": _UNKNOWN, "other_method": _UNKNOWN,
        },
    ),
)  # fmt: skip
LORAX = Reader(
    "lorax", "LoRAX", "adapter",
    _by_action(
        {
            "folded": "rslora alpha_pattern fractional_alpha beginning",
            "padded": "unequal_ranks",
            "expanded": "regex_targets some_layers",
            "kept": "quantized_base head_lora",
            "merge instead": "dora biases modules_to_save trained_tokens embedding_lora tied_lora large_rank "
                             "parameters ia3 bitfit full other_method",
            "refused": "prefix prompt grown_vocabulary not_finite",
        },
        _ALWAYS | {
            "rslora": "scales by another rank than the adapter's where it pads (LoRAX #700)",
            "alpha_pattern": _SCALES, "unequal_ranks": _SCALES, "beginning": _BEGINNING,
            "some_layers": "drops a module's name altogether where one layer lacks it",
            "dora": "drops the magnitudes", "modules_to_save": "overlooks whole modules",
            "trained_tokens": "overlooks them", "embedding_lora": "overlooks it",
            "tied_lora": "overlooks it at the embedding", "large_rank": "has no kernel for ranks over 128",
            "parameters": _EXPERTS, "ia3": _UNKNOWN, "bitfit": _UNKNOWN, "full": _UNKNOWN, "other_method": _UNKNOWN,
        },
    ),
    ranks=(8, 16, 32, 64, 128), most=128, whole_layers=True,
)  # fmt: skip
_LLAMA_CPP = _by_action(
    _PLAIN_LORA,
    _ALWAYS | {
        "rslora": "scales by alpha / r: use_rslora is not looked at", "beginning": _BEGINNING,
        "alpha_pattern": "has one alpha for all modules: alpha_pattern is not looked at",
        "unequal_ranks": "would scale each module by its own rank",
        "dora": "has no place for magnitudes", "biases": "has no place for them",
        "modules_to_save": "has no place for whole modules",
        "trained_tokens": "has no place for rows",
        "tied_lora": "has no output.weight, and one tensor for both", "parameters": _EXPERTS, "ia3": _UNKNOWN,
        "bitfit": _UNKNOWN, "full": _UNKNOWN, "other_method": _UNKNOWN,
    },
)  # fmt: skip
ADAPTER_TYPES = ("f32", "f16", "bf16")
MODEL_TYPES = ("f16", "bf16", "f32", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
GGUF_ADAPTER = Reader(
    "gguf-adapter", "llama.cpp", "adapter", _LLAMA_CPP, types=ADAPTER_TYPES,
    advice="export the merged model (--format gguf)",
)  # fmt: skip
OLLAMA = Reader(
    "ollama", "Ollama", "adapter", _LLAMA_CPP, types=MODEL_TYPES, advice="export the merged model (--format gguf)"
)
_MERGED = _by_action(
    {
        "merged": "rslora alpha_pattern unequal_ranks fractional_alpha some_layers regex_targets beginning "
                  "quantized_base dora biases modules_to_save trained_tokens embedding_lora head_lora tied_lora "
                  "large_rank parameters ia3 bitfit full other_method",
        "refused": "prefix prompt grown_vocabulary not_finite",
    },
    _ALWAYS,
)  # fmt: skip
HF = Reader("hf", "transformers", "model", _MERGED, plain=False, types=("auto", "bf16", "f16", "f32"))
GGUF = Reader("gguf", "llama.cpp", "model", _MERGED, plain=False, types=MODEL_TYPES)
OLLAMA_MERGED = replace(GGUF, format="ollama", reader="Ollama")
"""For families and features that Ollama has no adapters for."""
READERS = {reader.format: reader for reader in (PEFT, HF, GGUF, GGUF_ADAPTER, OLLAMA, VLLM, SGLANG, LORAX)}


def reader_of(name: str) -> Reader:
    """The record of a --format. Raises RequestError, with the nearest names, for an unknown one."""
    if name not in READERS:
        raise RequestError(
            f"--format {name}: there are {', '.join(READERS)}{did_you_mean(name.lower().replace('_', '-'), READERS)}"
        )
    return READERS[name]


def type_of(reader: Reader, asked: str | None) -> str | None:
    """The --type to write: what was asked for, or the format's own. Raises RequestError for one it has not."""
    if asked is None:
        return reader.types[0] if reader.types else None
    known = asked.lower()
    if not reader.types:
        raise RequestError(f"--type {asked}: --format {reader.format} has one form only; leave --type out")
    if known not in reader.types:
        raise RequestError(
            f"--type {asked}: --format {reader.format} has {', '.join(reader.types)}{did_you_mean(known, reader.types)}"
        )
    return known
