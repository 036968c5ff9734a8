"""bitsandbytes' checkpoint tensors: the same both ways, and every altered field refused by the layer's name."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from topwork.common.errors import ModelError
from topwork.ops.packed import Packed, Packed4bit, pack_4bit, pack_int8
from topwork.ops.quantize import FLOATS
from topwork.quantization.bnb_format import STATE, from_tensors, layer_of, to_tensors

LAYER = "model.layers.3.mlp.up_proj"
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
TYPES = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test")
    from bitsandbytes import functional

    return functional


def assert_same(one: Packed, other: Packed) -> None:
    assert type(one) is type(other)
    for name, value in vars(one).items():
        found = getattr(other, name)
        same = torch.equal(value, found) if isinstance(value, Tensor) else value == found
        assert same, name


@TYPES
@DOUBLE
@DTYPES
def test_what_is_written_reads_back(quant_type: str, double: bool, dtype: torch.dtype) -> None:
    for shape, block_size in (((64, 96), 64), ((7, 9), 32), ((1, 1), 4096), ((130, 70), 128)):
        packed = pack_4bit(torch.randn(shape).to(dtype), quant_type, block_size, double)
        through_a_file = load(save(to_tensors(packed)))
        assert_same(from_tensors(LAYER, through_a_file), packed)


def test_int8_reads_back() -> None:
    packed = pack_int8(torch.randn(7, 9).half())
    assert_same(from_tensors(LAYER, load(save(to_tensors(packed)))), packed)


@TYPES
@DOUBLE
@DTYPES
def test_bitsandbytes_reads_what_is_written(functional, quant_type: str, double: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    tensors = to_tensors(pack_4bit(weight, quant_type, 64, double))
    constants = {name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"}
    read = functional.QuantState.from_dict(constants, torch.device("cpu"))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double)
    assert read == state
    assert read.nested == double
    assert torch.equal(tensors["weight"], codes)
    assert torch.equal(functional.dequantize_4bit(tensors["weight"], read), functional.dequantize_4bit(codes, state))


@TYPES
@DOUBLE
@DTYPES
def test_what_bitsandbytes_writes_is_what_we_write(functional, quant_type: str, double: bool, dtype) -> None:
    weight = torch.randn(40, 64).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double)
    theirs = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()} | {"weight": codes}
    packed = pack_4bit(weight, quant_type, 64, double)
    ours = to_tensors(packed)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if STATE in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(value.tolist()))
        else:
            assert torch.equal(ours[name], value), name
            assert ours[name].dtype == value.dtype
    assert_same(from_tensors(LAYER, theirs), packed)


def test_codes_stored_as_another_type_are_read_by_their_bytes(functional) -> None:
    """bnb_4bit_quant_storage: what FSDP asks for."""
    weight = torch.randn(40, 64)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16)
    theirs = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()} | {"weight": codes}
    assert_same(from_tensors(LAYER, theirs), pack_4bit(weight, "nf4", 64, False))


def test_keys_are_told_apart() -> None:
    for packed in (pack_4bit(torch.randn(4, 64), "nf4", 64, True), pack_int8(torch.randn(4, 64))):
        for part in to_tensors(packed):
            expected = None if part == "weight" else (LAYER, part)
            assert layer_of(f"{LAYER}.{part}") == expected
    assert layer_of(f"{LAYER}.bias") is None
    assert layer_of("model.norm.weight") is None


Tensors = dict[str, Tensor]


def said(**changes: Any) -> Callable[[Tensors], Tensors]:
    """The description with other fields; None takes one out."""

    def change(tensors: Tensors) -> Tensors:
        (name,) = (name for name in tensors if STATE in name)
        state = json.loads(bytes(tensors[name].tolist())) | changes
        kept = {key: value for key, value in state.items() if value is not None}
        return tensors | {name: torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)}

    return change


def part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def renamed(to: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {(to if STATE in key else key): value for key, value in tensors.items()}


def with_one(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


DESCRIPTION = f"weight.{STATE}nf4"
ALTERED: dict[str, Callable[[Tensors], Tensors]] = {
    "codes gone": without("weight"),
    "codes cut": part("weight", lambda codes: codes[:-1]),
    "codes too many": part("weight", lambda codes: torch.cat([codes, codes[:1]])),
    "codes in a wider type": part("weight", lambda codes: codes.float()),
    "absmax gone": without("weight.absmax"),
    "absmax cut": part("weight.absmax", lambda absmax: absmax[:-1]),
    "absmax in another type": part("weight.absmax", lambda absmax: absmax.half()),
    "map gone": without("weight.quant_map"),
    "map cut": part("weight.quant_map", lambda code: code[:-1]),
    "map altered": part("weight.quant_map", with_one(0.9)),
    "map not a number": part("weight.quant_map", with_one(float("nan"))),
    "description gone": without(DESCRIPTION),
    "description cut": part(DESCRIPTION, lambda text: text[:-5]),
    "description empty": part(DESCRIPTION, lambda text: text[:0]),
    "description no bytes": part(DESCRIPTION, lambda text: text.float() + 0.5),
    "description a list": part(DESCRIPTION, lambda _: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)),
    "description twice": lambda tensors: tensors | {f"weight.{STATE}fp4": tensors[DESCRIPTION]},
    "description under another name": renamed(f"weight.{STATE}fp4"),
    "type unknown": said(quant_type="int4"),
    "type another": said(quant_type="fp4"),
    "type gone": said(quant_type=None),
    "block size unknown": said(blocksize=48),
    "block size another": said(blocksize=128),
    "block size no number": said(blocksize="many"),
    "block size gone": said(blocksize=None),
    "dtype unknown": said(dtype="float12"),
    "dtype no float": said(dtype="int8"),
    "dtype no dtype": said(dtype="nn"),
    "dtype a number": said(dtype=3),
    "dtype gone": said(dtype=None),
    "shape another": said(shape=[40, 128]),
    "shape three": said(shape=[40, 8, 8]),
    "shape negative": said(shape=[-40, -64]),
    "shape words": said(shape=["forty", 64]),
    "shape no list": said(shape=2560),
    "shape gone": said(shape=None),
}
NESTED: dict[str, Callable[[Tensors], Tensors]] = {
    "nested absmax gone": without("weight.nested_absmax"),
    "nested absmax cut": part("weight.nested_absmax", lambda absmax: absmax[:0]),
    "nested absmax in another type": part("weight.nested_absmax", lambda absmax: absmax.half()),
    "nested absmax not finite": part("weight.nested_absmax", with_one(float("inf"))),
    "nested map gone": without("weight.nested_quant_map"),
    "nested map cut": part("weight.nested_quant_map", lambda code: code[1:]),
    "nested map altered": part("weight.nested_quant_map", with_one(0.97)),
    "nested map in another type": part("weight.nested_quant_map", lambda code: code.double()),
    "constants not in 8 bits": part("weight.absmax", lambda absmax: absmax.float()),
    "offset gone": said(nested_offset=None),
    "offset not finite": said(nested_offset=float("nan")),
    "offset a word": said(nested_offset="much"),
    "nested block size another": said(nested_blocksize=64),
    "nested block size a word": said(nested_blocksize="large"),
    "nested block size gone": said(nested_blocksize=None),
    "nested type another": said(nested_dtype="float16"),
}
SINGLE: dict[str, Callable[[Tensors], Tensors]] = {
    "absmax not finite": part("weight.absmax", with_one(float("nan"))),
    "constants said to be nested": said(nested_offset=0.1, nested_blocksize=256, nested_dtype="float32"),
}
INT8: dict[str, Callable[[Tensors], Tensors]] = {
    "codes gone": without("weight"),
    "codes cut": part("weight", lambda codes: codes[:-1]),
    "codes in another type": part("weight", lambda codes: codes.float()),
    "codes flat": part("weight", lambda codes: codes.flatten()),
    "constants gone": without("SCB"),
    "constants cut": part("SCB", lambda absmax: absmax[:-1]),
    "constants not finite": part("SCB", with_one(float("inf"))),
    "another layout": part("weight_format", lambda layout: layout + 1),
}


def refused(packed: Packed, change: Callable[[Tensors], Tensors]) -> None:
    altered = change(to_tensors(packed))
    with pytest.raises(ModelError, match=rf"^{LAYER}.*fetch or write it anew"):
        from_tensors(LAYER, altered)


@DOUBLE
@pytest.mark.parametrize("name", list(ALTERED))
def test_what_was_altered_is_refused_by_name(name: str, double: bool) -> None:
    refused(pack_4bit(torch.randn(40, 64), "nf4", 64, double), ALTERED[name])


@pytest.mark.parametrize("name", list(NESTED))
def test_altered_nested_constants_are_refused_by_name(name: str) -> None:
    refused(pack_4bit(torch.randn(40, 64), "nf4", 64, True), NESTED[name])


@pytest.mark.parametrize("name", list(SINGLE))
def test_altered_constants_are_refused_by_name(name: str) -> None:
    refused(pack_4bit(torch.randn(40, 64), "nf4", 64, False), SINGLE[name])


@pytest.mark.parametrize("name", list(INT8))
def test_altered_int8_is_refused_by_name(name: str) -> None:
    refused(pack_int8(torch.randn(40, 64).half()), INT8[name])


def test_only_known_kinds_are_written() -> None:
    with pytest.raises(TypeError, match="no checkpoint format for Packed"):
        to_tensors(Packed(torch.empty(0), torch.empty(0), (0, 0), torch.float32))


def test_a_weight_read_back_unpacks_to_the_same_values() -> None:
    packed = pack_4bit(torch.randn(33, 65), "fp4", 64, True)
    read = from_tensors(LAYER, load(save(to_tensors(packed))))
    assert isinstance(read, Packed4bit)
    assert torch.equal(read.dense(), packed.dense())
