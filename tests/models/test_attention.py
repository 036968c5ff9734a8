"""The attention function that transformers calls: what it cannot do is refused by name and not left out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reference.attention import attention_by_sequence
from reference.families import tiny_model
from reference.measure import relative
from topwork.common.errors import ModelError
from topwork.models.attention import FLAT, flat_attention_forward, use_flat_attention
from topwork.ops.batch import batch_of
from topwork.ops.context import current_batch, running

BATCH = batch_of([torch.zeros(length, dtype=torch.int64) for length in (4, 1, 6)])


class Causal(nn.Module):
    is_causal = True


def called(value_size: int = 8, module: nn.Module | None = None, **values: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(what comes out, the truth), for queries and keys [1, H, T, 8]."""
    query, key, value = torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, value_size)
    with running(BATCH):
        out, weights = flat_attention_forward(module or Causal(), query, key, value, None, **values)
    assert weights is None
    truth = attention_by_sequence(
        *(x[0].transpose(0, 1) for x in (query, key, value)), BATCH.cu_seqlens, values.get("scaling") or 8**-0.5,
        values.get("sliding_window"), values.get("softcap"), values.get("s_aux"),
    )  # fmt: skip
    return out, truth


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scaling": 0.3},
        {"sliding_window": 3},
        {"softcap": 0.5},
        {"s_aux": torch.tensor([0.1, -1.0, 2.0, 0.0])},
        {"value_size": 5},
        {"value_size": 5, "softcap": 0.5, "sliding_window": 2},
        {"position_ids": torch.arange(11), "output_attentions": False, "is_causal": True},
    ],
    ids=str,
)
def test_the_contract_with_transformers(values: dict[str, Any]) -> None:
    out, truth = called(**values)
    assert out.shape == (1, 11, 4, values.get("value_size", 8))
    assert relative(out[0], truth) < 2e-6


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"dropout": 0.1}, "Causal asks for attention dropout 0.1"),
        ({"is_causal": False}, "Causal attends in both directions"),
        ({"alibi": torch.zeros(4)}, "Causal passes alibi to its attention"),
        ({"position_bias": torch.zeros(4), "head_mask": torch.zeros(4)}, "passes head_mask, position_bias"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        called(**values)


def test_a_mask_or_both_directions_are_refused() -> None:
    query = torch.randn(1, 2, 11, 8)
    with running(BATCH), pytest.raises(ModelError, match="brings an attention mask of its own"):
        flat_attention_forward(Causal(), query, query, query, torch.zeros(1, 1, 11, 11))
    both = Causal()
    both.is_causal = False
    with pytest.raises(ModelError, match="attends in both directions"):
        called(module=both)


def test_outside_a_stream_it_says_how_to_call() -> None:
    query = torch.randn(1, 2, 11, 8)
    with pytest.raises(RuntimeError, match="call it through topwork"):
        flat_attention_forward(Causal(), query, query, query, None)


def test_streams_may_be_nested_and_end_with_their_block() -> None:
    other = batch_of([torch.zeros(2, dtype=torch.int64)])
    with running(BATCH):
        with running(other):
            assert current_batch() is other
        assert current_batch() is BATCH
    with pytest.raises(RuntimeError):
        current_batch()


def refused(**values: Any) -> str:
    model = tiny_model("llama")
    for key, value in values.items():
        setattr(model.config, key, value)
    before = model.config._attn_implementation
    with pytest.raises(ModelError) as error:
        use_flat_attention(model)
    assert model.config._attn_implementation == before
    return str(error.value)


def test_layers_with_state_and_chunks_are_refused_by_name() -> None:
    told = refused(layer_types=["full_attention", "mamba", "conv"])
    assert told.startswith("llama: layers of type conv, mamba carry state")
    assert "chunked attention (attention_chunk_size)" in refused(attention_chunk_size=8)


def test_attention_that_cannot_be_exchanged_is_refused_by_name() -> None:
    class Fixed:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="fixed"))

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            return False

    with pytest.raises(ModelError, match=r"^fixed: its attention is not exchangeable"):
        use_flat_attention(Fixed())  # type: ignore[arg-type]


def test_a_model_is_set_by_name_alone() -> None:
    model = tiny_model("gemma2")
    use_flat_attention(model)
    assert model.config._attn_implementation == FLAT
