"""A base with more rows in its embedding and its head than its weights have: new tokens.

New rows are the mean of those that tokens were trained for, so a new token begins about as likely as the average one
and takes nothing away from the others (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models",
2021). transformers' `resize_token_embeddings` means the same and draws around that mean with a billionth of the rows'
covariance; here nothing is drawn, so that whoever grows a base gets the same bits. Old rows are not touched.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from topwork.common.errors import ModelError
from topwork.models.lazy import LazyModel, LazyTensor
from topwork.models.stored_names import stored_names
from topwork.models.vocabulary import Growth
from topwork.quantization.linear import PackedModule

ROWS_AT_ONCE = 4096
VOCABULARY = "vocab_size"


@torch.no_grad()
def grow(model: PreTrainedModel, growth: Growth) -> None:
    """Give a model, or its skeleton, the rows that `growth` asks for, in place; a head that is tied to the embedding
    stays so. A packed head becomes dense: rows cannot be added to what is packed in blocks.

    Raises ModelError for an embedding or a head of another kind.
    """
    _make_dense(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} embeds by a {type(embedding).__name__} and ends in a {type(head).__name__}; new "
            "tokens need an embedding and a linear head"
        )
    tied = head.weight is embedding.weight
    for module in (embedding,) if tied else (embedding, head):
        if module.weight.shape[0] != growth.before:
            raise ModelError(
                f"{type(model).__name__} has {embedding.weight.shape[0]} rows in its embedding and "
                f"{head.weight.shape[0]} in its head; new tokens need as many in both"
            )
        module.weight.data = with_rows(module.weight.data, growth)
    if head.bias is not None:
        head.bias.data = with_rows(head.bias.data, growth)
    embedding.num_embeddings = head.out_features = growth.rows
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, VOCABULARY):
            setattr(config, VOCABULARY, growth.rows)
    if hasattr(model, VOCABULARY):
        model.vocab_size = growth.rows


def with_rows(values: Tensor, growth: Growth) -> Tensor:
    """`values` [V, …] with the rows that `growth` asks for."""
    found = values.new_empty((growth.rows, *values.shape[1:]))
    found[: growth.before] = values
    mean = _mean(values[: growth.known]).to(values.dtype)
    found[growth.before :] = mean
    for token in growth.fresh:
        found[token] = mean
    return found


def _mean(values: Tensor) -> Tensor:
    """Over the first dimension, summed in fp64: no order of summation shows after rounding."""
    total = values.new_zeros(values.shape[1:], dtype=torch.float64)
    for part in values.split(ROWS_AT_ONCE):
        total += part.double().sum(0)
    return total / len(values)


def grown_lazily(model: LazyModel, bare: PreTrainedModel, growth: Growth) -> LazyModel:
    """The same of a model that is not in memory. `bare`, its skeleton, is as before; `grow` goes over it after this.

    Raises NotStoredError where its files have embedding or head in another form.
    """
    names = stored_names(bare, model.tensors)
    head, embedding = bare.get_output_embeddings(), bare.get_input_embeddings()
    ends = {id(tensor) for tensor in (embedding.weight, head.weight, getattr(head, "bias", None)) if tensor is not None}
    wanted = [name for name, parameter in bare.named_parameters(remove_duplicate=False) if id(parameter) in ends]
    there = [name for name in wanted if name in names.keys]  # a tied pair is stored once, or twice
    if not there:
        names.key(wanted[0], model.name)
    tensors = dict(model.tensors)
    for name in there:
        key = names.keys[name]
        tensors[key] = _more(tensors[key], growth)
    return replace(model, tensors=tensors, config=_told(model.config, growth.rows))


def _more(tensor: LazyTensor, growth: Growth) -> LazyTensor:
    fetch: Callable[[], Tensor] = partial(_fetched, tensor, growth)
    return LazyTensor((growth.rows, *tensor.shape[1:]), tensor.dtype, fetch)


@torch.no_grad()
def _fetched(tensor: LazyTensor, growth: Growth) -> Tensor:
    return with_rows(tensor.fetch(), growth)


def _told(config: dict[str, Any], rows: int) -> dict[str, Any]:
    text = config.get("text_config")
    changed = {"text_config": {**text, VOCABULARY: rows}} if isinstance(text, dict) else {VOCABULARY: rows}
    return {**config, **changed, **({VOCABULARY: rows} if VOCABULARY in config else {})}


def _make_dense(model: PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if isinstance(embedding, PackedModule):
        model.set_input_embeddings(embedding.dense(model.dtype))
    if isinstance(head, PackedModule):
        model.set_output_embeddings(head.dense(model.dtype))
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight


def told_growth(name: str, growth: Growth) -> str:
    """What became of a base, for people."""
    more = growth.rows - growth.before
    begun = f"{len(growth.fresh)} new tokens begin as the mean of the others" if growth.fresh else ""
    size = f"embedding and head have {growth.rows:,} rows, {more:,} more than its weights" if more else ""
    return f"{name}: {'; '.join(text for text in (size, begun) if text)}"
