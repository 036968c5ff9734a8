"""The rows of PEFT's own test tables, moved to the tiny models of `families.py`.

What PEFT tries, by tests/test_decoder_models.py (its configs on six decoders), tests/test_target_parameters.py and
tests/test_custom_models.py (LoRA, IA3, and the other methods that Topwork trains, on small networks of one or two
layers), as they are in 2026: method, options, and on which kind of module. The networks become decoders here, whose
modules are of the same kind; what has no such module is a row with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One adapter on one base.

    label    what PEFT calls it
    config   the class of PEFT that makes it
    options  what that is given; a tuple (class, options) is another such object
    family   our model, with `values` in its config; None where nothing stands for PEFT's
    why      of the latter
    custom   whether it is of PEFT's small networks
    """

    label: str
    config: str
    options: Options
    family: str | None
    why: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    custom: bool = False

    @property
    def name(self) -> str:
        """Told apart from all others."""
        return f"{self.label} on {self.family or 'no decoder'}"


DECODERS = ("opt", "gpt2", "phi", "llama", "qwen2", "gemma3_text")
"""For PEFT's six decoders. Its third is GPT-J, which Topwork refuses as a base; phi has attention and MLP beside each
other as well, and rotary positions in part."""
TARGETS_OF_GPTJ: Options = {"target_modules": ["q_proj", "v_proj"]}
WITHOUT_TARGETS = {("phi", "AdaLoRA"), ("phi", "VB-LoRA")}
"""Methods for which PEFT has no targets for phi: GPT-J's then."""
LINEAR_ONLY = {
    "BOFT", "HRA", "OFT", "OSF", "RoAd", "SHiRA", "C3A", "MiSS", "DeLoRA", "PSOFT",
}  # fmt: skip
"""Methods that PEFT does not have for gpt2's transposed layers, and does not try there."""
LORA: Options = {"r": 8, "lora_alpha": 32, "target_modules": None, "lora_dropout": 0.05, "bias": "none"}
NO_TARGETS: Options = {"target_modules": None}
CPT_TYPES = [1, 2, 2, 2, 3, 3, 4, 4]
CONFIGS: list[tuple[str, str, Options]] = [
    ("AdaLoRA", "AdaLoraConfig", {**NO_TARGETS, "total_step": 1}),
    ("BOFT", "BOFTConfig", NO_TARGETS),
    ("MiSS", "MissConfig", {**NO_TARGETS, "r": 2}),
    ("CPT", "CPTConfig", {"cpt_token_ids": [*range(8)], "cpt_mask": [1] * 8, "cpt_tokens_type_mask": CPT_TYPES}),
    ("DeLoRA", "DeloraConfig", {**NO_TARGETS, "r": 2}),
    ("FourierFT", "FourierFTConfig", {**NO_TARGETS, "n_frequency": 10}),
    (
        "GraLoRA", "GraloraConfig",
        {**NO_TARGETS, "r": 8, "alpha": 16, "gralora_dropout": 0.05, "gralora_k": 2, "hybrid_r": 0},
    ),
    (
        "GraLoRA, hybrid", "GraloraConfig",
        {**NO_TARGETS, "r": 16, "alpha": 32, "gralora_dropout": 0.05, "gralora_k": 4, "hybrid_r": 4},
    ),
    ("HiRA", "HiraConfig", NO_TARGETS),
    ("HRA", "HRAConfig", NO_TARGETS),
    ("IA3", "IA3Config", {**NO_TARGETS, "feedforward_modules": None}),
    ("LoRA", "LoraConfig", LORA),
    ("aLoRA", "LoraConfig", {**LORA, "alora_invocation_tokens": [1]}),
    ("aLoRA, never invoked", "LoraConfig", {**LORA, "alora_invocation_tokens": [1000]}),
    ("LoRA and trained tokens", "LoraConfig", {**LORA, "trainable_token_indices": [0, 1, 3]}),
    ("OFT", "OFTConfig", NO_TARGETS),
    ("prefix tuning", "PrefixTuningConfig", {"num_virtual_tokens": 10}),
    ("prefix tuning from zero", "PrefixTuningConfig", {"num_virtual_tokens": 10, "init_weights": "zero"}),
    ("p-tuning", "PromptEncoderConfig", {"num_virtual_tokens": 10, "encoder_hidden_size": 32}),
    ("prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 10}),
    (
        "prompt tuning from the vocabulary", "PromptTuningConfig",
        {"num_virtual_tokens": 10, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    ("RoAd", "RoadConfig", {"variant": "road_1", "group_size": 2}),
    ("SHiRA", "ShiraConfig", {**NO_TARGETS, "r": 1, "init_weights": False}),
    ("VB-LoRA", "VBLoRAConfig", {**NO_TARGETS, "vblora_dropout": 0.05, "vector_length": 1, "num_vectors": 2}),
    (
        "VeRA", "VeraConfig",
        {
            **NO_TARGETS, "r": 8, "vera_dropout": 0.05, "projection_prng_key": 255, "d_initial": 0.1,
            "save_projection": True, "bias": "none",
        },
    ),
    ("TinyLoRA", "TinyLoraConfig", NO_TARGETS),
    ("PVeRA", "PveraConfig", {"r": 8, "pvera_dropout": 0.05}),
    ("C3A", "C3AConfig", {**NO_TARGETS, "block_size": 1}),
    ("WaveFT", "WaveFTConfig", {**NO_TARGETS, "n_frequency": 8}),
    ("OSF", "OSFConfig", {}),
    ("PSOFT", "PsoftConfig", {"r": 4, "psoft_alpha": 4}),
]  # fmt: skip
"""On every decoder."""

MLP = {"lin0": "fc1", "lin1": "fc2"}
GPT2 = {"emb": "wte", "conv1d": "c_fc", "lin0": "lm_head"}
NORMS = {"layernorm0": "ln_1", "layernorm1": "ln_2", "lin0": "c_fc"}
NOWHERE = {
    "Conv1d": "convolutions", "Conv2d": "convolutions", "Conv3d": "convolutions",
    "MHA": "an nn.MultiheadAttention",
}  # fmt: skip
"""What no decoder here has, or has in a form that is not PEFT's."""
BLOCKS, VELORA = "BdLoraConfig", "VeloraConfig"

TARGETS: list[tuple[str, Options]] = [
    ("1", {"target_modules": "lin0"}), ("2", {"target_modules": ["lin0"]}), ("3", {"target_modules": ["lin1"]}),
    ("4", {"target_modules": ["lin0", "lin1"]}), ("5", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
]  # fmt: skip
"""What every method is tried with."""
LIN0: Options = {"target_modules": ["lin0"]}
BOTH: Options = {"target_modules": ["lin0", "lin1"]}
CONV1D: Options = {"target_modules": ["conv1d"]}


Custom = tuple[str, str, Options]
CUSTOM: dict[str, list[Custom]] = {
    "LoraConfig": [
        *((f"MLP {name} LoRA", "MLP", options) for name, options in TARGETS),
        ("MLP 6 LoRA", "MLP", {**LIN0, "lora_alpha": 4, "lora_dropout": 0.1}),
        ("MLP 7 DoRA", "MLP", {**LIN0, "use_dora": True}),
        ("MLP 8 DoRA", "MLP", {**BOTH, "use_dora": True}),
        ("MLP 9 DoRA", "MLP", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
        ("MLP KaSA", "MLP", {**LIN0, "kasa_config": ("KasaConfig", {}), "r": 4}),
        ("MLP MiCA", "MLP", {**LIN0, "init_lora_weights": "mica", "r": 4}),
        ("MLP VeLoRA random", "MLP", {**LIN0, "velora_config": (VELORA, {"num_groups": 2, "init_type": "random"})}),
        (
            "MLP VeLoRA mean", "MLP",
            {**BOTH, "velora_config": (VELORA, {"num_groups": 2, "init_type": "batch_average"})},
        ),
        (
            "MLP VeLoRA mean once", "MLP",
            {**LIN0, "velora_config": (VELORA, {"num_groups": 2, "init_type": "batch_average_once"})},
        ),
        ("Conv1D 1 LoRA", "GPT2", CONV1D),
        ("Conv1D 2 LoRA", "GPT2", {"target_modules": ["emb"]}),
        ("Conv1D 3 LoRA", "GPT2", {"target_modules": ["emb", "conv1d"]}),
        ("Conv1D 1 DoRA", "GPT2", {**CONV1D, "use_dora": True}),
        ("Conv1D 2 DoRA", "GPT2", {"target_modules": ["emb"], "use_dora": True}),
        ("Conv1D 3 DoRA", "GPT2", {"target_modules": ["emb", "conv1d"], "use_dora": True}),
        ("Conv1D trained tokens", "GPT2", {**CONV1D, "trainable_token_indices": {"emb": [0, 10]}}),
        *((f"{kind} {name} LoRA", kind, {}) for kind, names in {
            "Conv1d": ["1", "DoRA"], "Conv2d": ["1", "2", "1 DoRA", "2 DoRA", "groups", "groups 2", "groups DoRA",
            "groups 2 DoRA", "lora_bias"], "Conv3d": ["1", "2", "1 DoRA", "2 DoRA", "1x1", "1x1 DoRA", "lora_bias"],
            "MHA": ["1", "2"],
        }.items() for name in names),
        ("MLP lora_bias", "MLP", {**BOTH, "lora_bias": True, "lora_alpha": 32}),
        ("MLP parameters 1", "MLP", {"target_parameters": ["lin0.weight"], "target_modules": []}),
        ("MLP parameters 2", "MLP", {**LIN0, "target_parameters": ["lin1.weight"]}),
        ("MLP MonteCLoRA", "MLP", {**LIN0, "monteclora_config": ("MontecloraConfig", {"num_samples": 2})}),
        (
            "MLP BD-LoRA A", "MLP",
            {**BOTH, "use_bdlora": (BLOCKS, {"target_modules_bd_a": ["lin0"], "match_strict": False})},
        ),
        (
            "MLP BD-LoRA B", "MLP",
            {**BOTH, "use_bdlora": (BLOCKS, {"target_modules_bd_b": ["lin1"], "nblocks": 2, "match_strict": False})},
        ),
        (
            "MLP BD-LoRA A and B", "MLP",
            {**BOTH, "use_bdlora": (
                BLOCKS, {"target_modules_bd_a": ["lin0"], "target_modules_bd_b": ["lin1"], "nblocks": 2}
            )},
        ),
    ],
    "IA3Config": [
        ("MLP 1 IA3", "MLP", {"target_modules": "lin0", "feedforward_modules": []}),
        ("MLP 2 IA3", "MLP", {"target_modules": "lin0", "feedforward_modules": "lin0"}),
        ("MLP 3 IA3", "MLP", {**LIN0, "feedforward_modules": []}),
        ("MLP 4 IA3", "MLP", {**LIN0, "feedforward_modules": ["lin0"]}),
        ("MLP 5 IA3", "MLP", {"target_modules": ["lin1"], "feedforward_modules": []}),
        ("MLP 6 IA3", "MLP", {"target_modules": ["lin1"], "feedforward_modules": ["lin1"]}),
        ("MLP 7 IA3", "MLP", {**BOTH, "feedforward_modules": []}),
        ("MLP 8 IA3", "MLP", {**BOTH, "feedforward_modules": ["lin0", "lin1"]}),
        ("MLP 9 IA3", "MLP", {**LIN0, "modules_to_save": ["lin1"], "feedforward_modules": ["lin0"]}),
        ("Conv1D 1 IA3", "GPT2", {**CONV1D, "feedforward_modules": ["conv1d"]}),
        ("Conv1D 2 IA3", "GPT2", {"target_modules": ["conv1d", "lin0"], "feedforward_modules": ["conv1d", "lin0"]}),
        ("Conv1D 3 IA3", "GPT2", {**CONV1D, "feedforward_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
        *((f"{kind} {number} IA3", kind, {}) for kind in ("Conv2d", "Conv3d") for number in range(1, 6)),
    ],
    "VeraConfig": [
        *((f"MLP {name} VeRA", "MLP", options) for name, options in TARGETS),
        ("Conv1D 1 VeRA", "GPT2", CONV1D),
    ],
    "LoHaConfig": [
        *((f"MLP {name} LoHa", "MLP", options) for name, options in TARGETS),
        ("MLP 6 LoHa", "MLP", {**LIN0, "alpha": 4, "module_dropout": 0.1}),
        ("MLP 7 LoHa", "MLP", {"target_modules": "lin0", "rank_dropout": 0.5}),
        *((f"{kind} {number} LoHa", kind, {}) for kind, most in {"Conv1d": 6, "Conv2d": 7}.items()
          for number in range(1, most + 1)),
    ],
    "LoKrConfig": [
        *((f"MLP {name} LoKr", "MLP", options) for name, options in TARGETS),
        ("MLP 6 LoKr", "MLP", {**LIN0, "alpha": 4, "module_dropout": 0.1}),
        ("MLP 7 LoKr", "MLP", {"target_modules": "lin0", "rank_dropout": 0.5}),
        ("MLP 8 LoKr", "MLP", {"target_modules": "lin0", "decompose_both": True, "r": 1, "alpha": 1}),
        *((f"{kind} {number} LoKr", kind, {}) for kind, most in {"Conv1d": 5, "Conv2d": 10}.items()
          for number in range(1, most + 1)),
    ],
    "OFTConfig": [
        *((f"MLP {name} OFT", "MLP", {"r": 2, "oft_block_size": 0, **options, **more}) for name, options, more in (
            ("1", {"target_modules": "lin0"}, {"use_cayley_neumann": False}),
            ("2", LIN0, {"use_cayley_neumann": False}),
            ("5", {**LIN0, "modules_to_save": ["lin1"]}, {"use_cayley_neumann": False}),
            ("6", LIN0, {"module_dropout": 0.1, "use_cayley_neumann": False}),
            ("7", LIN0, {"coft": True, "eps": 1e-2}),
            ("8", LIN0, {"block_share": True, "use_cayley_neumann": False}),
            ("9", LIN0, {"coft": True, "eps": 1e-2, "block_share": True}),
            ("10", LIN0, {"r": 0, "oft_block_size": 2}),
            ("11", LIN0, {"r": 0, "oft_block_size": 2, "use_cayley_neumann": False}),
            ("12", LIN0, {"r": 0, "oft_block_size": 2, "coft": True, "eps": 1e-2, "block_share": True}),
            ("13", LIN0, {"r": 0, "oft_block_size": 2, "coft": True, "eps": 1e-2, "block_share": True,
                          "use_cayley_neumann": False}),
        )),
        ("Embedding 1 OFT", "GPT2", {"r": 1, "oft_block_size": 0, "target_modules": ["emb"]}),
        ("Embedding 2 OFT", "GPT2", {"r": 1, "oft_block_size": 0, "target_modules": ["emb"], "block_share": True}),
        *((f"Conv2d {number} OFT", "Conv2d", {}) for number in range(1, 5)),
    ],
    "TrainableTokensConfig": [
        ("Conv1D trained tokens alone", "GPT2", {"target_modules": ["emb"], "token_indices": [0, 1, 3]}),
    ],
    "LNTuningConfig": [
        ("LayerNorm 1", "NORMS", {"target_modules": "layernorm0"}),
        ("LayerNorm 2", "NORMS", {"target_modules": ["layernorm0"]}),
        ("LayerNorm 3", "NORMS", {"target_modules": ["layernorm0"], "modules_to_save": ["layernorm1"]}),
        ("LayerNorm 4", "NORMS", {"target_modules": "lin0"}),
        ("LayerNorm 5", "NORMS", {"target_modules": ["lin0"]}),
    ],
}  # fmt: skip
"""By the class of PEFT: the label, the kind of network, the options."""
EXPERTS: list[tuple[str, Options]] = [
    ("LoRA on experts' outputs", {**LORA, "lora_dropout": 0.0, "target_parameters": ["experts.down_proj"]}),
    (
        "LoRA on experts",
        {**LORA, "lora_dropout": 0.0, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
]  # fmt: skip
NETWORKS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "MLP": ("opt", MLP, {}),
    "GPT2": ("gpt2", GPT2, {"tie_word_embeddings": False}),
    "NORMS": ("gpt2", NORMS, {}),
}
"""A kind of network -> our family, its modules' names there, and its config's values."""


def rows() -> list[Row]:
    """All of them, in PEFT's order."""
    found = [
        Row(label, config, options | (TARGETS_OF_GPTJ if (family, label) in WITHOUT_TARGETS else {}), family)
        for label, config, options in CONFIGS
        for family in DECODERS
        if not (family == "gpt2" and label in LINEAR_ONLY)
    ]
    found += [Row(label, "LoraConfig", options, family) for label, options in EXPERTS for family in ("mixtral",)]
    return found + [_custom(config, *row) for config, of in CUSTOM.items() for row in of]


def _custom(config: str, label: str, kind: str, options: Options) -> Row:
    if kind in NOWHERE:
        return Row(label, config, options, None, f"no decoder here has {NOWHERE[kind]}", custom=True)
    family, names, values = NETWORKS[kind]
    return Row(label, config, _moved(options, names), family, values=values, custom=True)


def _moved(value: Any, names: Mapping[str, str]) -> Any:
    """The same with modules' names as our model has them. A bare name in PEFT's networks is a module's whole path, and
    so an expression for whole paths here."""
    if isinstance(value, dict):
        return {names.get(key, key): _expression(key, _moved(each, names), each) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, names) for each in value]
    if isinstance(value, tuple):
        return (value[0], _moved(value[1], names))
    if isinstance(value, str):
        path, dot, last = value.partition(".")
        return names.get(path, path) + dot + last
    return value


def _expression(key: str, moved: Any, given: Any) -> Any:
    whole = key in ("target_modules", "feedforward_modules") and isinstance(given, str)
    return rf".*\.{moved}" if whole else moved
