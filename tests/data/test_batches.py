"""Order, packing and the flat batch of a pass."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topwork.common.errors import DataError
from topwork.data.batches import collate, collate_segments, order, pack, step_indices, steps_per_epoch
from topwork.data.examples import Example
from topwork.ops.batch import Segment


@given(count=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 2**31), epoch=st.integers(0, 4))
def test_every_epoch_sees_every_row_once(count: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = steps_per_epoch(count, batch_size)
    batches = [step_indices(count, batch_size, seed, epoch * steps + step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    flat = [row for batch in batches for row in batch]
    assert sorted(flat) == list(range(count))
    assert flat == order(count, seed, epoch).tolist()


def test_order_changes_with_seed_and_epoch_only() -> None:
    first = order(100, 3, 0).tolist()
    assert first == order(100, 3, 0).tolist()
    assert first != order(100, 3, 1).tolist()
    assert first != order(100, 4, 0).tolist()


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_pack_holds_the_budget_and_every_index_once(lengths: list[int], budget: int) -> None:
    passes = pack(lengths, budget)
    assert sorted(index for indices in passes for index in indices) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in indices) for indices in passes]
    assert all(0 < load <= budget for load in loads)
    assert passes == pack(lengths, budget)
    # Best fit never leaves two passes that would go into one.
    assert all(one + other > budget for i, one in enumerate(loads) for other in loads[:i])


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=60),
    st.integers(40, 120),
)
def test_packed_by_owners_each_index_stands_once_and_one_owner_is_packed_as_ever(rows, budget) -> None:
    lengths, owners = [length for length, _ in rows], [owner for _, owner in rows]
    passes = pack(lengths, budget, owners)
    assert sorted(index for indices in passes for index in indices) == list(range(len(rows)))
    assert all(sum(lengths[index] for index in indices) <= budget for indices in passes)
    assert pack(lengths, budget, [7] * len(rows)) == pack(lengths, budget)


def test_owners_that_fill_passes_by_themselves_do_not_meet() -> None:
    """And small ones share."""
    assert pack([50] * 6, 100, [0, 1, 2, 0, 1, 2]) == [[0, 3], [1, 4], [2, 5]]
    assert pack([10] * 6, 100, [0, 1, 2, 0, 1, 2]) == [[0, 1, 2, 3, 4, 5]]
    assert pack([60, 60, 30, 30], 100, [0, 1, 0, 1]) == [[0, 2], [1, 3]]
    assert pack([60, 40, 60, 40], 100, [0, 1, 1, 2]) == [[0, 3], [1, 2]]


def test_pack_fills_the_fullest_pass_that_fits() -> None:
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    with pytest.raises(DataError, match=r"11 tokens .*tokens_per_pass = 10; set tokens_per_pass to at least 11"):
        pack([3, 11], 10)


def example(tokens: list[int], weights: list[float]) -> Example:
    return Example(np.array(tokens, dtype=np.int32), np.array(weights, dtype=np.float32), "a:1")


ONE, TWO, THREE = example([5, 6, 7], [0, 0, 1]), example([8, 9], [0, 0.5]), example([1, 2, 3, 4], [0, 1, 0, 2])


def test_collate_is_one_flat_stream() -> None:
    batch = collate([ONE, TWO, THREE])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens == (0, 3, 5, 9)
    assert batch.segments == (Segment(0, 9, "default"),)
    assert batch.labels.positions.tolist() == [1, 3, 5, 7]
    assert batch.labels.targets.tolist() == [7, 9, 2, 4]
    assert batch.labels.loss_weights.tolist() == [1, 0.5, 1, 2]
    assert (batch.tokens.dtype, batch.labels.positions.dtype, batch.labels.loss_weights.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )


def test_segments_belong_to_their_adapters() -> None:
    batch = collate_segments([("a", [ONE]), ("empty", []), (None, [TWO, THREE])])
    assert batch.segments == (Segment(0, 3, "a"), Segment(3, 9, None))
    assert torch.equal(batch.tokens, collate([ONE, TWO, THREE]).tokens)
    with pytest.raises(ValueError, match="at least one example"):
        collate([])
