"""What an adapter_config.json means: PEFT's meaning, or a refusal; never another scale without a word."""

import json
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.toy import WITH_TOY, ToyConfig
from reference.families import alone, logits, randomise, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PEFT_VERSION
from topwork.adapters.graft import Adapters
from topwork.adapters.methods.places import MLP_LAST
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.adapters.peft_keys import KEYS
from topwork.adapters.peft_options import config_in
from topwork.adapters.peft_targets import IA3, LORA
from topwork.adapters.sizes import trained_sizes
from topwork.common.errors import AdapterError, RunError
from topwork.models.structures.table import FAMILIES
from topwork.ops.batch import batch_of

HERE = BaseId("owner/base", "sha256:one")
QV: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
SETTINGS: dict[str, type[Any]] = {
    "LORA": LoraConfig, "IA3": IA3Config, "PREFIX_TUNING": PrefixTuningConfig, "PROMPT_TUNING": PromptTuningConfig
}  # fmt: skip


def by_peft(folder: Path, family: str = "llama", kind: type[Any] = LoraConfig, **values: Any) -> Path:
    """A folder that PEFT wrote, with random weights."""
    model = get_peft_model(tiny_model(family), kind(task_type="CAUSAL_LM", **values))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    model.save_pretrained(folder)
    return folder


def edited(folder: Path, left_out: tuple[str, ...] = (), **values: Any) -> Path:
    path = folder / "adapter_config.json"
    said = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in said.items() if key not in left_out}))
    return folder


def theirs(folder: Path, family: str = "llama") -> Tensor:
    """What PEFT makes of a folder."""
    with torch.no_grad():
        return alone(PeftModel.from_pretrained(tiny_model(family), folder).eval(), sequences())


def ours(folder: Path, family: str = "llama") -> tuple[Tensor, str | None]:
    """What is made of it here, and what is said of that."""
    base = tiny_base(family)
    said = load_adapter(Adapters(base.module), "a", read_adapter(folder), HERE)
    return logits(base, batch_of(sequences(), "a")), said


def equal(folder: Path, told: str | None = None, family: str = "llama") -> None:
    """Here as in PEFT, with a note that has `told` in it, or without any."""
    found, said = ours(folder, family)
    assert relative(found, theirs(folder, family)) < 1e-5
    assert relative(found, logits(tiny_base(family), batch_of(sequences()))) > 1e-3
    assert said is None if told is None else said is not None and told in said


def refused(folder: Path) -> str:
    with pytest.raises(AdapterError) as error:
        ours(folder)
    return str(error.value)


IDLE: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": (
        {"target_modules": ["q_proj", "v_proj", "c_attn", "query_key_value"]},
        "target_modules names 'c_attn', 'query_key_value', which match nothing",
    ),
    "exclude_modules": (
        {"exclude_modules": ["lm_head", "vision_tower", "o_proj"]}, "exclude_modules names 'vision_tower', which"
    ),
    "an expression that excludes nothing": ({"exclude_modules": "q_proj"}, "exclude_modules names 'q_proj', which"),
    "a module that holds others": ({"exclude_modules": ["self_attn"]}, "exclude_modules names 'self_attn', which"),
    "modules_to_save": ({"modules_to_save": ["norm", "classifier"]}, "modules_to_save names 'classifier', which"),
    "layers_to_transform": ({"layers_to_transform": [1, 7]}, "layers_to_transform names 7, which matches nothing"),
    "rank_pattern": ({"rank_pattern": {"fc_in": 2, "q_proj": 2}}, "rank_pattern names 'fc_in', which"),
    "alpha_pattern": ({"alpha_pattern": {"^q_proj": 100}}, "alpha_pattern names '^q_proj', which"),
}  # fmt: skip
"""What PEFT passes over, and what is said of it here (huggingface/trl#6773, peft#3582)."""


@pytest.mark.parametrize("name", IDLE)
def test_what_matches_nothing_is_a_note_when_it_is_read(name: str, tmp_path: Path) -> None:
    values, told = IDLE[name]
    equal(by_peft(tmp_path / "theirs", **QV | values), told)
    base = tiny_base()
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", read_adapter(tmp_path / "theirs"), HERE)
    write_adapter(tmp_path / "ours", adapters, "a", HERE)
    equal(tmp_path / "ours")  # and nothing of it is written again


@pytest.mark.parametrize("name", IDLE)
def test_and_an_error_when_it_is_asked_for(name: str) -> None:
    values, told = IDLE[name]
    with pytest.raises(AdapterError, match=told.partition(" ")[0]):
        Adapters(tiny_base().module).add("a", AdapterConfig(**QV | values))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"exclude_modules": ["o_projj"]}, "exclude_modules names 'o_projj', which matches no module; did you mean"),
        ({"exclude_modules": "o_proj"}, r"exclude_modules names 'o_proj'.* are given in a list: \[o_proj\]"),
        ({"exclude_modules": ["mlp"]}, r"'mlp', which is no layer itself, and model.layers.0.mlp.gate_proj in it"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform names 7, where no module is chosen; there are 0 to 1"),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "left none of them"),
        ({"layers_pattern": "layers"}, "layers_pattern 'layers' says where .* layers_to_transform"),
        ({"method": "full", "exclude_modules": ["mlpp"]}, "exclude_modules names 'mlpp', which matches no module"),
    ],
)
def test_names_in_a_fresh_config_that_match_nothing(values: dict[str, Any], told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        Adapters(tiny_base().module).add("a", AdapterConfig(**values))


def test_a_name_alone_is_a_list_of_one(tmp_path: Path) -> None:
    base = tiny_base()
    adapters = Adapters(base.module)
    paths = adapters.add("a", AdapterConfig(**QV | {"target_modules": "q_proj"}))
    assert paths == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    randomise(adapters, "a")
    write_adapter(tmp_path, adapters, "a", HERE)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    equal(tmp_path)
    whole = Adapters(tiny_base().module).add("b", AdapterConfig(target_modules="lm_head", layers_to_transform=None))
    assert whole == ["lm_head"], "which is a path as well"


OVERLAPPING: dict[str, dict[str, Any]] = {
    "alpha, general key first": {"alpha_pattern": {"q_proj": 3, "layers.0.self_attn.q_proj": 50}},
    "alpha, special key first": {"alpha_pattern": {"layers.0.self_attn.q_proj": 50, "q_proj": 3}},
    "rank, general key first": {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 6}},
    "an expression last": {"alpha_pattern": {"self_attn.q_proj": 3, r".*layers\.0\..*": 50}},
    "an expression first": {"alpha_pattern": {r".*layers\.0\..*": 50, "self_attn.q_proj": 3}},
    "three of both": {
        "rank_pattern": {"v_proj": 3, "q_proj": 2, r".*\.1\..*": 6},
        "alpha_pattern": {r"z|.*\.1\..*": 7, "v_proj": 5, "self_attn.v_proj": 30, "q_proj": 9},
    },
    "rsLoRA": {"use_rslora": True, "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.v_proj": 50}},
    "DoRA": {"use_dora": True, "rank_pattern": {"v_proj": 3, "layers.0.self_attn.v_proj": 5}},
    "PiSSA": {"init_lora_weights": "pissa", "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.v_proj": 50}},
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_the_first_key_that_matches_is_what_is_written(name: str, tmp_path: Path) -> None:
    """Trained here, written, and read by both; sorted keys have to mean the same, for PEFT sorts them when it saves."""
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**QV | OVERLAPPING[name]), seed=3)
    randomise(adapters, "a")
    own = logits(base, batch_of(sequences(), "a"))
    write_adapter(tmp_path, adapters, "a", HERE)
    equal(tmp_path)
    assert relative(ours(tmp_path)[0], own) < (1e-5 if "init_lora_weights" in OVERLAPPING[name] else 1e-12)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        edited(tmp_path, **{field: dict(reversed(said[field].items()))})
    assert relative(theirs(tmp_path), own) < 1e-5


def test_patterns_that_do_not_overlap_are_written_as_they_are(tmp_path: Path) -> None:
    pattern = {"v_proj": 9, "q_proj": 2}
    adapters = Adapters(tiny_base().module)
    adapters.add("a", AdapterConfig(**QV, rank_pattern=pattern, alpha_pattern=pattern))
    write_adapter(tmp_path, adapters, "a", HERE)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["rank_pattern"] == said["alpha_pattern"] == pattern


def test_of_a_file_the_order_that_it_has_counts_and_is_told(tmp_path: Path) -> None:
    """PEFT sorts what it saves: what such an adapter was trained with is lost, and both read the file alike."""
    by_peft(tmp_path, **QV, alpha_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 50})
    equal(
        tmp_path, "alpha_pattern: 'layers.0.self_attn.q_proj' and 'q_proj' both match model.layers.0.self_attn.q_proj"
    )


EQUAL: dict[str, tuple[dict[str, Any], tuple[str, ...], str | None]] = {
    "lora_alpha left out": ({}, ("lora_alpha",), "does not say lora_alpha; PEFT's own defaults count, lora_alpha: 8"),
    "r left out": ({}, ("r",), "does not say r; PEFT's own defaults count, r: 8"),
    "both left out": ({}, ("r", "lora_alpha"), "does not say r or lora_alpha"),
    "target_modules null": ({"target_modules": None}, (), None),
    "target_modules left out": ({}, ("target_modules",), None),
    "no dropout left": ({"lora_dropout": 1.0}, (), "lora_dropout is 1"),
    "transposed, it says": ({"fan_in_fan_out": True}, (), None),
    "of 2023": ({"enable_lora": None, "merge_weights": False}, (), None),
    "of ms-swift": ({"lora_dtype": None, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}, (), None),
    "its base left out": ({}, ("base_model_name_or_path",), "whether that is 'owner/base' cannot be told"),
    "of classes": ({"task_type": "SEQ_CLS"}, (), "task_type is 'SEQ_CLS'; it is read as a causal"),
    "begun otherwise": ({"init_lora_weights": False}, (), None),
    "keys of no meaning": ({"new_list": [], "new_map": {}, "new_flag": False, "new": None, "new_text": ""}, (), None),
}
"""Changes to a folder of r 8 and lora_alpha 8, which are PEFT's defaults (volcengine/verl#4770)."""


@pytest.mark.filterwarnings("ignore:Unexpected keyword", "ignore:fan_in_fan_out", "ignore:The configuration file")
@pytest.mark.parametrize("name", EQUAL)
def test_a_config_that_says_less_means_what_it_means_to_peft(name: str, tmp_path: Path) -> None:
    values, left_out, told = EQUAL[name]
    by_peft(tmp_path, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    equal(edited(tmp_path, left_out, **values), told)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout", "bias", "rank_pattern", "alpha_pattern"])
def test_null_is_left_out(field: str, tmp_path: Path) -> None:
    """PEFT stops at most of these."""
    by_peft(tmp_path, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    expected = theirs(tmp_path)
    assert relative(ours(edited(tmp_path, **{field: None}))[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lora_alpha": 0}, "lora_alpha is 0, and the update is scaled by lora_alpha / r"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 0}, "does not describe a LORA adapter: r is 0"),
        ({"rank_pattern": {"q_proj": 0}}, "does not describe a LORA adapter: rank_pattern.q_proj is 0"),
        ({"peft_type": None}, "peft_type None"),
        ({"peft_type": "lora"}, "peft_type lora; .*LORA"),
        ({"new_scale": 2.0}, r"sets 'new_scale' to 2.0, which is not known here \(PEFT '0.21.2' wrote it\)"),
        ({"new_number": 0}, "sets 'new_number' to 0"),
        ({"new_flag": True, "newer": ["x"]}, r"sets 'new_flag' to True, 'newer' to \['x'\], which is not known"),
        ({"enable_lora": [True, False, True]}, "sets 'enable_lora' to"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication=.* which cannot be read"),
        ({"kasa_config": {"beta": 1e-4}}, "uses kasa_config=.*, which cannot be read"),
        ({"alora_invocation_tokens": [3]}, r"uses alora_invocation_tokens=\[3\], which"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    values: dict[str, Any], told: str, tmp_path: Path
) -> None:  # fmt: skip
    by_peft(tmp_path, r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    edited(tmp_path, **values)
    with pytest.raises(AdapterError, match=told):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match=told):  # a recipe that begins there
        config_in(json.loads((tmp_path / "adapter_config.json").read_text()), "there")


RANKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "r twice as large, one pattern kept": ({"r": 8}, 8, 4),
    "the pattern is lost": ({"rank_pattern": {}}, 4, 8),
    "r twice as large, the pattern lost": ({"r": 8, "rank_pattern": {}}, 8, 4),
    "the pattern is twice as large": ({"rank_pattern": {"q_proj": 16}}, 16, 8),
    "r three times as large": ({"r": 12}, 12, 4),
    "r half": ({"r": 2}, 2, 4),
    "r a hundred thousand times": ({"r": 400_000}, 400_000, 4),
}


@pytest.mark.parametrize("name", RANKS)
def test_another_rank_than_the_tensors_is_told_with_both(name: str, tmp_path: Path) -> None:
    by_peft(tmp_path, **QV, rank_pattern={"q_proj": 8})
    values, said, there = RANKS[name]
    told = refused(edited(tmp_path, **values))
    assert f"the rank {said} (" in told
    assert f"have rank {there}" in told
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs(tmp_path)


def test_an_embeddings_rank_and_tensors_that_are_none(tmp_path: Path) -> None:
    by_peft(tmp_path, **QV | {"target_modules": ["q_proj", "embed_tokens"]})
    assert "gives model.embed_tokens the rank 8 (rank_pattern)" in refused(
        edited(tmp_path, rank_pattern={"embed_tokens": 8})
    )
    edited(tmp_path, rank_pattern={})
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.new_empty(0) for key, tensor in load_file(file).items()}, file)
    assert refused(tmp_path)


def test_only_what_began_from_the_base_is_given_its_beginning(tmp_path: Path) -> None:
    """PiSSA's own folders of PEFT still are; an ordinary one whose config says twice the rank is not."""
    by_peft(tmp_path, **QV, init_lora_weights="pissa")
    read = read_adapter(tmp_path)
    assert ours(tmp_path)[0].isfinite().all()
    assert read.config.init_lora_weights == "pissa"
    told = refused(edited(tmp_path, init_lora_weights=True, r=8))
    assert "the rank 8 (r)" in told


def test_each_key_of_pefts_is_classified() -> None:
    """Whoever raises PEFT_VERSION decides about the keys that have come."""
    assert peft.__version__ == PEFT_VERSION
    for name, kind in SETTINGS.items():
        theirs = {field.name: field for field in fields(kind)}
        assert theirs.keys() == KEYS[name].keys(), name
        for key, field in theirs.items():
            default = field.default if field.default_factory is MISSING else field.default_factory()
            ours = KEYS[name][key].default
            if key in ("num_transformer_submodules", "runtime_config"):
                continue  # one is what decoders have; the other is never written
            assert ours == getattr(default, "value", default), (name, key)


@pytest.mark.parametrize(("mine", "method"), [(LORA, "LORA"), (IA3, "IA3")])
def test_targets_by_family_are_pefts(mine: dict[str, Any], method: str) -> None:
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
    assert {family: table[family] for family in mine} == dict(mine)
    assert table.keys() & set(FAMILIES) <= mine.keys()


def test_ia3s_feedforward_modules_by_family_are_pefts() -> None:
    """Which are found by their names, in every family that PEFT knows."""
    table = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for family, names in IA3.items():
        last = [name for name in names if any(f".mlp.{name}".endswith(f".{one}") for one in MLP_LAST)]
        assert last == table[family], family


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "phi"])
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_modules_that_no_config_names_are_pefts(family: str, kind: type[Any], tmp_path: Path) -> None:
    rank = {"r": 8, "lora_alpha": 8} if kind is LoraConfig else {}
    transposed = {"fan_in_fan_out": family == "gpt2"}
    by_peft(tmp_path, family, kind, **rank, **transposed)  # target_modules: None
    edited(tmp_path, target_modules=None, **({"feedforward_modules": None} if kind is IA3Config else {}))
    equal(tmp_path, family=family)


def test_in_a_family_that_peft_does_not_know_the_tensors_tell(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="PEFT has no modules of its own for method lora in a smollm3; name them"):
        Adapters(tiny_base("smollm3").module).add("a", AdapterConfig(target_modules="peft"))
    by_peft(tmp_path, "smollm3", **QV)
    edited(tmp_path, target_modules=None)
    found, said = ours(tmp_path, "smollm3")
    assert said is not None
    assert "PEFT has none of its own for a smollm3; the file's tensors tell" in said
    assert relative(found, theirs(edited(tmp_path, target_modules=["q_proj", "v_proj"]), "smollm3")) < 1e-5


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_that_are_not_counted(kind: type[Any], tmp_path: Path) -> None:
    """PEFT has no default for their number."""
    by_peft(tmp_path, kind=kind, num_virtual_tokens=3)
    edited(tmp_path, num_virtual_tokens=None)
    with pytest.raises(AdapterError, match="does not say num_virtual_tokens, for which PEFT has no default"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="uses num_transformer_submodules=2, which cannot be read"):
        read_adapter(edited(tmp_path, num_virtual_tokens=3, num_transformer_submodules=2))


def test_a_recipe_may_begin_from_what_names_more_than_there_is() -> None:
    """Its options were read, not asked for; PEFT's own modules by family are among them."""
    raw = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "c_attn"], "rank_pattern": {"fc_in": 2}}
    read = config_in(raw, "there")
    with pytest.raises(AdapterError, match="'c_attn', which matches no module"):
        trained_sizes(_seen(), read)
    begun = read.model_copy(update={"init_from": "there"})
    assert trained_sizes(_seen(), begun).keys() == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    adapters = Adapters(tiny_base().module)
    adapters.add("a", begun)
    assert adapters.configs["a"].target_modules == ["q_proj"]
    default = config_in({"peft_type": "LORA"}, "there").model_copy(update={"init_from": "there"})
    assert {path.rpartition(".")[2] for path in trained_sizes(_seen(), default)} == {"q_proj", "v_proj"}


def _seen() -> Any:
    return Adapters(tiny_base().module).bare().seen


def lost_scale(adapters: Adapters) -> None:
    next(iter(adapters.parts("a").values())).scaling *= 2


def lost_pattern(adapters: Adapters) -> None:
    adapters.configs["a"] = adapters.configs["a"].model_copy(update={"alpha_pattern": {}})


def lost_module(adapters: Adapters) -> None:
    adapters.configs["a"] = adapters.configs["a"].model_copy(update={"target_modules": ["v_proj"]})


@pytest.mark.parametrize("spoil", [lost_scale, lost_pattern, lost_module])
def test_what_was_written_is_read_again(spoil: Callable[[Adapters], None], tmp_path: Path) -> None:
    adapters = Adapters(tiny_base().module)
    adapters.add("a", AdapterConfig(**QV, alpha_pattern={"q_proj": 3}))
    spoil(adapters)
    with pytest.raises(RunError, match="what was written of the adapter is not what was trained: its config"):
        write_adapter(tmp_path, adapters, "a", HERE)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_tensors_that_land_otherwise_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from topwork.adapters import peft_format

    adapters = Adapters(tiny_base().module)
    adapters.add("a", AdapterConfig(**QV))
    write = peft_format.save_file

    def torn(tensors: dict[str, Tensor], file: Path, **more: Any) -> None:
        key = max(tensors)
        write({**tensors, key: tensors[key] + 1}, file, **more)

    monkeypatch.setattr(peft_format, "save_file", torn)
    with pytest.raises(RunError, match=r"adapter_model.* has another base_model.model.*lora_B.weight"):
        write_adapter(tmp_path, adapters, "a", HERE)

    def short(tensors: dict[str, Tensor], file: Path, **more: Any) -> None:
        write(dict([*tensors.items()][1:]), file, **more)

    monkeypatch.setattr(peft_format, "save_file", short)
    with pytest.raises(RunError, match="has another"):
        write_adapter(tmp_path, adapters, "a", HERE)
    monkeypatch.undo()
    next(iter(adapters.parameters("a").values())).data[0, 0] = float("nan")  # a run that diverged is kept as it is
    write_adapter(tmp_path, adapters, "a", HERE)


def test_a_method_of_ones_own_is_read_again_too(tmp_path: Path) -> None:
    adapters = Adapters(tiny_base().module, methods=WITH_TOY)
    adapters.add("a", ToyConfig(target_modules=["q_proj"], strength=0.5))
    write_adapter(tmp_path, adapters, "a", HERE)
    shutil.rmtree(tmp_path)
    monkey = WITH_TOY["toy"].files.keys
    adapters.methods = {**WITH_TOY, "toy": _said_otherwise(monkey)}
    with pytest.raises(RunError, match="its options are read as"):
        write_adapter(tmp_path, adapters, "a", HERE)


def _said_otherwise(keys: Callable[[Any], dict[str, Any]]) -> Any:
    from dataclasses import replace

    toy = WITH_TOY["toy"]
    return replace(toy, files=replace(toy.files, keys=lambda adapter: {**keys(adapter), "strength": 2.0}))
