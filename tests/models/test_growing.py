"""New tokens in a base: which rows it gets, what stays as it was, and that all ways to the same vocabulary agree."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from reference.families import alone, logits, sequences, tiny_model
from reference.measure import relative
from run import tiny
from topwork.common.errors import ModelError
from topwork.models.config import ModelConfig
from topwork.models.growing import grow, grown_lazily, with_rows
from topwork.models.lazy import open_lazily
from topwork.models.light_tokenizer import LightTokenizer
from topwork.models.load import load_base
from topwork.models.quantized import quantize_head
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
from topwork.models.structure_of import structure_of
from topwork.models.tokenizer import open_tokenizer
from topwork.models.vocabulary import Growth, grown, growth_of, planned_growth
from topwork.ops.batch import batch_of
from topwork.plan.base import stored_rows, structure_named
from topwork.plan.built import base_skeleton
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import QuantizedLinear, packed_modules

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
NEW = ["<scene>", "<cut>", "[sum]"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny base with head and embedding apart, and one with both tied."""
    place = tmp_path_factory.mktemp("growing")
    return {tied: tiny.write_model(place / str(tied), tie_word_embeddings=tied) for tied in (False, True)}


def config(folder: Path, **values: Any) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(folder), dtype="float32", device="cpu", **values)


def ends(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


@TIED
@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text"])
def test_new_rows_are_the_mean_and_old_ones_what_they_were(family: str, tied: bool) -> None:
    before = tiny_model(family, tie_word_embeddings=tied)
    after = copy.deepcopy(before)
    grow(after, Growth(99, 104, (99, 100)))
    for one, other in zip(ends(before), ends(after)):
        assert other.weight.shape[0] == 104
        assert torch.equal(other.weight[:99], one.weight)
        mean = one.weight.double().mean(0).float()
        assert torch.allclose(other.weight[99:], mean.expand(5, -1), rtol=0, atol=1e-7)
    if ends(after)[1].bias is not None:
        assert torch.equal(ends(after)[1].bias[:99], ends(before)[1].bias)
        assert torch.allclose(ends(after)[1].bias[99:], ends(before)[1].bias.mean())
    assert (ends(after)[1].weight is ends(after)[0].weight) is tied
    assert after.config.get_text_config().vocab_size == 104
    assert ends(after)[0].num_embeddings == ends(after)[1].out_features == 104
    old, new = (alone(model, sequences()) for model in (before, after))
    assert relative(new[:, :99], old) < 1e-6  # a product of more columns may sum in another order
    states = [model.base_model(input_ids=sequences()[0][None]).last_hidden_state for model in (before, after)]
    assert torch.equal(*states)


@TIED
def test_transformers_grows_to_nearly_the_same(tied: bool) -> None:
    """It draws around the mean, with 3e-5 of the rows' deviation."""
    ours, theirs = tiny_model("llama", tie_word_embeddings=tied), tiny_model("llama", tie_word_embeddings=tied)
    grow(ours, Growth(99, 107, ()))
    theirs.resize_token_embeddings(107)
    for one, other in zip(ends(ours), ends(theirs)):
        assert torch.allclose(one.weight, other.weight, rtol=0, atol=1e-3 * float(other.weight.detach().std()))


def test_a_token_in_a_spare_row_begins_as_the_mean_of_those_before_it() -> None:
    values = torch.randn(10, 3)
    found = with_rows(values, Growth(10, 12, (8, 9, 10)))
    assert torch.equal(found[:8], values[:8])
    assert torch.allclose(found[8:], values[:8].mean(0).expand(4, -1))


def test_the_order_of_summation_does_not_show() -> None:
    values = torch.randn(9000, 4, generator=torch.Generator().manual_seed(1))
    found = with_rows(values, Growth(9000, 9001, ()))
    assert torch.equal(found[-1], values.double().flip(0).mean(0).float())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@TIED
def test_a_packed_head_becomes_dense(tied: bool, kind: str) -> None:
    packed = tiny_model("llama", tie_word_embeddings=tied)
    quantize_head(packed, kind)
    before = packed.get_output_embeddings().packed.dense()
    grow(packed, Growth(99, 101, (99,)))
    assert not packed_modules(packed)
    assert torch.equal(packed.get_output_embeddings().weight[:99], before)
    assert (ends(packed)[0].weight is ends(packed)[1].weight) is tied


def test_other_embeddings_are_refused() -> None:
    model = tiny_model("llama")
    model.set_input_embeddings(nn.EmbeddingBag(99, 64))
    with pytest.raises(ModelError, match="embeds by a EmbeddingBag and ends in a Linear"):
        grow(model, Growth(99, 100, ()))


@TIED
def test_a_model_that_is_not_in_memory_grows_alike(folders: dict[bool, Path], tied: bool) -> None:
    growth = Growth(stored_rows(config(folders[tied])), 420, (400,))
    lazy = open_lazily(Source("tiny", str(folders[tied]), None))
    base = load_base(config(folders[tied]), lambda _: None)
    bare = skeleton(base.module.config)
    found = grown_lazily(lazy, bare, growth)
    grow(base.module, growth)
    grow(bare, growth)
    assert found.config["vocab_size"] == 420
    state = base.module.state_dict()
    assert all(torch.equal(tensor.fetch(), state[key]) for key, tensor in found.tensors.items())
    assert all(tuple(found.tensors[key].shape) == tuple(state[key].shape) for key in found.tensors)
    shapes = {key: tensor.shape for key, tensor in bare.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in state.items()}


@TIED
def test_a_base_with_new_tokens_is_the_same_base(folders: dict[bool, Path], tied: bool) -> None:
    said: list[str] = []
    before = load_base(config(folders[tied]), said.append)
    after = load_base(config(folders[tied], new_tokens=NEW, pad_to_multiple_of=16), said.append)
    rows, size = before.vocabulary, after.vocabulary
    assert after.fingerprint == before.fingerprint
    assert size == -(-(rows + 3) // 16) * 16
    assert (after.new_tokens, after.vocabulary_size) == (tuple(NEW), size)
    assert any(f"embedding and head have {size} rows, {size - rows} more than its weights" in line for line in said)
    assert after.tokenizer.convert_tokens_to_ids(NEW) == [rows, rows + 1, rows + 2]
    text = "a<cut>b [sum]"
    assert [token for token in after.tokenizer(text)["input_ids"] if token >= rows] == [rows + 1, rows + 2]
    assert after.tokenizer.decode(after.tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    batch = batch_of([torch.tensor(after.tokenizer("Hi there, see you soon.")["input_ids"])])
    assert torch.equal(after.hidden(batch), before.hidden(batch))
    assert relative(logits(after, batch)[:, :rows], logits(before, batch)) < 1e-6


@pytest.mark.parametrize("head", ["16bit", "int8", "nf4"])
@TIED
def test_a_quantized_base_grows_before_its_head_is_packed(folders: dict[bool, Path], tied: bool, head: str) -> None:
    wanted = QuantizationConfig(load_in_4bit=True, head=head)
    asked = config(folders[tied], new_tokens=NEW)
    before = load_base(config(folders[tied]), lambda _: None, wanted)
    after = load_base(asked, lambda _: None, wanted)
    dense = load_base(asked, lambda _: None)
    assert after.fingerprint == before.fingerprint == dense.fingerprint
    if head == "16bit":
        batch = batch_of([torch.tensor([5, 9, 11, 40])])
        assert torch.equal(after.hidden(batch), before.hidden(batch))
        return
    quantize_head(dense.module, head)
    assert isinstance(after.head, QuantizedLinear)
    assert torch.equal(after.head.packed.dense(), dense.head.packed.dense())  # type: ignore[operator, union-attr]


def test_another_tokenizer_with_more_tokens(folders: dict[bool, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[False])
    rows = len(tokenizer)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(tmp_path / "more")
    base = load_base(config(folders[False], tokenizer_name_or_path=str(tmp_path / "more")), lambda _: None)
    assert base.vocabulary == rows + 3
    assert base.tokenizer.convert_tokens_to_ids("[sum]") == rows + 2
    described = json.loads((tmp_path / "more" / "tokenizer.json").read_text("utf-8"))
    vocabulary = described["model"]["vocab"]
    vocabulary["H"], vocabulary["i"] = vocabulary["i"], vocabulary["H"]
    (tmp_path / "more" / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    with pytest.raises(ModelError, match="in the base's own tokenizer; give the base's with further tokens"):
        open_tokenizer(config(folders[False], tokenizer_name_or_path=str(tmp_path / "more")))


def test_a_token_that_there_is_a_row_for(folders: dict[bool, Path]) -> None:
    with pytest.raises(ModelError, match=r"'<\|im_end\|>', which the tokenizer has already: it is token \d+, and the"):
        open_tokenizer(config(folders[False], new_tokens=["<|im_end|>"]))


def test_a_token_that_would_not_be_written_as_it_is_read(folders: dict[bool, Path]) -> None:
    """Byte-level tokenizers write letters of Latin-1 in added tokens as single bytes."""
    with pytest.raises(ModelError, match=r"'<größe>', which this tokenizer would write as .*spell it in ASCII"):
        open_tokenizer(config(folders[False], new_tokens=["<größe>"]))


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], ["<a>", ""]])
def test_tokens_that_cannot_be(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match="new_tokens names"):
        ModelConfig(model_name_or_path="x", new_tokens=tokens)


def test_a_tokenizer_that_lacks_a_new_token() -> None:
    with pytest.raises(ModelError, match="'<cut>', which the tokenizer that was given lacks"):
        growth_of(ModelConfig(model_name_or_path="x", new_tokens=["<cut>"]), 8, {"a": 0})


@TIED
def test_what_is_planned_is_what_is_loaded(folders: dict[bool, Path], tied: bool) -> None:
    asked = config(folders[tied], new_tokens=NEW, pad_to_multiple_of=8)
    base = load_base(asked, lambda _: None)
    told, seen = structure_named(asked), structure_of(base.module, fast=True)
    assert told.vocabulary == base.vocabulary
    assert [module for module in told.modules if module.weights] == [m for m in seen.modules if m.weights]
    assert told.parameters == seen.parameters == base.module.num_parameters()
    assert base_skeleton(asked).num_parameters() == told.parameters
    assert structure_of(tiny_model("phi", vocab_size=107), fast=True).modules == (
        grown(structure_of(tiny_model("phi"), fast=True), 107).modules
    )


def test_new_ids_are_known_without_transformers(folders: dict[bool, Path]) -> None:
    light = LightTokenizer(folders[False], NEW).backend_tokenizer
    real, _ = open_tokenizer(config(folders[False], new_tokens=NEW))
    assert light.get_vocab(with_added_tokens=True) == real.get_vocab()
    text = "Hi<scene>there [sum]<cut>"
    assert light.encode(text).ids == real(text)["input_ids"]


def test_without_a_tokenizer_every_new_token_is_a_row() -> None:
    found = planned_growth(ModelConfig(model_name_or_path="nowhere/at-all", new_tokens=NEW), 100)
    assert found == Growth(100, 103, (100, 101, 102))
    assert planned_growth(ModelConfig(model_name_or_path="nowhere/at-all"), 100) is None
    assert planned_growth(ModelConfig(model_name_or_path="nowhere/at-all", vocabulary_size=90), 100) is None
