"""Every feature that a reader would take wrongly in silence, refuse late, or take: found, and then folded, padded,
expanded, kept, merged or refused by name, in every reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.adapter_readers import by_lorax, by_own_rank, scaled_by_config
from reference.families import randomise, tiny_base, tiny_model
from reference.measure import ROUNDING, relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.lowrank import low_rank_updates
from topwork.adapters.method import Bare
from topwork.adapters.peft_format import BaseId, SavedAdapter, fitted_shapes, read_adapter, write_adapter
from topwork.common.errors import AdapterError, RequestError
from topwork.export.lowered import lowered
from topwork.export.peft import write_plain
from topwork.export.preflight import exported_parts, preflight, refuse
from topwork.export.readers import FEATURES, READERS, Reader, reader_of, type_of
from topwork.models.skeleton import skeleton

Edit = Callable[[Path], None]
TIED = {"tie_word_embeddings": True}
APART = 8 * ROUNDING
"""Of products that were scaled before or after, in fp32."""


def configured(**changes: Any) -> Edit:
    """Changes of adapter_config.json."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def grown(folder: Path) -> None:
    """Seven more rows, as after resize_token_embeddings."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.weight"
    tensors[key] = torch.cat([tensors[key], torch.zeros(7, tensors[key].shape[1])])
    save_file(tensors, folder / "adapter_model.safetensors")


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], Edit | None]] = {
    # llama.cpp's converter, SGLang and Ollama read alpha / r; LoRAX #700
    "rslora": ({"use_rslora": True}, {}, None),
    # llama.cpp: one adapter.lora.alpha; overlooked by vLLM before it honoured it
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 3}}, {}, None),
    # vLLM #48019, SGLang: self.scaling is the config's alpha / r
    "unequal_ranks": ({"rank_pattern": {"q_proj": 2, "up_proj": 9}}, {}, None),
    # vLLM's PEFTHelper and Ollama declare a whole number
    "fractional_alpha": ({"lora_alpha": 2.5}, {}, None),
    # LoRAX: LoraWeights.load returns None for a name that lacks a layer
    "some_layers": ({"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}, {}, None),
    # SGLang and llama.cpp's tools look for names
    "regex_targets": ({"target_modules": r".*\.(q|v)_proj"}, {}, None),
    # vLLM refuses PiSSA and OLoRA, llama.cpp's converter takes A and B for the whole update; unsloth #2586
    "beginning": ({}, {}, configured(init_lora_weights="pissa")),
    # vLLM #10849, llama.cpp #11554: refused; LoRAX drops the magnitudes
    "dora": ({"use_dora": True}, {}, None),
    # vLLM refuses folders with them; llama.cpp has no tensors for them
    "biases": ({"bias": "lora_only", "target_modules": ["c_attn"]}, {}, None),
    # vLLM #2816, #4186, llama.cpp #9065
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {}, None),
    # vLLM #9280: new tokens
    "trained_tokens": ({"trainable_token_indices": [3, 4]}, {}, None),
    # llama.cpp #9211
    "embedding_lora": ({"target_modules": ["embed_tokens", "q_proj"]}, {}, None),
    "head_lora": ({"target_modules": ["lm_head", "q_proj"]}, {}, None),
    # llama.cpp: no output.weight; vLLM #32599
    "tied_lora": ({"target_modules": ["lm_head", "q_proj"]}, TIED, None),
    # vLLM #2847: {1, 8, … 512}; LoRAX's kernels end at 128
    "large_rank": ({"r": 513, "target_modules": ["q_proj"]}, {}, None),
    # vLLM #41384, #52194, SGLang #25528
    "parameters": ({"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}, {}, None),
    "ia3": ({"method": "ia3"}, {}, None),
    "bitfit": ({"method": "bitfit"}, {}, None),
    "full": ({"method": "full"}, {}, None),
    "prefix": ({"method": "prefix"}, {}, None),
    "prompt": ({"method": "prompt"}, {}, None),
    "other_method": ({"method": "loha", "r": 3}, {}, None),
    # vLLM #9280, #36501: a grown embedding
    "grown_vocabulary": ({"modules_to_save": ["embed_tokens"]}, {}, grown),
    "not_finite": ({}, {}, with_nan),
}  # fmt: skip
"""Feature -> an adapter that has it, its base, and what is changed in its folder. One of ours beside quantized_base,
which is no matter of the folder."""
FAMILY = {"bitfit": "gpt2", "biases": "gpt2", "parameters": "mixtral"}


def made(folder: Path, feature: str) -> tuple[SavedAdapter, Bare]:
    """The row's adapter, read; and its base without weights."""
    config, values, edit = ROWS[feature]
    family = FAMILY.get(feature, "llama")
    base = tiny_base(family, **values)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(**config if "method" in config else {"r": 4, "lora_alpha": 8, **config}))
    randomise(adapters, "a")
    write_adapter(folder, adapters, "a", BaseId("owner/base", None))
    if edit is not None:
        edit(folder)
    return read_adapter(folder), bones(family, **values)


def bones(family: str = "llama", **values: Any) -> Bare:
    return bare_base(skeleton(tiny_model(family, **values).config))


def test_every_feature_has_a_row_and_every_reader_a_verdict() -> None:
    assert ROWS.keys() | {"quantized_base"} == FEATURES.keys()
    assert all(reader.verdicts.keys() == FEATURES.keys() for reader in READERS.values())


@pytest.mark.parametrize("feature", ROWS)
def test_what_becomes_of_it_in_each_reader(feature: str, tmp_path: Path) -> None:
    saved, bare = made(tmp_path, feature)
    for reader in READERS.values():
        found = {finding.feature: finding for finding in preflight(saved, bare, reader)}
        if feature == "large_rank" and reader.most is None:
            assert feature not in found
            continue
        finding = found[feature]
        assert finding.action == reader.verdicts[feature].action
        told = finding.line(reader)
        assert told.startswith(FEATURES[feature])
        if not finding.refused:
            refuse(list(found.values()), saved, reader)
            continue
        assert finding.instead
        with pytest.raises(AdapterError, match=f"exported as {reader.format} for {reader.reader}") as refused:
            refuse(list(found.values()), saved, reader)
        assert told in str(refused.value)


@pytest.mark.parametrize("format", [name for name, reader in READERS.items() if reader.plain])
@pytest.mark.parametrize(
    "feature",
    ["rslora", "alpha_pattern", "unequal_ranks", "fractional_alpha", "some_layers", "regex_targets", "head_lora"],
)
def test_readers_get_the_update_that_it_is(feature: str, format: str, tmp_path: Path) -> None:
    """By the arithmetic of each reader, which would give another one from the folder as it was."""
    saved, bare = made(tmp_path / "ours", feature)
    parts = fitted_shapes(bare, saved)
    wanted = {path: update.b @ update.a for path, update in low_rank_updates(parts).items()}
    reader = READERS[format]
    (tmp_path / "theirs").mkdir()
    adapter = lowered(parts, bare, reader.ranks, reader.whole_layers)
    write_plain(tmp_path / "theirs", adapter, bare, "owner/base")
    readings: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        "scaled": scaled_by_config, "ranked": by_own_rank, "lorax": lambda folder: by_lorax(folder, 2)
    }  # fmt: skip
    for reading in readings if format == "lorax" else list(readings)[:2]:
        if reading == "lorax" and feature == "head_lora":
            continue  # one head is no layers
        found = readings[reading](tmp_path / "theirs")
        assert wanted.keys() <= found.keys()
        assert relative([found[path] for path in wanted], list(wanted.values())) < APART
        assert all(not update.any() for path, update in found.items() if path not in wanted)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == adapter.rank
    assert isinstance(config["target_modules"], list)
    assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform"))


@pytest.mark.parametrize(
    ("feature", "reading"),
    [
        ("rslora", scaled_by_config), ("rslora", by_own_rank), ("alpha_pattern", by_own_rank),
        ("alpha_pattern", scaled_by_config), ("unequal_ranks", scaled_by_config),
        ("some_layers", lambda folder: by_lorax(folder, 2)), ("regex_targets", lambda folder: by_lorax(folder, 2)),
    ],
)  # fmt: skip
def test_unseen_they_would_take_it_wrongly(
    feature: str, reading: Callable[[Path], dict[str, Tensor]], tmp_path: Path
) -> None:
    saved, bare = made(tmp_path, feature)
    wanted = {path: update.b @ update.a for path, update in low_rank_updates(fitted_shapes(bare, saved)).items()}
    found = reading(tmp_path)
    assert found.keys() != wanted.keys() or relative([found[path] for path in wanted], list(wanted.values())) > 0.05


def test_pissa_as_peft_writes_it_is_folded_out_of_the_bases_weights(tmp_path: Path) -> None:
    """s (B A - B0 A0) with B0 A0 the weight's best approximation: no folder without the base says that."""
    saved, bare = made(tmp_path, "beginning")
    model = tiny_model("llama")
    _, parts = exported_parts(saved, bare, lambda: lambda path, kind: model.get_parameter(f"{path}.{kind}").detach())
    found = lowered(parts, bare)
    assert found.rank == 8
    path = "model.layers.1.mlp.down_proj"
    weight = model.get_parameter(f"{path}.weight").detach()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{path}.lora_{letter}.weight"] for letter in "AB")
    wanted = 2.0 * b @ a - u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    assert relative(found.updates[path].b @ found.updates[path].a, wanted) < 1e-5


def test_a_copy_of_the_bases_embedding_is_compared_and_left_out(tmp_path: Path) -> None:
    """PEFT writes one beside an adapter of it, of itself."""
    saved, bare = made(tmp_path, "embedding_lora")
    model, tensors = tiny_model("llama"), load_file(tmp_path / "adapter_model.safetensors")
    own = model.get_input_embeddings().weight.detach().clone()
    for moved in (0.0, 1.0):
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        save_file({**tensors, key: own + moved}, tmp_path / "adapter_model.safetensors")
        saved = read_adapter(tmp_path)
        assert not [f for f in preflight(saved, bare, READERS["vllm"]) if f.refused]
        how = (saved, bare, lambda: lambda path, kind: model.get_parameter(f"{path}.{kind}").detach())
        if moved:  # LoRA over another weight is that weight with it in it
            with pytest.raises(AdapterError, match=r"embed_tokens holds a whole module, .*merge it into the base"):
                lowered(exported_parts(*how)[1], bare)
        else:
            assert exported_parts(*how)[1].keys() == fitted_shapes(bare, read_adapter_without(tmp_path, key)).keys()


def read_adapter_without(folder: Path, key: str) -> SavedAdapter:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, folder / "adapter_model.safetensors")
    return read_adapter(folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3_text", "phi3"])
def test_vllm_adapts_the_ends_of_some_models_alone(family: str, tmp_path: Path) -> None:
    """vLLM 0.32: a class without `embedding_modules` expects no embed_tokens and no lm_head."""
    base = tiny_base(family, tie_word_embeddings=False)
    for name in ("embed_tokens", "lm_head"):
        adapters = Adapters(base.module)
        adapters.add("a", AdapterConfig(r=4, target_modules=[name, "o_proj"]))
        write_adapter(tmp_path / name, adapters, "a", BaseId(None, None))
        adapters.remove("a")
        saved, bare = read_adapter(tmp_path / name), bones(family, tie_word_embeddings=False)
        (finding,) = preflight(saved, bare, READERS["vllm"])
        assert finding.refused == (family not in ("llama", "phi3"))
        assert preflight(saved, bare, READERS["sglang"])[0].action == "kept"


def test_a_quantized_base_is_told(tmp_path: Path) -> None:
    saved, bare = made(tmp_path, "rslora")
    for reader in READERS.values():
        assert "quantized_base" in {finding.feature for finding in preflight(saved, bare, reader, quantized=True)}


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    base = tiny_base("llama")
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[3]))
    write_adapter(tmp_path, adapters, "a", BaseId(None, None))
    saved, reader = read_adapter(tmp_path), READERS["gguf-adapter"]
    with pytest.raises(AdapterError) as refused:
        refuse(preflight(saved, bones(), reader), saved, reader)
    assert [line.split(":")[0].split(" (")[0].strip() for line in str(refused.value).splitlines()[1:]] == [
        "DoRA", "whole modules", "trained tokens"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # vLLM #10849 and the rest of peft_helper.py's list: refused where they are read
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"), ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "PSOFT"}, "PSOFT"),
    ],
)  # fmt: skip
def test_what_nobody_here_reads_is_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    made(tmp_path, "rslora")
    configured(**changes)(tmp_path)
    with pytest.raises(AdapterError, match=told):
        read_adapter(tmp_path)


def test_formats_and_types_have_near_names() -> None:
    with pytest.raises(RequestError, match=r"--format gguf_adaptr: there are peft, .*did you mean 'gguf-adapter'"):
        reader_of("gguf_adaptr")
    with pytest.raises(RequestError, match=r"--type q8: --format gguf has f16, .*did you mean 'q8_0'"):
        type_of(reader_of("gguf"), "q8")
    with pytest.raises(RequestError, match="--format peft has one form only"):
        type_of(reader_of("peft"), "f16")
    assert type_of(reader_of("gguf"), "Q8_0") == "q8_0"
    assert type_of(reader_of("gguf-adapter"), None) == "f32"


def test_readers_are_all_there() -> None:
    assert all(isinstance(reader, Reader) and reader.format == name for name, reader in READERS.items())
