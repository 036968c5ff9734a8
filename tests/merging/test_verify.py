"""The check of a merge: its figures against the formulas, its passes, and a model from a folder."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference.families import CONTEXT, randomise, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, adapted_layers
from topwork.common.errors import AdapterError, DataError
from topwork.merging import verify as verify_part
from topwork.merging.merge import merge
from topwork.merging.verify import Verification, compare, measure, verify
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.ops.batch import batch_of


def inputs() -> list[list[int]]:
    return [part.tolist() for part in sequences()]


def merge_and_verify(base: Base, adapters: Adapters, name: str, given: list[list[int]]) -> Verification:
    """Merged in memory, measured before and after."""
    adapters.train(name, False)
    before = measure(base, given, name)
    merge(base, adapters, name)
    return verify(before, measure(base, given, None), 0.0)


def adapted(base: Base, **fields: object) -> Adapters:
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig.model_validate({"r": 4, **fields}))
    randomise(adapters, "a")
    return adapters


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_right_merge_differs_by_rounding_alone(family: str) -> None:
    base = tiny_base(family)
    adapters = adapted(base, lora_alpha=8, use_rslora=True, lora_dropout=0.5)
    adapters.train("a")
    found = merge_and_verify(base, adapters, "a", inputs())
    assert 0 < found.largest_relative_difference <= 1e-5
    assert found.largest_logprob_difference <= 1e-4
    assert found.top1_agreement == 1.0
    assert abs(found.mean_kl) <= 1e-6
    assert found.sequences == len(inputs())
    assert min(found.unmerged_tokens_per_second, found.merged_tokens_per_second) > 0
    assert not adapted_layers(base.module)


def test_a_wrong_merge_shows() -> None:
    base = tiny_base("llama")
    adapted(base)
    found = verify(measure(base, inputs(), "a"), measure(base, inputs(), None), 0.0)
    assert found.largest_relative_difference > 1e-2
    assert found.mean_kl > 1e-5


def test_perplexity_is_of_the_tokens_that_the_kept_rows_predict() -> None:
    base = tiny_base("llama")
    found = measure(base, inputs(), None)
    losses = []
    for tokens in sequences():
        with torch.no_grad():
            logits = base.logits(batch_of([tokens], None), torch.arange(len(tokens)))
        losses += [float(-logits[i].log_softmax(-1)[tokens[i + 1]]) for i in range(len(tokens) - 1)]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert measure(base, [[5]], None).perplexity is None


def test_bfloat16_rounds_and_says_so() -> None:
    base = tiny_base("llama", torch.bfloat16)
    found = merge_and_verify(base, adapted(base), "a", inputs())
    assert 1e-5 < found.largest_relative_difference < 0.2


def test_the_figures_are_the_formulas() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    before = [p.log()[None] * 1.0, torch.tensor([[3.0, -4.0, 1.0]])]
    after = [q.log()[None] * 1.0, torch.tensor([[3.0, -4.0, 1.5]])]
    found = compare(before, after)
    assert found.largest_logit_difference == pytest.approx(float(torch.tensor(2.0).log()))
    assert found.largest_relative_difference == pytest.approx(found.largest_logit_difference / 4)
    assert found.top1_agreement == 0.5
    second = [x.double().log_softmax(-1) for x in (before[1], after[1])]
    kl = float((p * (p / q).log()).sum()) + float((second[0].exp() * (second[0] - second[1])).sum())
    assert found.mean_kl == pytest.approx(kl / 2, rel=1e-5)
    assert found.largest_logprob_difference == pytest.approx(float(torch.tensor(2.0).log()))


def test_nan_is_not_taken_for_agreement() -> None:
    spoilt = torch.tensor([[1.0, float("nan")]])
    assert not compare([torch.ones(1, 2)], [spoilt]).largest_logit_difference <= 1e-5


def test_measured_are_the_last_rows_of_each_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    adapted(base)
    monkeypatch.setattr(verify_part, "KEPT_ROWS", 5)
    monkeypatch.setattr(verify_part, "TOKENS_PER_PASS", 14)  # three passes, the last of them too long by itself
    found = measure(base, inputs(), "a").logits
    assert [len(part) for part in found] == [min(5, len(tokens)) for tokens in inputs()]
    for part, tokens in zip(found, sequences()):
        with torch.no_grad():
            expected = base.logits(batch_of([tokens], "a"), torch.arange(len(tokens)))[-5:]
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-6)
        assert part.dtype == torch.float32


def test_kept_logits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    monkeypatch.setattr(verify_part, "KEPT_BYTES", 4 * base.module.config.vocab_size * 8)
    found = measure(base, inputs(), None).logits
    assert [len(part) for part in found] == [2, 1, 2, 2]


def test_what_is_longer_than_the_context_is_cut() -> None:
    base = tiny_base("llama")
    found = merge_and_verify(base, adapted(base), "a", [[5] * (CONTEXT + 9), [7, 8]])
    assert found.sequences == 2
    assert found.largest_relative_difference <= 1e-5


@pytest.mark.parametrize("wrong", [[], [[1, 2], []]])
def test_no_input_is_an_error_and_nothing_is_merged(wrong: list[list[int]]) -> None:
    base = tiny_base("llama")
    adapters = adapted(base)
    with pytest.raises(DataError, match="compare the merged model"):
        merge_and_verify(base, adapters, "a", wrong)
    assert "a" in adapters.configs
    assert adapted_layers(base.module)


def test_an_unknown_adapter_is_an_error() -> None:
    base = tiny_base("llama")
    adapters = adapted(base)
    with pytest.raises(AdapterError, match="no adapter 'b'"):
        merge_and_verify(base, adapters, "b", inputs())


def test_of_a_model_with_a_tokenizer(small_llama: Path) -> None:
    config = ModelConfig(model_name_or_path=str(small_llama), dtype="float32", device="cpu")
    base = load_base(config, lambda _: None)
    text = "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her dog."
    tokens: Tensor = base.tokenizer(text, return_tensors="pt").input_ids[0]
    found = merge_and_verify(base, adapted(base, r=16), "a", [tokens.tolist(), tokens.tolist()[:20]])
    assert found.largest_relative_difference <= 1e-5
    assert found.top1_agreement == 1.0
