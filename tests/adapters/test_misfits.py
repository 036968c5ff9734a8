"""Adapters that do not fit, each told as its kind, and files of other makes, told as what they are."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForSequenceClassification

from adapters.test_file_names import by_folder, by_init_from, by_server, by_streaming_merge
from reference.families import randomise, tiny_base, tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.foreign import read_foreign
from topwork.adapters.graft import Adapters
from topwork.adapters.misfits import misfit
from topwork.adapters.on_base import refuse_unusable
from topwork.adapters.peft_format import BaseId, read_adapter, write_adapter
from topwork.common.errors import AdapterError
from topwork.run.convert import convert

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
READERS: dict[str, Callable[..., Tensor]] = {
    "folder": by_folder, "server": by_server, "init_from": by_init_from, "streaming merge": by_streaming_merge,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter."""
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, target_modules=["q_proj"]))
    randomise(adapters, "a")
    write_adapter(tmp_path / "adapter", adapters, "a", BaseId("tiny"))
    return tmp_path / "adapter"


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(ending))


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors, "lora_B.weight")][0, 0] = torch.nan


def with_infinity(tensors: dict[str, Tensor]) -> None:
    tensors[first(tensors, "lora_A.weight")][1, 2] = -torch.inf


def emptied(tensors: dict[str, Tensor]) -> None:
    for key in sorted(tensors)[1:]:
        tensors[key] = torch.empty(0)


def flat(tensors: dict[str, Tensor]) -> None:
    key = first(tensors, "lora_A.weight")
    tensors[key] = tensors[key].flatten()


def with_lengths(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}{Q}.lora_magnitude_vector"] = torch.ones(64)


def with_later_layers(tensors: dict[str, Tensor]) -> None:
    tensors |= {key.replace("layers.1.", "layers.23."): t.clone() for key, t in tensors.items() if "layers.1." in key}


def with_score(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}score.weight"] = torch.ones(2, 64)


def with_value_head(tensors: dict[str, Tensor]) -> None:
    tensors["v_head.summary.weight"] = torch.ones(1, 64)


def with_mlx_names(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.lora_a"] = torch.ones(64, 4)


KINDS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (with_nan, r"holds NaN or infinite values \(1 tensors, first model\.layers\.0.*lora_B.weight\)"),
    "infinity": (with_infinity, r"holds NaN or infinite values .*take an earlier checkpoint"),
    "empty": (emptied, r"holds 3 of 4 tensors as shards .*of shape \[0\]\): DeepSpeed ZeRO-3 or FSDP"),
    "flat": (flat, r"holds 1 of 4 tensors as shards .*lora_A\.weight, of shape \[256\]"),
    "a classifier": (with_score, r"a classifier's head \(score\.weight, \[2, 64\]\), and this base writes text"),
    "a value head": (with_value_head, r"a value head \(v_head\.summary\.weight, \[1, 64\]\)"),
    "lengths": (with_lengths, r"DoRA's lengths at 1 modules .*use_dora: false; say true"),
    "other layers": (with_later_layers, r"layers up to 23 \(2 tensors, first .*by the options the last one here is 1"),
    "mlx's names": (with_mlx_names, r"1 unknown \(first model\.layers\.0\.self_attn\.q_proj\.lora_a\)"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_every_reader(kind: str, reader: str, folder: Path) -> None:
    change, told = KINDS[kind]
    base = tiny_base()
    before = [name for name, _ in base.module.named_modules()]
    if kind in ("NaN", "infinity") and reader == "server":
        told = "holds values that are not finite"
    with pytest.raises(AdapterError, match=told):
        READERS[reader](base, read_adapter(edited(folder, change)), folder)
    if reader != "init_from":
        assert [name for name, _ in base.module.named_modules()] == before


def own(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {key.replace("__", "."): torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("here", "there", "told"),
    [
        (own(q__lora_A__weight=(8, 64), q__lora_B__weight=(32, 8)),
         own(q__lora_A__weight=(4, 64), q__lora_B__weight=(32, 4)),
         r"^q has the rank 4 in the file and 8 by the options \(1 modules in all\); set r, or rank_pattern"),
        (own(q__lora_A__weight=(4, 64)), own(q__lora_A__weight=(4, 128)),
         r"^1 of another shape \(first q\.lora_A\.weight: \(4, 128\) in the file, \(4, 64\) here\)\. Is it another"),
        (own(q__lora_A__weight=(4, 64)), own(), r"^1 missing \(first q\.lora_A\.weight\)$"),
        (own(m__q__lora_A__weight=(4, 64), m__q__lora_magnitude_vector=(3,)), own(m__q__lora_A__weight=(4, 64)),
         r"^the options say use_dora: true, and 1 modules have no length in the file"),
        (own(m__q__lora_A__weight=(4, 64)), own(m__q__lora_A__weight=(4, 64), head__weight=(9, 4)),
         r"^the file holds head whole \(1 modules\), which the options do not name; add .* to modules_to_save$"),
        (own(m__q__lora_A__weight=(4, 64)), own(x__q__lora_A__weight=(4, 64)),
         r"^1 names begin with 'x\.q\.', which no module here does \('m\.q\.' does\).*; 1 missing"),
        (own(q__lora_A__weight=(4, 64)), own(q__lora_A__weight=(4, 64)), None),
    ],
)  # fmt: skip
def test_what_a_misfit_is(here: dict[str, Tensor], there: dict[str, Tensor], told: str | None) -> None:
    found = misfit(here, there)
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(told, found), found


def test_half_numbers_of_eight_bits_are_looked_at() -> None:
    refuse_unusable({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "x")
    with pytest.raises(AdapterError, match="x holds NaN"):
        refuse_unusable({"a": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)}, "x")


def test_a_classifier_as_peft_saves_it(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    config.num_labels = 2
    model = get_peft_model(LlamaForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS", r=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"holds a classifier's head \(score\.weight"):
        by_folder(tiny_base(), read_adapter(tmp_path), tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4921\n"


def without_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def mlx(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapters.safetensors")
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}))


def mlx_beside(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps({"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}}))


def pickled(folder: Path) -> None:
    without_tensors(folder)
    (folder / "adapter_model.bin").write_bytes(b"PK\3\4")


def a_model(folder: Path) -> None:
    (folder / CONFIG).rename(folder / "config.json")
    (folder / TENSORS).rename(folder / "model.safetensors")


def inside(folder: Path) -> None:
    inner = folder / "support"
    inner.mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).rename(inner / name)


def gguf(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / TENSORS).rename(folder / "lora.gguf")


def sharded(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model-00001-of-00002.safetensors")


def diffusion(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / TENSORS).rename(folder / "pytorch_lora_weights.safetensors")


MAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tensors": (without_tensors, r"it has no adapter_model\.safetensors, which a PEFT folder has"),
    "a Git LFS pointer": (lambda f: (f / TENSORS).write_bytes(POINTER), "is a Git LFS pointer, a note in the place"),
    "a config that is one": (lambda f: (f / CONFIG).write_bytes(POINTER), r"adapter_config\.json is a Git LFS pointer"),
    "mlx-lm's": (mlx, r"mlx-lm's .*`topwork convert` makes a PEFT folder of it"),
    "mlx-lm's, half": (mlx_beside, r"mlx-lm's .*`topwork convert` makes a PEFT folder of it"),
    "a pickle": (pickled, r"holds its tensors in 'adapter_model\.bin', and reading a pickle runs code; save it again"),
    "a model": (a_model, r"a model's own folder \(config\.json\), not an adapter's; give it as the base \(--model\)"),
    "in a folder": (inside, r"it holds 'support' in folders of their own; give one of them"),
    "llama.cpp's": (gguf, r"holds 'lora\.gguf', an adapter or a model of llama\.cpp's; `topwork convert`"),
    "several files": (sharded, r"its tensors are in several files .*put them into one"),
    "of a diffusion model": (diffusion, r"an adapter of a diffusion model"),
}


@pytest.mark.parametrize("make", MAKES)
def test_other_makes_are_told_by_both_readers(make: str, folder: Path) -> None:
    change, told = MAKES[make]
    change(folder)
    with pytest.raises(AdapterError, match=told):
        read_adapter(folder)
    with pytest.raises(AdapterError, match=told) as error:
        read_foreign(folder, "adapter 'x'")
    assert str(folder.parent) not in str(error.value)


def test_what_is_said_of_mlx_is_true(folder: Path, tmp_path: Path) -> None:
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / TENSORS).items()}
    mlx(folder)
    turned = {}
    for key, tensor in tensors.items():
        turned[key.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")] = tensor.t().contiguous()
    save_file(turned, folder / "adapters.safetensors")
    convert(folder, tmp_path / "out", log=lambda _: None)
    assert read_adapter(tmp_path / "out").tensors.keys() == tensors.keys()
