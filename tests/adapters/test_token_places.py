"""Which rows of embedding and head `trainable_token_indices` means, and what new tokens add to it."""

from typing import Any

import pytest

from reference.families import tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_base
from topwork.adapters.methods.lora.token_places import Tokens, token_places, with_tokens
from topwork.adapters.sizes import tensor_sizes
from topwork.common.errors import AdapterError, RequestError
from topwork.models.structure_of import structure_of
from topwork.plan.new_tokens import training_rows

BOTH = {"embed_tokens": [4, 9], "lm_head": [4, 9]}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def seen(tied: bool) -> Any:
    return bare_base(tiny_base("llama", tie_word_embeddings=tied).module).seen


@pytest.mark.parametrize(
    ("tied", "named", "expected"),
    [
        (False, [4, 9], [Tokens(EMBEDDING, False, 64, (4, 9))]),
        (True, [4, 9], [Tokens(EMBEDDING, False, 64, (4, 9), HEAD)]),
        (False, BOTH, [Tokens(EMBEDDING, False, 64, (4, 9)), Tokens(HEAD, True, 64, (4, 9))]),
        (True, BOTH, [Tokens(EMBEDDING, False, 64, (4, 9), HEAD)]),
        (False, {"lm_head": [3]}, [Tokens(HEAD, True, 64, (3,))]),
        (False, {"model.embed_tokens": [3]}, [Tokens(EMBEDDING, False, 64, (3,))]),
        (False, None, []),
    ],
)
def test_rows_by_module(tied: bool, named: Any, expected: list[Tokens]) -> None:
    assert token_places(seen(tied), named) == expected


@pytest.mark.parametrize(
    ("tied", "named", "told"),
    [
        (True, {"embed_tokens": [4], "lm_head": [5]}, "names other tokens for lm_head than for model.embed_tokens"),
        (True, {"lm_head": [5]}, "which hold one weight in this base"),
        (False, {"q_proj": [5]}, "names 'q_proj'; rows of tokens are those of model.embed_tokens and lm_head"),
        (False, {"lm_head": [99]}, r"has \[99\]; the base has 0 to 98.*model.vocabulary_size: 100"),
        (False, {"lm_head": []}, "has no ids"),
        (False, list(range(90, 120)), r"has \[99, 100, 101, 102, 103, 104, 105, 106\]; .*vocabulary_size: 120"),
    ],
)
def test_rows_that_cannot_be_trained(tied: bool, named: Any, told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        token_places(seen(tied), named)


@pytest.mark.parametrize(
    ("tied", "named", "whole", "expected"),
    [
        (True, None, (), [97, 98]),
        (True, [5], (), [5, 97, 98]),
        (True, [98, 5], (), [98, 5, 97]),
        (False, None, (), {"embed_tokens": [97, 98], "lm_head": [97, 98]}),
        (False, [5], (), {"embed_tokens": [5, 97, 98], "lm_head": [97, 98]}),
        (False, {"lm_head": [98, 5]}, (), {"embed_tokens": [97, 98], "lm_head": [98, 5, 97]}),
        (False, None, ("lm_head",), {"embed_tokens": [97, 98]}),
        (False, None, ("embed_tokens", "lm_head"), None),
        (True, None, ("embed_tokens",), None),
    ],
)
def test_new_tokens_are_trained_beside_those_that_are_named(
    tied: bool, named: Any, whole: tuple[str, ...], expected: Any
) -> None:
    found = with_tokens(seen(tied), named, [97, 98], whole)
    assert found == expected
    assert with_tokens(seen(tied), found, [97, 98], whole) == expected  # a recipe that was written down so


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_parts(tied: bool) -> None:
    base = tiny_base("llama", tie_word_embeddings=tied)
    config = AdapterConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BOTH)
    sizes = tensor_sizes(structure_of(base.module, fast=True), config)
    adapters = Adapters(base.module)
    adapters.add("a", config)
    parts = {path: tuple(p.numel() for p in part.tensors().values()) for path, part in adapters.parts("a").items()}
    assert {path: sorted(own) for path, own in sizes.items()} == {path: sorted(own) for path, own in parts.items()}
    assert sum(map(len, parts.values())) == 2 * 2 + (1 if tied else 2)
    assert config.trained_tokens == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["ia3", "prefix", "bitfit"])
def test_methods_that_train_no_rows_are_refused(method: str) -> None:
    with pytest.raises(RequestError, match=f"method {method} trains no rows of model.embed_tokens and lm_head"):
        training_rows(AdapterConfig(method=method), seen(False), [98])


@pytest.mark.parametrize(
    "config",
    [AdapterConfig(method="full"), AdapterConfig(method="ia3", modules_to_save=["embed_tokens", "lm_head"])],
)
def test_methods_that_train_all_rows_need_no_more(config: AdapterConfig) -> None:
    assert training_rows(config, seen(False), [98]) is config
