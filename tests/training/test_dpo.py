"""An objective that a user brings along: DPO in some twenty lines, without an edit in src.

Pairs are examples of one group, the reference is a column that a pass without a gradient fills, and the figures come
back. The formula is held against the same one over transformers' own forward.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.families import randomise, sequences, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters, bare_modules
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.peft_format import BaseId
from topwork.common.errors import DataError
from topwork.data.batches import collate
from topwork.data.examples import Example
from topwork.data.source import FixedRows
from topwork.objectives.columns import reference, with_columns
from topwork.objectives.objective import Fill, Loss, NonlinearObjective
from topwork.objectives.sft import Sft
from topwork.ops.batch import Labels
from topwork.run.report import report as write_report
from topwork.training.config import TrainingConfig
from topwork.training.loop import Loop
from topwork.training.metrics import MetricsLog
from topwork.training.passes import step_passes
from topwork.training.progress import Silent
from topwork.training.step import Learner, StepResult, mean_losses, train_step
from topwork.training.trial import Place, Trial


@dataclass(frozen=True)
class Dpo(NonlinearObjective):
    """-log sigmoid(beta (r_chosen - r_rejected)), r = log p / p_reference of an answer (arXiv 2305.18290)."""

    beta: float = 0.1
    columns: ClassVar[Mapping[str, Fill]] = MappingProxyType({"reference": reference})

    def __call__(self, logprobs: Tensor, labels: Labels) -> Loss:
        gains = labels.by_sequence(labels.loss_weights * (logprobs - labels.column("reference")))
        chosen, rejected = gains.view(-1, 2).unbind(1)  # a group is a pair, the chosen answer first
        margin = self.beta * (chosen - rejected)
        with torch.no_grad():
            figures = {"accuracy": (margin > 0).float().sum(), "margin": margin.sum()}
        return Loss(-F.logsigmoid(margin).sum(), len(margin), figures)


PAIRS = ((13, 5), (7, 9), (24, 3), (6, 11))


def pairs(first: int = 0) -> list[Example]:
    """Random prompts of two tokens with two answers each, the chosen one first."""
    found = []
    for number, lengths in enumerate(PAIRS):
        prompt, *answers = sequences((2, *lengths), seed=first + number)
        for name, answer in zip(("chosen", "rejected"), answers):
            tokens = torch.cat([prompt, answer]).numpy().astype(np.int32)
            weights = np.array([0, 0] + [1] * len(answer), dtype=np.float32)
            found.append(Example(tokens, weights, f"{number} {name}", group=number))
    return found


def prepared() -> tuple[object, Adapters, Learner]:
    base = tiny_base()
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4, lora_alpha=8))
    randomise(adapters, "a")
    parameters = list(adapters.parameters("a").values())
    return base, adapters, Learner("a", Dpo(0.5), parameters, torch.optim.SGD(parameters, lr=0.0), 0.0)


def their_logprob(model: torch.nn.Module, example: Example, weights: dict[str, Tensor]) -> Tensor:
    """Of an answer, by transformers' own forward."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64))
    logits = torch.func.functional_call(model, weights, kwargs={"input_ids": tokens[None], "use_cache": False}).logits
    logps = torch.log_softmax(logits[0, :-1].float(), -1).gather(-1, tokens[1:, None])[:, 0]
    return (logps * torch.from_numpy(example.weights[1:])).sum()


def test_the_loss_and_gradients_are_the_formulas_over_their_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters, learner = prepared()
    rows, theirs = pairs(), tiny_model("llama")
    modules = bare_modules(base.module)
    merged = {
        f"{path}.weight": modules[path].weight.detach() + part.scaling * (part.lora_B @ part.lora_A)
        for path, part in adapters.parts("a").items() if isinstance(part, Lora)
    }  # fmt: skip
    losses, margins = [], []
    for chosen, rejected in zip(rows[::2], rows[1::2]):
        with torch.no_grad():
            anchor = their_logprob(theirs, chosen, {}) - their_logprob(theirs, rejected, {})
        margin = 0.5 * (their_logprob(theirs, chosen, merged) - their_logprob(theirs, rejected, merged) - anchor)
        losses.append(-F.logsigmoid(margin))
        margins.append(float(margin.detach()))
    expected = torch.autograd.grad(torch.stack(losses).mean(), learner.parameters)
    kept: list[Tensor] = []
    monkeypatch.setattr(learner.optimizer, "step", lambda: kept.extend(p.grad.clone() for p in learner.parameters))
    for tokens_per_pass in (48, 1000):  # pairs in passes of their own, and all in one
        kept.clear()
        passes = step_passes([("a", rows)], tokens_per_pass, base.device)
        [result] = train_step(base, [learner], passes)
        assert isinstance(result, StepResult)
        assert result.loss == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
        assert result.metrics["margin"] == pytest.approx(sum(margins) / 4, rel=1e-4, abs=1e-6)
        assert result.metrics["accuracy"] == sum(margin > 0 for margin in margins) / 4
        assert relative(kept, expected) < 1e-5
    assert mean_losses(base, {"a": Dpo(0.5)}, passes)["a"].loss == pytest.approx(result.loss, rel=1e-6)


def test_pairs_stay_together_and_in_order_however_they_are_packed() -> None:
    rows = pairs()
    mixed = [rows[number] for number in (0, 2, 4, 6, 1, 3, 5, 7)]  # all chosen answers first
    passes = step_passes([("a", mixed), ("b", pairs(9))], 40, torch.device("cpu"))
    assert len(passes) > 2
    for batch in passes:
        for _, part in batch.parts():
            groups = part.labels.groups
            assert all(one == other for one, other in zip(groups[::2], groups[1::2], strict=True))
            assert len(set(groups)) == len(groups) // 2
    learned = [int(target) for batch in passes for target in batch.labels.targets]
    assert sorted(learned) == sorted(int(t) for row in (*rows, *pairs(9)) for t in row.tokens[2:])


def test_a_column_is_filled_for_those_who_read_it_and_costs_the_others_nothing() -> None:
    base, adapters, _ = prepared()
    adapters.add("b", AdapterConfig(r=2, lora_alpha=2))
    [batch] = step_passes([("a", pairs()), ("b", pairs(5))], 1000, base.device)
    labels = with_columns(base, {"a": Dpo(), "b": Sft()}, batch).labels
    own, other = batch.by_label()
    with torch.no_grad():
        expected = base.log_probabilities(collate(pairs(), None))
    assert relative(labels.column("reference")[own], expected) < 1e-6
    assert labels.column("reference")[other].isnan().all()  # who reads what nobody gave it is told by its loss
    assert with_columns(base, {"a": Sft(), "b": Sft()}, batch) is batch
    own_column = [replace(row, columns={"reference": np.full(len(row.tokens), 7, np.float32)}) for row in pairs(5)]
    [batch] = step_passes([("a", pairs()), ("b", own_column)], 1000, base.device)
    labels = with_columns(base, {"a": Dpo(), "b": Sft()}, batch).labels
    assert relative(labels.column("reference")[own], expected) < 1e-6
    assert (labels.column("reference")[other] == 7).all()
    with pytest.raises(KeyError, match="no column 'advantages'; they have \\['reference'\\]"):
        labels.column("advantages")


def test_a_segment_of_nobody_is_refused() -> None:
    base, _, learner = prepared()
    with pytest.raises(ValueError, match="a segment of the bare base is in a pass of a"):
        train_step(base, [learner], [collate(pairs(), None)])


def test_rows_that_do_not_fit_are_refused_by_name() -> None:
    first, second = pairs()[:2]
    some = [replace(first, columns={"advantages": first.weights}), second]
    with pytest.raises(DataError, match=r"1 of 2 rows for a have no column 'advantages' \(first 0 rejected\)"):
        collate(some, "a")
    with pytest.raises(DataError, match=r"0 chosen: 15 tokens, and 14 advantages"):
        replace(first, columns={"advantages": first.weights[1:]})
    with pytest.raises(DataError, match=r"0 chosen: its first token has weight 1.0"):
        replace(first, weights=np.ones_like(first.weights))
    with pytest.raises(DataError, match="0 chosen: 0 tokens"):
        replace(first, tokens=first.tokens[:0], weights=first.weights[:0])


def test_a_column_of_another_length_is_refused() -> None:
    base, _, _ = prepared()

    class Short(Dpo):
        columns: ClassVar[Mapping[str, Fill]] = {"reference": lambda *_: torch.zeros(1)}

    with pytest.raises(ValueError, match=r"column reference was filled with \[1\], not with \[\d+\]|not \[\d+\]"):
        with_columns(base, {"a": Short()}, collate(pairs(), "a"))


def test_it_learns_and_its_figures_reach_the_files_and_the_page(tmp_path: Path) -> None:
    base, adapters, _ = prepared()
    place = Place(adapters, "a", BaseId("tiny"), tmp_path)
    config = TrainingConfig(learning_rate=1e-2, max_steps=12, batch_size=4, eval_steps=6, warmup_steps=1)
    with MetricsLog(tmp_path) as metrics:
        trial = Trial(place, Dpo(0.5), config, FixedRows(pairs(), 4, 0), pairs(), metrics, Silent())
        [outcome] = Loop(base, adapters, [trial], 60).run()
    assert outcome.stopped == "finished"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    assert train[-1]["metrics"]["accuracy"] == evals[-1]["metrics"]["accuracy"] == 1.0
    assert train[-1]["loss"] < 0.5 * train[0]["loss"]
    write_report(tmp_path)
    assert (tmp_path / "report" / "metrics.margin.png").stat().st_size > 1000
    assert "Margin from" in (tmp_path / "report" / "index.html").read_text("utf-8")
