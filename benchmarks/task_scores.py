"""How a model does on a task's test rows: figures of each row, so that two arms are compared row by row.

Used by qlora_merge.py and combine_tasks.py; whatever an arm is (an adapter on its base, a merged model), it is asked
by this code alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from trained_tasks import TASKS, is_signed, references, without_signature

from common import read_chats
from topwork.data.batches import collate, pack
from topwork.data.chat.template import stop_ids
from topwork.data.config import DataConfig
from topwork.data.examples import Data, Example, load_data
from topwork.evaluation.score import questions_of
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.models.base import Base

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class Rows:
    """Each test row's figures, in the order of the file.

    nats, tokens  of the reference: its negative log-likelihood, and the learned tokens that it has
    shares        of the answer without its signature: what of it is right, 0 to 1 (`Task.share`)
    signed        whether the answer ends with the signature
    """

    nats: list[float]
    tokens: list[int]
    shares: list[float]
    signed: list[bool]
    answers: list[str]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Rows":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def asked(
    base: Base, adapter: str | None, task: str, test: Path, data_dir: Path, only_loss_of: int | None = None
) -> Rows:
    """Put all test rows to a model for the loss, and the first `Task.questions` of them for an answer; or so many for
    the loss alone."""
    questions = TASKS[task].questions
    config = DataConfig(train=str(test), eval_fraction=0.0, max_rows=only_loss_of)
    data = load_data(config, base.tokenizer, base.context_length, 0, lambda _: None)
    nats, tokens = row_nats(base, adapter, data.train)
    if only_loss_of is not None:
        return Rows(nats, tokens, [], [], [])
    answers = _answers(base, adapter, task, data, questions)
    wanted = [references(task, data_dir, chat) for chat in read_chats(test)[:questions]]
    shares = [
        TASKS[task].share(without_signature(answer), [without_signature(one) for one in own])
        for answer, own in zip(answers, wanted, strict=True)
    ]
    return Rows(nats, tokens, shares, [is_signed(answer) for answer in answers], answers)


@torch.no_grad()
def row_nats(base: Base, adapter: str | None, examples: Sequence[Example]) -> tuple[list[float], list[int]]:
    """Each row's negative log-likelihood in nats, and its learned tokens."""
    nats, tokens = [0.0] * len(examples), [0] * len(examples)
    for indices in pack([len(example.tokens) for example in examples], TOKENS_PER_PASS):
        batch = collate([examples[i] for i in indices], adapter).to(base.device)
        weights = batch.labels.loss_weights
        sums = batch.labels.by_sequence(weights * base.log_probabilities(batch))
        for i, total, count in zip(indices, sums.tolist(), batch.labels.by_sequence(weights).tolist(), strict=True):
            nats[i], tokens[i] = -total, int(count)
    return nats, tokens


def _answers(base: Base, adapter: str | None, task: str, data: Data, count: int) -> list[str]:
    prompts = [question.tokens for question in questions_of(data.train_conversations, data.template)[:count]]
    sampling = Sampling(max_new_tokens=TASKS[task].max_new_tokens)
    new = generate(base, prompts, [adapter] * len(prompts), stop_ids(data.template), sampling, 64)
    return [base.text(tokens) for tokens in new]


def figures(rows: Rows) -> dict[str, Any]:
    """An arm's means: nats a token, and share with 95 % interval (Wilson's where a row is right or wrong)."""
    found: dict[str, Any] = {"rows": len(rows.nats), "loss": sum(rows.nats) / sum(rows.tokens)}
    if rows.answers:
        found |= {"answers": len(rows.answers), "share": mean(rows.shares), "interval": interval(rows.shares)}
        found["signed"] = mean(rows.signed)
    return found


def apart(rows: Rows, other: Rows) -> dict[str, float]:
    """rows - other on the same rows: loss and share, each with a standard error taken row by row."""
    count = sum(rows.tokens)
    differences = [a - b for a, b in zip(rows.nats, other.nats, strict=True)]
    loss = sum(differences) / count
    # a ratio's error: nats and tokens of a row go together
    off = [difference - loss * tokens for difference, tokens in zip(differences, rows.tokens, strict=True)]
    found = {"loss": loss, "loss_error": stdev(off) * math.sqrt(len(off)) / count}
    if rows.answers:
        shares = [a - b for a, b in zip(rows.shares, other.shares, strict=True)]
        found |= {"share": mean(shares), "share_error": stdev(shares) / math.sqrt(len(shares))}
        found["same_answers"] = mean(a == b for a, b in zip(rows.answers, other.answers, strict=True))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the mean: Wilson's of rights and wrongs, the normal one of anything else."""
    z, n, share = 1.96, len(values), mean(values)
    if set(values) <= {0.0, 1.0}:
        middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)
    error = stdev(values) / math.sqrt(n)
    return share - z * error, share + z * error
