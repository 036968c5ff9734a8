"""Names of tensors that trainers, wrappers and releases have written: read as what they are by every reader, or refused
by name. Nothing is left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from merging.streams import loaded, stored_base, streamed
from reference.families import alone, logits, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.foreign import read_foreign
from topwork.adapters.graft import Adapters
from topwork.adapters.names import WRAPPERS, on_modules, own_names, split_name
from topwork.adapters.peft_format import BaseId, SavedAdapter, fill_from, fitted, load_adapter, read_adapter
from topwork.common.errors import AdapterError
from topwork.models.base import Base
from topwork.ops.batch import batch_of

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Rename = Callable[[str], str]


def _in_key(old: str, new: str) -> Rename:
    return lambda key: key.replace(old, new)


def _named(key: str) -> str:
    """As a model's own state names it."""
    if key.endswith("lora_magnitude_vector"):
        return f"{key}.default.weight"
    return key.replace(".weight", ".default.weight") if ".lora_" in key else key


RENAMES: dict[str, Rename] = {
    "as PEFT saves it": lambda key: key,
    "the adapter's name": _named,
    "another adapter's name": _in_key("lora_A.weight", "lora_A.mine.weight"),
    "a name behind a saved module": _in_key("lm_head.weight", "lm_head.modules_to_save.default.weight"),
    "a saved module twice named": _in_key("lm_head.weight", "lm_head.modules_to_save.weight"),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "the prefix twice": lambda key: PREFIX + key,
    "DDP": lambda key: f"module.{key}",
    "torch.compile": _in_key(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile around all": lambda key: f"_orig_mod.{key}",
    "FSDP": _in_key(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "checkpointing": _in_key(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "a value head around all": lambda key: f"pretrained_model.{key}",
    "lengths that are a module": lambda key: f"{key}.weight" if key.endswith("lora_magnitude_vector") else key,
    "lengths with a name": lambda key: f"{key}.default" if key.endswith("lora_magnitude_vector") else key,
    "in a larger model": _in_key(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "in a larger model, older": lambda key: key.replace(PREFIX, f"{PREFIX}language_model."),
    "without its outer model": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A DoRA folder of PEFT's with a saved head, and the logits that it gives there."""
    folder = tmp_path_factory.mktemp("theirs")
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], use_dora=True
    )
    model = shaken(get_peft_model(tiny_model("llama"), config))
    model.save_pretrained(folder)
    return folder, truth(model)


def shaken(model: nn.Module) -> Any:
    """With weights that change something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def truth(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return alone(model, sequences())


def renamed(folder: Path, out: Path, rename: Rename, more: dict[str, Tensor] | None = None) -> Path:
    """The same adapter with tensors by other names."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = {rename(key): tensor for key, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors | (more or {}), out / TENSORS)
    return out


def by_folder(base: Base, saved: SavedAdapter, folder: Path) -> Tensor:
    load_adapter(Adapters(base.module), "a", saved, BaseId("tiny"))
    return logits(base, batch_of(sequences(), "a"))


def by_server(base: Base, saved: SavedAdapter, folder: Path) -> Tensor:
    adapters = Adapters(base.module)
    fit = fitted(adapters.bare(), read_foreign(folder, "x").saved)
    adapters.put("a", fit.config, fit.parts)
    return logits(base, batch_of(sequences(), "a"))


def by_init_from(base: Base, saved: SavedAdapter, folder: Path) -> Tensor:
    adapters = Adapters(base.module)
    adapters.add("a", saved.config)
    fill_from(saved, adapters.parts("a"), adapters.bare())
    return logits(base, batch_of(sequences(), "a"))


def by_streaming_merge(base: Base, saved: SavedAdapter, folder: Path) -> Tensor:
    place = stored_base(folder.parent / "base")
    return truth(loaded(streamed(place, saved, folder.parent / "merged")))


READERS = {"folder": by_folder, "server": by_server, "init_from": by_init_from, "streaming merge": by_streaming_merge}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", RENAMES)
def test_every_reader_reads_every_name(
    case: str, reader: str, theirs: tuple[Path, Tensor], tmp_path: Path
) -> None:  # fmt: skip
    folder = renamed(theirs[0], tmp_path / "theirs", RENAMES[case])
    found = READERS[reader](tiny_base(), read_adapter(folder), folder)
    assert relative(found, theirs[1]) < 1e-5


def test_what_it_was_changed_from_is_told() -> None:
    tensor = torch.ones(1)
    named = own_names({"module.base_model.model.a._orig_mod.q.lora_A.mine.weight": tensor}, "x")
    assert named.tensors.keys() == {"a.q.lora_A.weight"}
    assert named.changed == ("the adapter's name in tensors' names (mine)", "wrappers (_orig_mod, module)")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("base_model.model.a.modules_to_save.default.dense.weight", "a.dense.weight"),
        ("base_model.model.a.modules_to_save.dense.weight", "a.dense.weight"),
        ("base_model.model.a.original_module.weight", "a.base_layer.weight"),  # alone it is the base's own
        ("base_model.model.e.token_adapter.base_layer.weight", "e.base_layer.weight"),
        ("base_model.model.e.token_adapter.trainable_tokens_delta.default", "e.token_adapter.trainable_tokens_delta"),
        ("base_model.model.e.lora_embedding_A.default", "e.lora_embedding_A"),
        ("base_model.model.a.ia3_l.default", "a.ia3_l"),
        ("base_model.model.a.lora_B.default.bias", "a.lora_B.bias"),
        ("base_model.model.x.experts.base_layer.lora_A.default.weight", "x.experts.base_layer.lora_A.weight"),
        ("prompt_embeddings", "prompt_embeddings"),
        ("model.base_model.model.model.layers.0.a.lora_A.weight", "model.layers.0.a.lora_A.weight"),  # Lightning
    ],
)
def test_one_name(key: str, ours: str) -> None:
    more = {"base_model.model.b.modules_to_save.out_proj.weight": torch.ones(1)} if ".dense." in key else {}
    assert ours in own_names({key: torch.zeros(1), **more}, "x").tensors


def test_doubles_are_one_where_they_are_equal() -> None:
    """PEFT writes a saved module three times where the vocabulary has grown."""
    one, before = torch.ones(3), torch.zeros(3)
    names = {"head.weight": one, "head.modules_to_save.weight": one.clone(), "head.original_module.weight": before}
    found = own_names({PREFIX + key: tensor for key, tensor in names.items()}, "x").tensors
    assert found.keys() == {"head.weight"}
    assert torch.equal(found["head.weight"], one)
    names["head.modules_to_save.weight"] = one + 1
    with pytest.raises(AdapterError, match=r"^x: two tensors that differ would be 'head.weight'"):
        own_names({PREFIX + key: tensor for key, tensor in names.items()}, "x")


def test_several_adapters_in_one_file() -> None:
    names = ("a.lora_A.one.weight", "a.lora_A.two.weight")
    with pytest.raises(AdapterError, match=r"x holds several adapters \(one, two\); save the one you want alone"):
        own_names({PREFIX + name: torch.ones(1) for name in names}, "x")


def test_paths_are_moved_where_one_module_alone_is_meant() -> None:
    modules = ["model", "model.language_model", "model.language_model.layers.0.q", "model.visual.layers.0.q", "lm_head"]
    keys = ("model.layers.0.q.lora_A.weight", "visual.layers.0.q.lora_A.weight", "language_model.lm_head.weight")
    found, moved = on_modules({key: torch.ones(1) for key in keys}, modules)
    assert list(found) == [
        "model.language_model.layers.0.q.lora_A.weight", "model.visual.layers.0.q.lora_A.weight", "lm_head.weight"
    ]  # fmt: skip
    assert moved == {
        "model.layers.0.q": "model.language_model.layers.0.q",
        "visual.layers.0.q": "model.visual.layers.0.q",
        "language_model.lm_head": "lm_head",
    }
    two = ["model.a.q", "transformer.a.q"]
    assert on_modules({"a.q.lora_A.weight": torch.ones(1)}, two)[1] == {}
    with pytest.raises(AdapterError, match=r"two tensors would be 'lm_head.weight' in this base"):
        on_modules({"lm_head.weight": torch.ones(1), "model.lm_head.weight": torch.ones(1)}, ["lm_head"])


def test_a_name_is_split_at_its_module() -> None:
    modules = {"model", "model.a", "model.a.q"}
    assert split_name("model.a.q.lora_A.weight", modules) == ("model.a.q", "lora_A.weight")
    assert split_name("model.a.z.base_layer.weight", modules) == ("model.a.z", "base_layer.weight")
    assert split_name("model.a.gate_up_proj", modules) == ("model.a", "gate_up_proj")
    assert split_name("prompt_embeddings", modules) == ("", "prompt_embeddings")


def test_options_follow_the_paths(theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    """A folder of a text model inside of a larger one names its modules by whole paths."""
    folder = renamed(theirs[0], tmp_path / "theirs", RENAMES["in a larger model"])
    saved = read_adapter(folder)
    paths = sorted({split_name(key)[0] for key in saved.tensors} - {"lm_head"})
    saved = SavedAdapter(saved.config.model_copy(update={"target_modules": paths}), saved.tensors, saved.base, "x")
    base = tiny_base()
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", saved, BaseId("tiny"))
    assert relative(logits(base, batch_of(sequences(), "a")), theirs[1]) < 1e-5
    assert set(adapters.configs["a"].target_modules) <= set(adapters.parts("a"))


def test_a_prefix_that_nothing_explains_is_named(theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = renamed(theirs[0], tmp_path / "theirs", _in_key(f"{PREFIX}model.", f"{PREFIX}encoder.block."))
    with pytest.raises(AdapterError, match=r"names begin with 'encoder\.block\.layers\.'.*'model\.layers\.'"):
        by_folder(tiny_base(), read_adapter(folder), folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_tensor_too_many_is_never_passed_over(reader: str, theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    more = {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(2)}
    folder = renamed(theirs[0], tmp_path / "theirs", lambda key: key, more)
    with pytest.raises(AdapterError, match=r"1 unknown \(first model\.layers\.0\.self_attn\.q_proj\.lora_C\.weight\)"):
        READERS[reader](tiny_base(), read_adapter(folder), folder)


PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    "ia3_l", "token_adapter.trainable_tokens_delta", "base_layer.weight", "base_layer.bias",
)  # fmt: skip
WORDS = st.sampled_from(["layers", "mlp", "self_attn", "h", "0", "1", "17", "q_proj", "c_attn", "block", "experts"])


@st.composite
def wrapped_names(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Our names of some tensors, and what a trainer that saves a model's state by itself calls them."""
    path = st.lists(WORDS, min_size=1, max_size=4).map(lambda words: ".".join(["model", *words]))
    ours = draw(st.lists(st.tuples(path, st.sampled_from(PARTS)), min_size=1, max_size=4, unique=True))
    name = draw(st.none() | st.sampled_from(["default", "mine", "v2", "weights"]))
    front = draw(st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod.", "pretrained_model.", "model."]))
    prefixes = draw(st.integers(1, 2)) if front in ("pretrained_model.", "model.") else draw(st.integers(0, 2))
    wrapper = draw(st.sampled_from(sorted(WRAPPERS)))
    theirs = []
    for place, part in ours:
        words = place.split(".")
        if draw(st.booleans()):
            words.insert(draw(st.integers(0, len(words))), wrapper)
        theirs.append(front + PREFIX * prefixes + ".".join([*words, named_part(part, name)]))
    return [f"{place}.{part}" for place, part in ours], theirs


def named_part(part: str, name: str | None) -> str:
    if name is None or part.startswith("base_layer"):
        return part
    if part == "lora_magnitude_vector":
        return f"{part}.{name}.weight"
    first, _, rest = part.partition(".")
    return f"{first}.{name}.{rest}" if first in ("lora_A", "lora_B") else f"{part}.{name}"


@given(wrapped_names())
def test_whatever_is_around_them(names: tuple[list[str], list[str]]) -> None:
    ours, theirs = names
    tensors = {key: torch.full((1,), float(at)) for at, key in enumerate(theirs)}
    found = own_names(tensors, "x").tensors
    assert [(key, float(found[key])) for key in ours] == [(key, float(at)) for at, key in enumerate(ours)]
    assert found.keys() == set(ours)
    assert own_names(found, "x").tensors.keys() == found.keys()
