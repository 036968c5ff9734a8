"""What a training script of Python gives, as keys: `SFTConfig(learning_rate=…)` is `learning_rate`, as on TRL's command
line, `LoraConfig(r=…)` is `LoraConfig.r`."""

from collections.abc import Iterable

from topwork.run.importing.python_calls import Call
from topwork.run.importing.records import Given

_ARGUMENTS = ("SFTConfig", "TrainingArguments", "UnslothTrainingArguments", "Seq2SeqTrainingArguments")
_TRAINERS = {"SFTTrainer": "SFTTrainer", "UnslothTrainer": "SFTTrainer", "Trainer": "SFTTrainer"}
_LOADERS = ("FastLanguageModel", "FastModel", "FastVisionModel")
_PLAIN = ("LoraConfig", "BitsAndBytesConfig", "load_dataset", "get_chat_template", "train_on_responses_only")
_SAID = ("train_on_responses_only", "standardize_sharegpt", "standardize_data_formats", "map")
"""Calls that say something by being there."""
_OTHER_TRAINERS = (
    "DPOTrainer", "GRPOTrainer", "KTOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer", "PPOTrainer",
    "RLOOTrainer", "GKDTrainer", "OnlineDPOTrainer", "BCOTrainer", "DistillationTrainer",
)  # fmt: skip


def given_in(calls: Iterable[Call]) -> list[Given]:
    """All that is given, of the first call of each kind."""
    found: dict[str, Given] = {}
    taken: dict[str, Call] = {}
    for call in calls:
        prefix = _prefix(call)
        if prefix is None or (prefix in taken and taken[prefix] is not call):
            continue
        if prefix == "load_dataset." and not _named(call):
            continue
        taken[prefix] = call
        for each in call.arguments:
            if not (each.code or "").isidentifier() or prefix not in ("SFTTrainer.",):
                found.setdefault(f"{prefix}{each.key}", Given(f"{prefix}{each.key}", each.value, each.line, each.code))
    for call in calls:
        said = call.name.rpartition(".")[2]
        if said in (*_SAID, *_OTHER_TRAINERS, "FastSentenceTransformer"):
            found.setdefault(said, Given(said, True, call.line))
        if call.name.startswith("FastSentenceTransformer."):
            found.setdefault("FastSentenceTransformer", Given("FastSentenceTransformer", True, call.line))
    return list(found.values())


def is_unsloth(calls: Iterable[Call]) -> bool:
    """Whether a script trains with Unsloth."""
    return any(call.name.partition(".")[0] in (*_LOADERS, "FastSentenceTransformer") for call in calls)


def _prefix(call: Call) -> str | None:
    owner, _, name = call.name.rpartition(".")
    owner = owner.rpartition(".")[2]
    if owner in _LOADERS and name in ("from_pretrained", "get_peft_model"):
        return f"{name}."
    if name == "from_pretrained" and owner.startswith("AutoModel"):
        return "AutoModelForCausalLM.from_pretrained."
    if name in _ARGUMENTS:
        return ""
    if name in _TRAINERS:
        return f"{_TRAINERS[name]}."
    return f"{name}." if name in _PLAIN else None


def _named(call: Call) -> bool:
    """Whether a data set's name can be read of it."""
    return isinstance(call.value("0") or call.value("path"), str)
