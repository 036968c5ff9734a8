"""What a model reads while it runs over a batch: the one context variable there is.

Hugging Face models pass neither a batch's bounds nor its segments on, so the attention function that is registered with
transformers, the adapted layers and the ops read them from here, and where a training pass has memory of its own
(`ops/workspace.py`) what they keep comes from it.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import Batch
from topwork.ops.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Virtual:
    """An adapter's P learned tokens that stand before a text: embeddings [P, d] (prompt tuning), or for each layer the
    keys and values [2, P, H_kv, D] that attention sees of them (prefix tuning).

    `rows` [n * P] int64 are the places of n copies in a batch, one after the other; None while it has none.
    """

    count: int
    embeddings: Tensor | None = None
    keys_values: tuple[Tensor, ...] = ()
    rows: Tensor | None = None

    def over(self, x: Tensor, learned: Tensor) -> Tensor:
        """x [T, ...] with `learned` [P, ...] in the place of its rows; gradients reach both."""
        assert self.rows is not None
        copies = len(self.rows) // self.count
        return x.index_copy(0, self.rows, learned.to(x.dtype).expand(copies, *learned.shape).flatten(0, 1))


Prefix = tuple[Tensor, Tensor]
"""Rows [n * P] of a batch whose keys and values are learned in a layer, and those [2, P, H_kv, D]."""


class AttentionCache(Protocol):
    """Keys and values of earlier passes, while generating."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None
    ) -> Tensor:
        """Attention [n, H, D] of n new tokens (q [n, H, D], k and v [n, H_kv, D]) with what is held and themselves."""
        ...


@dataclass(frozen=True, eq=False)
class PassContext:
    """One pass.

    virtual      the learned tokens in the batch; `models/virtual.py` puts them there
    given_rows   where virtual tokens were put in: row i of the batch that was given is the row given_rows[i]
    cache        keys and values of earlier passes, while generating
    recomputing  a layer runs again going backward: what no gradient depends on may be left out
    workspace    where a training pass, forward and backward, has what it keeps
    """

    batch: Batch | None = None
    virtual: tuple[Virtual, ...] = ()
    given_rows: Tensor | None = None
    cache: AttentionCache | None = None
    recomputing: bool = False
    workspace: Workspace | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this what `current` gives, until the block ends."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def prefixes(self, layer: int) -> tuple[Prefix, ...]:
        """What is learned of a layer's keys and values."""
        return tuple((v.rows, v.keys_values[layer]) for v in self.virtual if v.keys_values and v.rows is not None)

    def with_prefix(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values [T, H_kv, D] of a layer, rotated, with the learned ones in their places."""
        for virtual in self.virtual:
            if virtual.keys_values:
                learned = virtual.keys_values[layer]
                keys, values = virtual.over(keys, learned[0]), virtual.over(values, learned[1])
        return keys, values

    def learned(self) -> list[Tensor]:
        """The keys and values in it that learn: what a layer takes from here and not from what it is given."""
        return [x for virtual in self.virtual for x in virtual.keys_values if x.requires_grad]

    def with_learned(self, tensors: Sequence[Tensor]) -> "PassContext":
        """The same with others in the places of those that `learned` tells."""
        given = iter(tensors)
        virtual = [
            replace(v, keys_values=tuple(next(given) if x.requires_grad else x for x in v.keys_values))
            for v in self.virtual
        ]
        return replace(self, virtual=tuple(virtual))

    def back(self, hidden: Tensor) -> Tensor:
        """Hidden states as the batch that was given has them, from all rows or, [n, d], from those asked for."""
        assert self.batch is not None
        if self.given_rows is None or len(hidden) != len(self.batch):
            return hidden
        return hidden.index_select(0, self.given_rows)


_NOTHING = PassContext()
_NO_SCOPE = nullcontext()
_CURRENT: ContextVar[PassContext] = ContextVar("topwork_pass", default=_NOTHING)


def current() -> PassContext:
    """The pass under way."""
    return _CURRENT.get()


def current_batch() -> Batch:
    """The batch being run. Raises RuntimeError where there is none."""
    batch = _CURRENT.get().batch
    if batch is None:
        raise RuntimeError(
            "a model prepared by Topwork was called without a batch; call it through topwork.models.base.Base "
            "(hidden, log_probabilities) or inside `with running(batch):`"
        )
    return batch


@contextmanager
def running(
    batch: Batch, cache: AttentionCache | None = None, virtual: tuple[Virtual, ...] = ()
) -> Iterator[PassContext]:
    """A pass over a batch, in the workspace of what is under way."""
    context = replace(current(), batch=batch, cache=cache, virtual=virtual, given_rows=None)
    with context.active():
        yield context


@contextmanager
def training_pass(workspace: Workspace | None) -> Iterator[None]:
    """A pass forward and backward, whose memory is the workspace's: what the one before kept is overwritten."""
    assert current().workspace is None, "a pass inside another would overwrite what that one kept"
    if workspace is not None:
        workspace.begin_pass()
    with replace(current(), workspace=workspace).active():
        yield


@contextmanager
def without_workspace() -> Iterator[None]:
    """For what keeps nothing, or is computed again going backward and does not keep it for long."""
    with replace(current(), workspace=None).active():
        yield


def scratch_scope() -> AbstractContextManager[None]:
    """Around what `scratch_empty` is for, in a function that returns none of it."""
    workspace = _CURRENT.get().workspace
    return _NO_SCOPE if workspace is None else workspace.scope()


def has_workspace(like: Tensor) -> bool:
    """Whether tensors of this device come from a workspace."""
    return _workspace_for(like) is not None


def saved_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape)`, for a tensor that is kept until the pass has gone backward."""
    workspace = _workspace_for(like)
    dtype = dtype or like.dtype
    return workspace.saved(shape, dtype) if workspace else like.new_empty(shape, dtype=dtype)


def scratch_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape)`; within `scratch_scope` it is gone when that ends."""
    workspace = _workspace_for(like)
    dtype = dtype or like.dtype
    found = workspace.scratch(shape, dtype) if workspace else None
    return like.new_empty(shape, dtype=dtype) if found is None else found


def handoff_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape)`, for what is used up before this is called again."""
    workspace = _workspace_for(like)
    dtype = dtype or like.dtype
    return workspace.handoff(shape, dtype) if workspace else like.new_empty(shape, dtype=dtype)


def handback_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """The same for what a branch begins with, or its gradient, beside what is handed on."""
    workspace = _workspace_for(like)
    dtype = dtype or like.dtype
    return workspace.handback(shape, dtype) if workspace else like.new_empty(shape, dtype=dtype)


def _workspace_for(like: Tensor) -> Workspace | None:
    return _CURRENT.get().workspace if like.is_cpu else None
