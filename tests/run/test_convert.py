"""Adapters and models of other programs, made here by hand in their form: what is converted is read and is the same."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.tiny_gguf import byte_level_vocabulary, write_gguf
from models.tiny_gguf import tiny_llama as gguf_llama
from run.fixtures import Said
from topwork.adapters.graft import bare_base
from topwork.adapters.peft_format import fitted_shapes, read_adapter
from topwork.common.errors import AdapterError, RequestError
from topwork.export.gguf.adapter import write_gguf_adapter
from topwork.export.lowered import lowered
from topwork.run.convert import convert

IDS = torch.tensor([[5, 9, 44, 100, 7, 3, 61, 18]])
PATHS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def shapes(tiny_llama: Path) -> dict[str, tuple[int, int]]:
    """[out, in] of the base's weights by the paths of their modules."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "weight")}


@pytest.fixture(scope="module")
def factors(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] at a few modules of both layers, as PEFT holds them."""
    torch.manual_seed(3)
    paths = [f"model.layers.{layer}.{path}" for layer in (0, 1) for path in PATHS]
    return {path: (0.3 * torch.randn(3, shapes[path][1]), 0.3 * torch.randn(shapes[path][0], 3)) for path in paths}


def logits(base: Path, updates: dict[str, Tensor]) -> Tensor:
    """Of a base whose weights have the updates added: the reference that nothing here has a part in."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for path, update in updates.items():
            model.get_submodule(path).weight.add_(update)
        return model(IDS).logits


def peft_logits(base: Path, folder: Path) -> Tensor:
    """PEFT's, of a folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder)(IDS).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def peft_folder(
    folder: Path, factors: dict[str, tuple[Tensor, Tensor]], name: Callable[[str], str], **own: Any
) -> Path:
    """An adapter of PEFT's with tensors by names of somebody's own."""
    folder.mkdir(parents=True)
    tensors = {}
    for path, (a, b) in factors.items():
        for part, tensor in (("lora_A", a), ("lora_B", b)):
            tensors[name(f"base_model.model.{path}.{part}.weight")] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [p.rpartition(".")[2] for p in PATHS],
        **own,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def of_llama_cpp(path: Path, factors: dict[str, tuple[Tensor, Tensor]], alpha: float) -> Path:
    """As convert_lora_to_gguf.py writes it: q's and k's rows of B by heads (4 and 2 of 8), alpha as it was."""
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "mlp.down_proj": ("ffn_down", 0)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for place, (a, b) in factors.items():
        layer = place.split(".")[2]
        name, heads = names[place.split(".", 3)[3]]
        if heads:
            b = torch.stack([b[8 * h + 4 * half + row] for h in range(heads) for row in range(4) for half in range(2)])
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a.numpy())
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_adapter(tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    file = of_llama_cpp(tmp_path / "lora.bin", factors, 6.0)  # told by what is in it, not by its name
    done = convert(file, tmp_path / "out", str(tiny_llama), log=silent)
    assert (done.kind, done.made, done.modules, done.fitted) == ("gguf adapter", "adapter", 6, True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    close(
        peft_logits(tiny_llama, tmp_path / "out"), logits(tiny_llama, {p: 2 * b @ a for p, (a, b) in factors.items()})
    )


def test_a_gguf_adapter_comes_back_as_it_was_written(
    tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    first = peft_folder(tmp_path / "first", factors, lambda name: name, use_rslora=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain = lowered(fitted_shapes(bare_base(model), read_adapter(first)), bare_base(model))
    write_gguf_adapter(plain, model.config.to_dict(), tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "back", str(tiny_llama), log=silent)
    found = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert len(found) == 2 * len(plain.updates)
    for path, update in plain.updates.items():
        assert torch.equal(found[f"base_model.model.{path}.lora_A.weight"], update.a)
        assert torch.equal(found[f"base_model.model.{path}.lora_B.weight"], update.b)


def test_a_gguf_adapter_needs_its_base(factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    file = of_llama_cpp(tmp_path / "lora.gguf", factors, 6.0)
    with pytest.raises(RequestError, match="give the adapter's base with --model"):
        convert(file, tmp_path / "out", log=silent)
    assert not (tmp_path / "out").exists()


def mlx_folder(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], more: Any = (), **own: Any) -> Path:
    """As mlx-lm writes it: transposed, the scale a multiplier."""
    folder.mkdir(parents=True)
    tensors = {}
    for path, (a, b) in factors.items():
        tensors |= {f"{path}.lora_a": a.t().contiguous(), f"{path}.lora_b": b.t().contiguous()}
    save_file(tensors | dict(more), folder / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora", "model": "mlx-community/some-4bit", "num_layers": 2,
        "lora_parameters": {"rank": 3, "scale": 1.75, "dropout": 0.0, "keys": list(PATHS)}, **own,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("named", [True, False], ids=["base named", "base not named"])
def test_an_mlx_adapter(
    tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, named: bool
) -> None:
    folder = mlx_folder(tmp_path / "mlx", factors)
    done = convert(folder, tmp_path / "out", str(tiny_llama) if named else None, log=silent)
    assert (done.kind, done.modules, done.fitted) == ("mlx adapter", 6, named)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (str(tiny_llama) if named else "mlx-community/some-4bit")
    expected = logits(tiny_llama, {path: 1.75 * b @ a for path, (a, b) in factors.items()})
    close(peft_logits(tiny_llama, tmp_path / "out"), expected)


def test_an_mlx_adapter_with_dora(tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    weights = {path: model.get_submodule(path).weight.detach() for path in factors}
    torch.manual_seed(4)
    lengths = {path: 0.5 + torch.rand(len(weight)) for path, weight in weights.items()}
    folder = mlx_folder(
        tmp_path / "mlx", factors, {f"{path}.m": m for path, m in lengths.items()}, fine_tune_type="dora"
    )
    convert(folder, tmp_path / "out", str(tiny_llama), log=silent)
    updates = {}
    for path, (a, b) in factors.items():
        adapted = weights[path] + 1.75 * b @ a
        updates[path] = lengths[path][:, None] * adapted / adapted.norm(dim=1, keepdim=True) - weights[path]
    close(peft_logits(tiny_llama, tmp_path / "out"), logits(tiny_llama, updates))


@pytest.mark.parametrize(
    ("own", "more", "told"),
    [
        ({"fine_tune_type": "full"}, {}, "holds weights of the base itself, not an adapter"),
        ({"lora_parameters": {"rank": 3}}, {}, r"does not say by what its update is multiplied"),
        # mlx-lm of 2024 multiplied by scale · alpha / rank, and alpha is overlooked since
        ({"lora_parameters": {"rank": 3, "alpha": 16.0, "scale": 10.0}}, {}, r"an alpha of 16.0 beside its scale 10"),
        ({"fine_tune_type": "dora"}, {}, r"says it is DoRA and holds no lengths"),
        ({}, {"model.layers.0.mlp.x.lora_a": torch.ones(4, 8, 3), "model.layers.0.mlp.x.lora_b": torch.ones(4, 3, 8)},
         "adapts experts at once"),
        ({}, {"model.layers.0.mlp.x.lora_a": torch.ones(8, 3)}, "without one of lora_a and lora_b"),
        ({}, {"model.layers.0.mlp.x.scales": torch.ones(8, 3)}, r"holds 'model.layers.0.mlp.x.scales'"),
        ({}, {"model.embed_tokens.lora_a": torch.ones(9, 3), "model.embed_tokens.lora_b": torch.ones(3, 8)},
         "adapts the embedding model.embed_tokens, .* name the base"),
    ],
)  # fmt: skip
def test_mlx_adapters_that_have_no_form_here(
    factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, own: Any, more: Any, told: str
) -> None:
    with pytest.raises(AdapterError, match=told):
        convert(mlx_folder(tmp_path / "mlx", factors, more, **own), tmp_path / "out", log=silent)
    assert not (tmp_path / "out").exists()


def test_an_mlx_adapter_of_the_embedding(tiny_llama: Path, shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """Over a head of its own; mlx-lm would apply it to a tied one, too."""
    rows, width = shapes["model.embed_tokens"]
    torch.manual_seed(5)
    a, b = 0.3 * torch.randn(rows, 3), 0.3 * torch.randn(3, width)
    pair = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    convert(mlx_folder(tmp_path / "mlx", {}, pair), tmp_path / "out", str(tiny_llama), log=silent)
    close(peft_logits(tiny_llama, tmp_path / "out"), logits(tiny_llama, {"model.embed_tokens": 1.75 * a @ b}))


NAMES: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another adapter's name": lambda key: key.replace(".weight", ".support.weight"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "a prefix twice": lambda key: "base_model.model." + key,
    "DDP": lambda key: "module." + key,
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "checkpointing": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "a text model inside of a larger one": lambda key: key.replace("model.model.", "model.model.language_model."),
    "the same, older": lambda key: key.replace("model.model.", "model.language_model.model."),
    "torchtune's, which are PEFT's": lambda key: key,
}


@pytest.mark.parametrize("case", NAMES)
def test_peft_folders_with_other_names(
    tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, case: str
) -> None:
    told: list[str] = []
    folder = peft_folder(tmp_path / "theirs", factors, NAMES[case])
    done = convert(folder, tmp_path / "out", str(tiny_llama), log=told.append)
    assert done.kind == "peft adapter"
    assert bool(told) == (case != "torchtune's, which are PEFT's")
    close(
        peft_logits(tiny_llama, tmp_path / "out"), logits(tiny_llama, {p: 2 * b @ a for p, (a, b) in factors.items()})
    )


def test_saved_modules_with_a_name(
    tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], shapes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "theirs", factors, lambda key: key, modules_to_save=["lm_head"])
    tensors, head = load_file(folder / "adapter_model.safetensors"), torch.randn(shapes["lm_head"])
    tensors["base_model.model.lm_head.modules_to_save.default.weight"] = head
    tensors["base_model.model.lm_head.original_module.weight"] = torch.zeros(shapes["lm_head"])
    save_file(tensors, folder / "adapter_model.safetensors")
    convert(folder, tmp_path / "out", str(tiny_llama), log=silent)
    found = read_adapter(tmp_path / "out")
    assert torch.equal(found.tensors["lm_head.weight"], head)


@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_tokens_before_the_text_keep_their_name(kind: Any, tiny_llama: Path, tmp_path: Path) -> None:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    model.save_pretrained(tmp_path / "theirs")
    told: list[str] = []
    for base, out in ((None, "alone"), (str(tiny_llama), "based")):
        convert(tmp_path / "theirs", tmp_path / out, base, log=told.append)
        close(peft_logits(tiny_llama, tmp_path / out), peft_logits(tiny_llama, tmp_path / "theirs"))
    assert told == []


def test_what_cannot_be_read_is_called_as_it_was_given(
    factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "theirs", factors, lambda key: key, peft_type="PSOFT")
    with pytest.raises(AdapterError, match=f"^{re.escape(str(folder))} holds an adapter of peft_type PSOFT"):
        convert(folder, tmp_path / "out", log=silent)
    folder = peft_folder(tmp_path / "empty", {}, lambda key: key)
    with pytest.raises(AdapterError, match=r"nothing to convert|nothing that can be converted"):
        convert(folder, tmp_path / "out", log=silent)


def test_an_adapter_in_a_folder_of_its_name(factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    told: list[str] = []
    peft_folder(tmp_path / "theirs" / "support", factors, lambda key: key)
    convert(tmp_path / "theirs", tmp_path / "out", log=told.append)
    assert "holds the adapter 'support', in a folder of its name" in told[0]
    peft_folder(tmp_path / "theirs" / "terse", factors, lambda key: key)
    with pytest.raises(RequestError, match="holds 2 adapters; give one of them"):
        convert(tmp_path / "theirs", tmp_path / "other", log=silent)


def test_two_adapters_in_one_file(factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    names = iter([".one.weight", ".two.weight"] * 99)
    folder = peft_folder(tmp_path / "theirs", factors, lambda key: key.replace(".weight", next(names)))
    with pytest.raises(AdapterError, match=r"holds several adapters \(one, two\)"):
        convert(folder, tmp_path / "out", log=silent)


def test_an_adapter_of_another_base(
    tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    wider = {path: (torch.ones(3, 99), b) for path, (_, b) in factors.items()}
    with pytest.raises(AdapterError, match="do not fit this base"):
        convert(peft_folder(tmp_path / "theirs", wider, lambda key: key), tmp_path / "out", str(tiny_llama), log=silent)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite(factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    broken = {path: (a, b * torch.nan) for path, (a, b) in factors.items()}
    with pytest.raises(AdapterError, match=r"lora_B.weight holds values that are not finite"):
        convert(peft_folder(tmp_path / "theirs", broken, lambda key: key), tmp_path / "out", log=silent)
    assert not (tmp_path / "out").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "theirs" / "adapter_model.bin")
    for place in (tmp_path / "theirs", tmp_path / "theirs" / "adapter_model.bin"):
        with pytest.raises(RequestError, match=r"is pickled, .* weights_only=True"):
            convert(place, tmp_path / "out", log=silent)


def test_what_is_not_known(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("nothing")
    with pytest.raises(RequestError, match=r"there is notes.txt.*give a GGUF file .*mlx-lm's .* or a PEFT folder"):
        convert(tmp_path / "theirs", tmp_path / "out", log=silent)
    with pytest.raises(RequestError, match="there is nothing at"):
        convert(tmp_path / "nowhere", tmp_path / "out", log=silent)
    with pytest.raises(RequestError, match="is a Hugging Face model's folder, which is read as it is"):
        convert(tiny_llama, tmp_path / "out", log=silent)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="is nothing that can be converted"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", log=silent)


def test_an_adapter_without_its_config(factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", factors, lambda key: key)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="which says its rank and scale; they are not guessed"):
        convert(folder, tmp_path / "out", log=silent)


def test_a_gguf_model(tmp_path: Path) -> None:
    model = gguf_llama()
    file = write_gguf(tmp_path / "tiny.gguf", model, byte_level_vocabulary())
    done = convert(file, tmp_path / "out", log=silent)
    assert (done.kind, done.made) == ("gguf model", "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = {name: tensor.to(torch.bfloat16).float() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    with pytest.raises(RequestError, match="is a model itself; leave --model out"):
        convert(file, tmp_path / "other", "smollm2-135m", log=silent)
    with pytest.raises(RequestError, match="holds files already"):
        convert(file, tmp_path / "out", log=silent)
    convert(file, tmp_path / "out", overwrite=True, log=silent)


def test_the_command(
    topwork: Callable[..., Said], tiny_llama: Path, factors: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    folder = mlx_folder(tmp_path / "mlx", factors)
    said = topwork("convert", folder, tmp_path / "out", "--model", tiny_llama)
    assert said.code == 0
    assert "adapters.safetensors (mlx adapter) is a PEFT folder now: 6 modules, and fits its base" in said.out
    said = topwork("convert", folder, tmp_path / "out", "--model", tiny_llama, "--overwrite", "--json")
    assert json.loads(said.out)["kind"] == "mlx adapter"
    assert topwork("convert", tmp_path / "nowhere", tmp_path / "x").code == 2
