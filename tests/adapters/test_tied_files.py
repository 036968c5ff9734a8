"""Heads that are tied to their embedding, and vocabularies that have grown, as PEFT's folders have them: equal logits
here, and merged both ways a folder that transformers reads alike."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from adapters.test_file_names import shaken, truth
from merging.streams import loaded, streamed
from reference.families import logits, sequences, tiny_model
from reference.measure import relative
from reference.quantized_by_others import write_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, fill_from, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.merging.merge import merge
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import as_base, load_base
from topwork.ops.batch import batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.beginning import with_beginning

TENSORS = "adapter_model.safetensors"
HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
NAMES = {"gpt2": ("wte", "c_attn"), "llama": ("embed_tokens", "q_proj"), "gemma2": ("embed_tokens", "q_proj")}
TIED: dict[str, dict[str, Any]] = {
    "head lora": {"target_modules": ["Q", "lm_head"]},
    "embedding lora": {"target_modules": ["Q", "E"]},
    "lora of both": {"target_modules": ["Q", "E", "lm_head"]},
    "lora of both, kept together": {"target_modules": ["Q", "E", "lm_head"], "ensure_weight_tying": True},
    "embedding lora, kept together": {"target_modules": ["Q", "E"], "ensure_weight_tying": True},
    "lora by expression, kept together": {"target_modules": r"(.*\.)?(Q|E)", "ensure_weight_tying": True},
    "saved head": {"target_modules": ["Q"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["Q"], "modules_to_save": ["E"]},
    "saved both": {"target_modules": ["Q"], "modules_to_save": ["E", "lm_head"]},
    "saved both, kept together": {
        "target_modules": ["Q"], "modules_to_save": ["E", "lm_head"], "ensure_weight_tying": True,
    },
    "saved embedding, kept together": {"target_modules": ["Q"], "modules_to_save": ["E"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["Q"], "trainable_token_indices": [5, 9, 98]},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Could not find a config file")


def options(case: str, family: str) -> dict[str, Any]:
    embedding, linear = NAMES[family]

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("Q", linear).replace("E", embedding)
        return [named(one) for one in value] if isinstance(value, list) and isinstance(value[0], str) else value

    return {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **{k: named(v) for k, v in TIED[case].items()}}


def as_tiny(model: PreTrainedModel) -> Base:
    return as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]


def read(base: Base, folder: Path) -> Tensor:
    load_adapter(Adapters(base.module), "a", read_adapter(folder), BaseId("tiny"))
    return logits(base, batch_of(sequences(), "a"))


def assert_merged(model: PreTrainedModel, folder: Path, expected: Tensor, place: Path, tied: bool) -> None:
    """In memory and tensor by tensor; written, it reads alike, and is tied as it was where both were kept together."""
    base = as_tiny(model)
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(folder), BaseId("tiny"))
    merge(base, adapters, "a")
    assert relative(logits(base, batch_of(sequences())), expected) < 1e-5
    base.module.save_pretrained(place / "merged")
    model.save_pretrained(place / "base")
    for merged in (place / "merged", streamed(place / "base", read_adapter(folder), place / "streamed")):
        assert relative(truth(loaded(merged)), expected) < 1e-5
        assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] == tied


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("case", TIED)
def test_a_tied_base(case: str, family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=True)
    theirs = shaken(get_peft_model(copy.deepcopy(model), LoraConfig(**options(case, family))))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = truth(theirs)
    assert relative(read(as_tiny(model), tmp_path / "theirs"), expected) < 1e-5
    names = load_file(tmp_path / "theirs" / TENSORS)
    kept = "together" in case and any("lm_head" in key for key in names)  # to PEFT gpt2's wte alone is no embedding
    assert kept or "together" not in case or family == "gpt2"
    assert_merged(model, tmp_path / "theirs", expected, tmp_path, kept or case == "tokens")


@pytest.mark.parametrize("case", [case for case in TIED if "together" in case])
def test_what_was_tied_is_two_where_the_base_keeps_them_apart(case: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    theirs = shaken(get_peft_model(copy.deepcopy(model), LoraConfig(**options(case, "llama"))))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    kept = {key: tensor for key, tensor in tensors.items() if ".base_layer." not in key}
    save_file(kept, tmp_path / TENSORS)
    apart = tiny_model("llama", tie_word_embeddings=False)
    apart.load_state_dict(model.state_dict())
    assert relative(read(as_tiny(apart), tmp_path), truth(theirs)) < 1e-5


@pytest.mark.parametrize(
    ("case", "key", "told"),
    [
        ("saved both, kept together", None, ""),  # a head that the options do not name beside an embedding that they do
        ("embedding lora, kept together", f"{HEAD}.lora_A.weight", r"LoRA of lm_head that is not the one of .* turned"),
    ],
)
def test_a_head_that_is_not_the_embeddings(case: str, key: str | None, told: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    theirs = shaken(get_peft_model(copy.deepcopy(model), LoraConfig(**options(case, "llama"))))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    if key is not None:
        save_file({**tensors, key: tensors[key] + 1}, tmp_path / TENSORS)
        with pytest.raises(AdapterError, match=told):
            read(as_tiny(model), tmp_path)
        return
    head = {f"{HEAD}.weight": tensors[f"{HEAD}.weight"] + 0.1 * torch.randn(99, 64)}
    save_file({**tensors, **head}, tmp_path / TENSORS)
    assert relative(read(as_tiny(model), tmp_path), truth(theirs)) > 1e-3  # as the file has it: two


def test_both_ends_whole_and_unlike(tmp_path: Path) -> None:
    """As they stand in a file that no option names them in: one weight here."""
    model = tiny_model("llama", tie_word_embeddings=True)
    theirs = shaken(get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path)
    tensors, whole = load_file(tmp_path / TENSORS), torch.randn(99, 64)
    save_file({**tensors, f"{HEAD}.weight": whole, f"{EMBEDDING}.weight": whole + 1}, tmp_path / TENSORS)
    with pytest.raises(AdapterError, match=r"other values, and in this base they are one weight.*tie_word_embeddings"):
        read(as_tiny(model), tmp_path)
    found = []
    for keys in ((HEAD, EMBEDDING), (HEAD,), (EMBEDDING,)):  # PEFT sets the base's one weight
        save_file({**tensors, **{f"{key}.weight": whole.clone() for key in keys}}, tmp_path / TENSORS)
        found.append(read(as_tiny(model), tmp_path))
    assert relative(found[0], found[1]) == relative(found[0], found[2]) == 0
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight.data.copy_(whole)
    save_file(tensors, tmp_path / TENSORS)
    assert relative(found[0], read(as_tiny(other), tmp_path)) < 1e-5


GROWN: dict[str, dict[str, Any]] = {
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [99, 100, 101, 102, 103]},
    "embedding lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora of both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
    "neither trained": {},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", GROWN)
def test_a_grown_vocabulary(case: str, tied: bool, tmp_path: Path) -> None:
    """On the base that grew; on one whose new rows are others, where the file tells them; and on the small one, with
    both sizes."""
    small, grown = tiny_model("llama", tie_word_embeddings=tied), tiny_model("llama", tie_word_embeddings=tied)
    small.save_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(104, mean_resizing=False)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], **GROWN[case]})
    theirs = get_peft_model(copy.deepcopy(grown), config)
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    shaken(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = truth(theirs)
    assert relative(read(as_tiny(grown), tmp_path / "theirs"), expected) < 1e-5
    names = load_file(tmp_path / "theirs" / TENSORS)
    assert any("embed_tokens" in key for key in names)
    grown.get_input_embeddings().weight.data[99:] = 7.0
    if case != "embedding lora":  # beside which PEFT writes no head
        grown.get_output_embeddings().weight.data[99:] = 7.0
    assert relative(read(as_tiny(grown), tmp_path / "theirs"), expected) < 1e-5
    with pytest.raises(AdapterError, match=r"of a vocabulary of 104 \(.*\), and this base's has 99: tokens were added"):
        read(as_tiny(small), tmp_path / "theirs")


def test_a_vocabulary_that_shrank(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"vocabulary of 99 \(lm_head\.weight\), .* has 128: the base was grown or"):
        read(as_tiny(tiny_model("llama", vocab_size=128)), tmp_path)


def test_what_kept_together_is_written_as_two_for_peft(tmp_path: Path) -> None:
    """Options then name both, so that nothing is left to a flag."""
    model = tiny_model("llama", tie_word_embeddings=True)
    theirs = shaken(get_peft_model(copy.deepcopy(model), LoraConfig(**options("saved both, kept together", "llama"))))
    theirs.save_pretrained(tmp_path / "theirs")
    base = as_tiny(model)
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path / "theirs"), BaseId("tiny"))
    write_adapter(tmp_path / "ours", adapters, "a", BaseId("tiny"))
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert "lm_head" in config["modules_to_save"]
    assert relative(read(as_tiny(model), tmp_path / "ours"), truth(theirs)) < 1e-5


@pytest.mark.parametrize("case", [case for case in TIED if "together" in case and "expression" not in case])
def test_what_was_kept_together_can_be_trained_on(case: str, tmp_path: Path) -> None:
    """The recipe's options name the head too, without torch and without the base; then both are trained."""
    model = tiny_model("llama", tie_word_embeddings=True)
    theirs = shaken(get_peft_model(copy.deepcopy(model), LoraConfig(**options(case, "llama"))))
    theirs.save_pretrained(tmp_path / "theirs")
    values = {"adapter": {"init_from": str(tmp_path / "theirs")}, "output_dir": str(tmp_path / "run")}
    config = AdapterConfig(**with_beginning(values, tmp_path)["adapter"])
    base = as_tiny(model)
    adapters = Adapters(base.module)
    paths = adapters.add("a", config)
    assert {"lm_head", "model.embed_tokens"} <= set(paths)
    fill_from(read_adapter(tmp_path / "theirs"), adapters.parts("a"), adapters.bare())
    assert relative(logits(base, batch_of(sequences(), "a")), truth(theirs)) < 1e-5


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_tied_config_with_another_head_in_its_file(bits: str, tmp_path: Path) -> None:
    """As transformers reads it: the head is the file's, in few bits too."""
    folder = write_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    config = ModelConfig.model_validate({"model_name_or_path": str(folder), "dtype": "float32", "device": "cpu"})
    base = load_base(config, lambda _: None, QuantizationConfig.model_validate({bits: True}))
    assert torch.equal(base.module.get_output_embeddings().weight, head)
    assert torch.equal(base.module.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
