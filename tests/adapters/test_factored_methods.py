"""VeRA, LoHa, LoKr and OFT beside PEFT's: our folder there, PEFT's here, keys, counts, beginnings, the same steps."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from safetensors.torch import load_file

from adapters.test_sizes import by_peft, tiny_skeleton, tiny_structure
from reference.families import alone, logits, randomise, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.lowrank import low_rank_updates
from topwork.adapters.methods.factored_places import oft_blocks, two_factors
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.adapters.sizes import trained_sizes
from topwork.common.errors import AdapterError
from topwork.ops.batch import batch_of
from training.test_peft_parity import compare_twenty

pytestmark = pytest.mark.slow

HERE = BaseId("owner/base", "sha256:one")
KINDS: dict[str, type[PeftConfig]] = {"vera": VeraConfig, "loha": LoHaConfig, "lokr": LoKrConfig, "oft": OFTConfig}
ATTENTION = ["q_proj", "v_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("llama", {"method": "vera", "r": 6}),
    "vera over biases, another seed": ("qwen2", {"method": "vera", "r": 6, "projection_prng_key": 9, "d_initial": 0.5}),
    "vera drawn again, transposed": ("gpt2", {"method": "vera", "r": 6, "save_projection": False}),
    "vera and a saved head": ("llama", {"method": "vera", "r": 6, "modules_to_save": ["lm_head"]}),
    "loha": ("llama", {"method": "loha", "r": 3, "alpha": 6}),
    "loha of a high rank": ("opt", {"method": "loha", "r": 8}),
    "loha in one layer": ("llama", {"method": "loha", "r": 3, "target_modules": ATTENTION, "layers_to_transform": 1}),
    "lokr": ("llama", {"method": "lokr", "r": 2, "alpha": 4}),
    "lokr of whole matrices": ("qwen2", {"method": "lokr", "r": 8, "decompose_factor": 4}),
    "lokr of two products": (
        "llama", {"method": "lokr", "r": 1, "decompose_both": True, "exclude_modules": ["k_proj"]}
    ),
    "oft": ("llama", {"method": "oft"}),
    "oft by number, with an inverse": ("qwen2", {"method": "oft", "r": 4, "use_cayley_neumann": False}),
    "oft of three terms": ("opt", {"method": "oft", "oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft, near and shared": ("llama", {"method": "oft", "r": 8, "block_share": True, "coft": True, "eps": 0.2}),
}  # fmt: skip
TWENTY = ("vera", "loha", "lokr", "oft")


def peft_config(values: dict[str, Any], family: str = "llama") -> PeftConfig:
    asked = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **values}
    kind = asked.pop("method")
    if kind == "oft" and "r" in asked:
        asked["oft_block_size"] = 0
    if kind == "vera":
        asked["fan_in_fan_out"] = family == "gpt2"
    return KINDS[kind](**asked)


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", ADAPTERS)
def test_our_folder_in_peft(name: str, tmp_path: Path) -> None:
    family, values = ADAPTERS[name]
    base = tiny_base(family)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**values))
    randomise(adapters, "a")
    write_adapter(tmp_path, adapters, "a", HERE)
    found = logits(base, batch_of(sequences(), "a"))
    with torch.no_grad():
        theirs = alone(PeftModel.from_pretrained(tiny_model(family), tmp_path).eval(), sequences())
    assert relative(theirs, found) < 1e-5
    assert relative(found, logits(base, batch_of(sequences()))) > 1e-3


@pytest.mark.filterwarnings("ignore:Specified to not", "ignore:Could not find a config file")
@pytest.mark.parametrize("name", ADAPTERS)
def test_pefts_folder_here(name: str, tmp_path: Path) -> None:
    family, values = ADAPTERS[name]
    model = get_peft_model(tiny_model(family), peft_config(values, family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        truth = alone(model.eval(), sequences())
    model.save_pretrained(tmp_path)
    base = tiny_base(family)
    adapters = Adapters(base.module)
    load_adapter(adapters, "theirs", read_adapter(tmp_path), BaseId(None))
    assert relative(logits(base, batch_of(sequences(), "theirs")), truth) < 1e-5


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("name", ["vera", "loha", "lokr", "oft"])
def test_the_keys_are_pefts(name: str, tmp_path: Path) -> None:
    """All keys, and all values but names and versions; tensors and their shapes."""
    values = {**ADAPTERS[name][1], "target_modules": ATTENTION}
    get_peft_model(tiny_model("llama"), peft_config(values)).save_pretrained(tmp_path / "theirs")
    adapters = Adapters(tiny_base("llama").module)
    adapters.add("a", AdapterConfig(**values))
    write_adapter(tmp_path / "ours", adapters, "a", BaseId(None))
    ours, theirs = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))
    assert {key for key in ours if ours[key] != theirs[key]} <= {"base_model_name_or_path", "peft_version"}
    tensors = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert {key: t.shape for key, t in tensors[0].items()} == {key: t.shape for key, t in tensors[1].items()}


def test_shared_matrices_are_drawn_as_pefts() -> None:
    model = get_peft_model(tiny_model("llama"), peft_config({"method": "vera", "r": 6, "projection_prng_key": 4}))
    adapters = Adapters(tiny_base("llama").module)
    adapters.add("a", AdapterConfig(method="vera", r=6, projection_prng_key=4))
    state = adapters.state("a")
    for name in ("vera_A", "vera_B"):
        theirs = getattr(model.base_model, name)["default"]
        own = [tensor for key, tensor in state.items() if key.endswith(name)]
        assert own
        assert all(torch.equal(tensor, theirs) for tensor in own)
        assert len({tensor.data_ptr() for tensor in own}) == 1


@pytest.mark.parametrize("name", TWENTY)
def test_twenty_steps(name: str, small_llama: Path, tmp_path: Path) -> None:
    compare_twenty(small_llama, AdapterConfig(**ADAPTERS[name][1]), tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_counts_are_pefts(family: str) -> None:
    base, bare = tiny_structure(family), tiny_skeleton(family)
    for _, values in ADAPTERS.values():
        if values.get("save_projection") is False or "target_modules" in values:
            continue
        trained = sum(trained_sizes(base, AdapterConfig(**values)).values())
        assert trained == by_peft(copy.deepcopy(bare), peft_config(values))[0], values


def test_sizes_are_cut_as_pefts() -> None:
    for size in (1, 2, 7, 12, 64, 96, 127, 128, 360, 1024):
        for wanted in (-1, 1, 2, 3, 4, 8, 10, 50):
            assert two_factors(size, wanted) == factorization(size, wanted), (size, wanted)


@pytest.mark.parametrize("key", ["r", "oft_block_size"])
def test_what_does_not_divide_gives_way_as_in_peft(key: str) -> None:
    for inputs in (7, 60, 64):
        for asked in (1, 2, 5, 7, 8, 33, 99):
            found = oft_blocks(inputs, AdapterConfig(method="oft", **{key: asked}))  # type: ignore[arg-type]
            expected = asked if inputs % asked == 0 else OFTLayer.adjust_oft_parameters(None, inputs, asked)  # type: ignore[arg-type]
            assert found[key == "oft_block_size"] == expected
            assert found[0] * found[1] == inputs


@pytest.mark.parametrize("name", ["vera", "loha", "lokr"])
def test_as_factors_it_is_the_same(name: str) -> None:
    """What exports fold."""
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**ADAPTERS[name][1]))
    randomise(adapters, "a")
    for path, update in low_rank_updates(adapters.parts("a")).items():
        part = adapters.parts("a")[path]
        weight = torch.zeros(len(update.b), update.a.shape[1])
        assert relative(update.b @ update.a, part.merged(weight, None)[0]) < 1e-5


@pytest.mark.parametrize("change", [{"init_scale": 2}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q": 2}}])
def test_what_cannot_be_read_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), peft_config({"method": "loha", "r": 2})).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=next(iter(change))):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["loha", "oft"])
def test_targets_that_are_left_out_are_those_of_the_tensors(name: str, tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), peft_config(ADAPTERS[name][1])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": None}))
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    told = load_adapter(adapters, "a", read_adapter(tmp_path), BaseId(None))
    assert "the file's tensors tell" in str(told)
    assert len(adapters.parts("a")) == 2 * 7


def test_two_ways_to_say_a_block() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        AdapterConfig(method="oft", r=2, oft_block_size=8)
    assert AdapterConfig(method="oft", r=2).oft_block_size == 0  # type: ignore[attr-defined]
