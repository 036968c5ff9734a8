"""PEFT folders: ours in PEFT, PEFT's here, the same bytes each time, and never onto another base unnoticed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from reference.families import alone, logits, randomise, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, SavedAdapter, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.models.base import Base
from topwork.models.load import as_base
from topwork.ops.batch import batch_of

HERE = BaseId("owner/base", "sha256:one")
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "names and exclusions": ("llama", {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["0.mlp.up_proj"]}),
    "all but a regular expression": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}),
    "a regular expression": ("llama", {"target_modules": r".*\.1\..*_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"q_proj": 3, "down_proj": 20},
        },
    ),
    "rsLoRA": ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    "a saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "an adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "saved embeddings": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "a saved block": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "transposed layers (gpt2)": ("gpt2", {"target_modules": "all-linear"}),
    "gaussian": ("qwen2", {"target_modules": "all-linear", "init_lora_weights": "gaussian"}),
    "fused projections (phi3)": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "soft-capped (gemma2)": ("gemma2", {"target_modules": "all-linear", "lora_dropout": 0.4}),
}
OURS_ALONE = {
    "all-linear in layers": ("llama", {"target_modules": "all-linear", "layers_to_transform": [1]}),
    "a regular expression in layers": ("llama", {"target_modules": r".*_proj", "layers_to_transform": 0}),
}
"""PEFT refuses these to its own users; what Topwork writes for them, it reads."""


def ours(base: Base, name: str | None = None) -> Tensor:
    with torch.no_grad():
        return base.logits(batch_of(sequences(), name), torch.arange(45))


def theirs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return alone(model.eval(), sequences())


def written(folder: Path, base: Base, seed: int = 0, **values: Any) -> Adapters:
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**{"r": 4, "lora_alpha": 8, **values}), seed)
    randomise(adapters, "a", seed)
    write_adapter(folder, adapters, "a", HERE)
    return adapters


def by_peft(folder: Path, family: str, base_name: str | None = "owner/base", **values: Any) -> PreTrainedModel:
    """A folder written by PEFT, from an adapter with random weights."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **values})
    config.fan_in_fan_out = family == "gpt2"
    model = get_peft_model(tiny_model(family), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", [*ADAPTERS, *OURS_ALONE])
def test_our_folder_in_peft(name: str, tmp_path: Path) -> None:
    family, values = {**ADAPTERS, **OURS_ALONE}[name]
    base = tiny_base(family)
    bare = ours(base)
    written(tmp_path, base, **values)
    found = theirs(PeftModel.from_pretrained(tiny_model(family), tmp_path))
    assert relative(found, ours(base, "a")) < 1e-5
    assert relative(found, bare) > 1e-3


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Could not find a config file")
@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_folder_here(name: str, tmp_path: Path) -> None:
    family, values = ADAPTERS[name]
    truth = theirs(by_peft(tmp_path, family, **values))
    base = tiny_base(family)
    bare = ours(base)
    saved = read_adapter(tmp_path)
    assert saved.base == BaseId("owner/base", None)
    assert load_adapter(Adapters(base.module), "theirs", saved, HERE) is None
    assert relative(ours(base, "theirs"), truth) < 1e-5
    assert relative(truth, bare) > 1e-3


@pytest.mark.parametrize("name", [*ADAPTERS, *OURS_ALONE])
def test_saved_and_loaded_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    family, values = {**ADAPTERS, **OURS_ALONE}[name]
    base = tiny_base(family)
    written(tmp_path / "first", base, **values)
    other = tiny_base(family)
    adapters = Adapters(other.module)
    assert load_adapter(adapters, "a", read_adapter(tmp_path / "first"), HERE) is None
    assert torch.equal(ours(other, "a"), ours(base, "a"))
    write_adapter(tmp_path / "second", adapters, "a", HERE)
    assert (
        contents(tmp_path / "second")["adapter_model.safetensors"]
        == (contents(tmp_path / "first")["adapter_model.safetensors"])
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order in which names were given."""
    values = {"modules_to_save": ["norm", "lm_head"], "target_modules": ["v_proj", "q_proj"]}
    turned = {key: value[::-1] for key, value in values.items()}
    for folder, given in (("one", values), ("two", values), ("three", turned)):
        written(tmp_path / folder, tiny_base(), **given)
    first = contents(tmp_path / "one")
    assert first.keys() == {"adapter_config.json", "adapter_model.safetensors", "topwork.json"}
    assert contents(tmp_path / "two") == first
    assert contents(tmp_path / "three") == first
    written(tmp_path / "four", tiny_base(), seed=1, **values)
    assert contents(tmp_path / "four") != first
    config = json.loads(first["adapter_config.json"])
    assert list(config) == sorted(config)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "owner/base"


def test_tensors_are_fp32_whatever_the_base_is(tmp_path: Path) -> None:
    written(tmp_path, tiny_base(dtype=torch.bfloat16), modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert "base_model.model.lm_head.weight" in tensors


def test_names_say_all_linear_where_they_can(tmp_path: Path) -> None:
    written(tmp_path / "names", tiny_base())
    names = json.loads((tmp_path / "names" / "adapter_config.json").read_text())["target_modules"]
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    written(tmp_path / "paths", tiny_base(), layers_to_transform=[1])
    config = json.loads((tmp_path / "paths" / "adapter_config.json").read_text())
    assert all(path.startswith("model.layers.1.") for path in config["target_modules"])
    assert config["layers_to_transform"] is None


@pytest.mark.parametrize(
    ("theirs", "mine", "told"),
    [
        (BaseId("a/one", "sha256:1"), BaseId("a/two", "sha256:2"), "their weights differ"),
        (BaseId("a/one", "sha256:1"), BaseId("a/one", "sha256:2"), "their weights differ"),
        (BaseId("a/one", None), BaseId("a/two", "sha256:2"), "their names differ"),
    ],
)
def test_another_base_is_refused_with_both_names(theirs: BaseId, mine: BaseId, told: str) -> None:
    adapters, saved = in_memory(theirs)
    with pytest.raises(AdapterError) as error:
        load_adapter(adapters, "a", saved, mine)
    for part in (f"trained on {theirs.name!r}", f"this base is {mine.name!r}", told, "--force"):
        assert part in str(error.value)
    assert not adapters.configs
    warning = load_adapter(adapters, "a", saved, mine, force=True)
    assert warning is not None
    assert warning.endswith("loaded all the same, as you asked")
    assert set(adapters.configs) == {"a"}


def in_memory(base: BaseId) -> tuple[Adapters, SavedAdapter]:
    source = Adapters(tiny_base().module)
    source.add("a", AdapterConfig(r=2))
    tensors = {key: parameter.detach().clone() for key, parameter in source.parameters("a").items()}
    return Adapters(tiny_base().module), SavedAdapter(AdapterConfig(r=2), tensors, base, Path("there"))


@pytest.mark.parametrize("name", ["/home/somebody/model", "./model", "model", "", None])
def test_a_base_known_by_path_alone_is_warned_of(name: str | None) -> None:
    adapters, saved = in_memory(BaseId(name, None))
    warning = load_adapter(adapters, "a", saved, HERE)
    assert warning == f"there names the base {name!r}; whether that is 'owner/base' cannot be told from it"
    assert set(adapters.configs) == {"a"}


def test_the_same_weights_under_another_name_are_the_same_base() -> None:
    adapters, saved = in_memory(BaseId("/somewhere/else", HERE.fingerprint))
    assert load_adapter(adapters, "a", saved, HERE) is None


def test_a_folder_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    written(tmp_path, tiny_base())
    base = tiny_base(hidden_size=32)
    before = [name for name, _ in base.module.named_modules()]
    adapters = Adapters(base.module)
    with pytest.raises(AdapterError, match=r"another shape .* Is it another base's?"):
        load_adapter(adapters, "a", read_adapter(tmp_path), HERE)
    assert [name for name, _ in base.module.named_modules()] == before
    assert not adapters.configs


def test_a_loaded_adapter_is_silent_about_dropout(tmp_path: Path) -> None:
    written(tmp_path, tiny_base(), lora_dropout=0.5)
    base = tiny_base()
    load_adapter(Adapters(base.module), "a", read_adapter(tmp_path), HERE)
    assert torch.equal(ours(base, "a"), ours(base, "a"))


def edited(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"peft_type": "PSOFT"}, "holds an adapter of peft_type PSOFT; ADALORA, .*IA3, .*LORA"),
        ({"topwork_method": "other"}, "holds an adapter of method 'other'"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"r": "many"}, "does not describe a LORA adapter"),
    ],
)
def test_what_cannot_be_read_is_named(values: dict[str, Any], told: str, tmp_path: Path) -> None:
    written(tmp_path, tiny_base())
    with pytest.raises(AdapterError, match=told):
        read_adapter(edited(tmp_path, **values))


def test_how_the_weights_began_does_not_matter_where_the_base_is_as_it_was(tmp_path: Path) -> None:
    written(tmp_path, tiny_base())
    assert read_adapter(edited(tmp_path, init_lora_weights="orthogonal")).config.init_lora_weights is True


@pytest.mark.parametrize("init", ["pissa_niter_16", "loftq", "corda", "lora_ga"])
def test_beginnings_that_change_the_base_are_refused(init: str, tmp_path: Path) -> None:
    written(tmp_path, tiny_base())
    with pytest.raises(AdapterError, match=f"init_lora_weights: {init}.*path_initial_model_for_weight_conversion"):
        read_adapter(edited(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_folders_of_a_base_that_lacks_a_part(init: str, tmp_path: Path) -> None:
    """PEFT takes B0 A0 out of the base and writes A and B alone."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    torch.manual_seed(0)
    theirs = get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    base, tokens = tiny_base(), sequences()[:1]
    adapters = Adapters(base.module)
    bare = logits(base, batch_of(tokens))
    load_adapter(adapters, "a", read_adapter(tmp_path), HERE)
    with torch.no_grad():
        expected = theirs(tokens[0][None]).logits[0]
    assert relative(logits(base, batch_of(tokens, "a")), expected) < 1e-5
    assert relative(bare, expected) > 1e-3
    write_adapter(tmp_path / "again", adapters, "a", HERE)  # of rank 2 r by now, and for any base
    again = Adapters(tiny_base().module)
    load_adapter(again, "a", read_adapter(tmp_path / "again"), HERE)


def test_a_base_copy_that_differs_is_not_dropped(tmp_path: Path) -> None:
    """PEFT sets the base's own to it. DoRA's lengths are of another weight then, which is refused."""
    base = tiny_base()
    written(tmp_path, base, target_modules=["q_proj", "lm_head"])
    expected, path = ours(base, "a"), tmp_path / "adapter_model.safetensors"
    tensors, head = load_file(path), tiny_model("llama").lm_head.weight.detach().clone()
    for copied, fits in ((head, True), (head + 0.1, False)):
        save_file({**tensors, "base_model.model.lm_head.base_layer.weight": copied}, path, {"format": "pt"})
        other = tiny_base()
        load_adapter(Adapters(other.module), "a", read_adapter(tmp_path), HERE)
        assert (relative(ours(other, "a"), expected) < 1e-5) == fits
        truth = theirs(PeftModel.from_pretrained(tiny_model("llama"), tmp_path))
        assert relative(ours(other, "a"), truth) < 1e-5
    lengths = {f"base_model.model.{key}.lora_magnitude_vector": torch.ones(n) for key, n in lengths_of(tensors).items()}
    more = {"base_model.model.lm_head.base_layer.weight": head + 1, **lengths}
    save_file({**tensors, **more}, path, {"format": "pt"})
    edited(tmp_path, use_dora=True)
    with pytest.raises(AdapterError, match=r"holds lm_head\.base_layer\.weight, the base's own, with other"):
        load_adapter(Adapters(tiny_base().module), "a", read_adapter(tmp_path), HERE)


def lengths_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    ending = ".lora_B.weight"
    found = {key.removesuffix(ending): len(b) for key, b in tensors.items() if key.endswith(ending)}
    return {key.removeprefix("base_model.model."): rows for key, rows in found.items()}


def test_folders_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter folder at .*nowhere"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"adapter_config.json cannot be read"):
        read_adapter(tmp_path)
    written(tmp_path, tiny_base())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match=r"no readable adapter_model\.safetensors .*: bring back a copy of it"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no readable adapter_model\.safetensors .*it has no adapter_model"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="holds no JSON object"):
        read_adapter(tmp_path)


def test_what_a_config_leaves_out_is_what_peft_takes(tmp_path: Path) -> None:
    by_peft(tmp_path, "llama", r=4, lora_alpha=12)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    del config["r"], config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    found, expected = read_adapter(tmp_path).config.model_dump(), LoraConfig()
    assert (found["r"], found["lora_alpha"]) == (expected.r, expected.lora_alpha)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Could not find a config file")
def test_a_grown_vocabulary_as_peft_saves_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    base = as_base(copy.deepcopy(model), None, "tiny", lambda _: None)  # type: ignore[arg-type]
    whole = ["lm_head", "embed_tokens"]
    learned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole))
    with torch.no_grad():
        for parameter in learned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    learned.save_pretrained(tmp_path, save_embedding_layers=True)
    names = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "lm_head" in key}
    assert len(names) == 3  # the head, and again as modules_to_save and original_module
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path), BaseId("tiny"))
    assert relative(ours(base, "a"), theirs(learned)) < 1e-5
