"""Scores against transformers' own: its loss on the same rows, and what its `generate` writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.family_tokenizers import build_tokenizer
from reference.families import randomise
from run import tiny
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation, Message
from topwork.data.examples import Data, load_data
from topwork.evaluation.score import Question, mean_answer_loss, questions_of, score
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base


@pytest.fixture
def base(tiny_llama: Path) -> Base:
    config = ModelConfig(model_name_or_path=str(tiny_llama), dtype="float32", device="cpu")
    return load_base(config, lambda _: None)


@pytest.fixture
def data(base: Base, tmp_path: Path) -> Data:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(9))
    return load_data(
        DataConfig(train=str(rows), eval_fraction=0.0), base.tokenizer, base.context_length, 0, lambda _: None
    )


def test_the_loss_is_transformers_own(
    base: Base, data: Data, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    total = count = 0.0
    for example in data.train:
        tokens = torch.from_numpy(example.tokens).long()
        labels = torch.where(torch.from_numpy(example.weights) > 0, tokens, -100)
        learned = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=tokens[None], labels=labels[None]).loss) * learned
        count += learned
    assert mean_answer_loss(base, None, data.train) == pytest.approx(total / count, rel=1e-5)
    import topwork.evaluation.score

    monkeypatch.setattr(topwork.evaluation.score, "TOKENS_PER_PASS", 200)
    assert mean_answer_loss(base, None, data.train) == pytest.approx(total / count, rel=1e-5)


def test_answers_are_what_generate_writes(base: Base, data: Data, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    questions = questions_of(data.train_conversations, data.template)
    finished: list[int] = []
    scores = score(base, None, questions, data.train, data.template, "json", 10, 4, finished.append)
    for question, answer in zip(questions, scores.answers):
        ids = torch.tensor([question.tokens])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert answer == base.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    assert sum(finished) == len(questions) == len(scores.grades) == 9
    assert scores.summary["loss"] == mean_answer_loss(base, None, data.train)
    assert {"exact_match", "json_valid", "fields", "answer_tokens", "tokens_per_second"} <= scores.summary.keys()


def test_an_adapter_answers_otherwise_and_none_is_the_base(base: Base, data: Data) -> None:
    questions = questions_of(data.train_conversations, data.template)
    arguments: tuple[Any, ...] = (questions, data.train, data.template, "json", 6, 64)
    before = score(base, None, *arguments)
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=4))
    randomise(adapters, "a")
    assert score(base, None, *arguments).answers == before.answers
    assert score(base, "a", *arguments).answers != before.answers
    assert score(base, "a", *arguments).summary["loss"] != before.summary["loss"]


def test_a_question_is_all_before_the_last_answer(data: Data) -> None:
    turns = (
        Message("system", "Be brief."), Message("user", "One?"), Message("assistant", "1"), Message("user", "Two?"),
        Message("assistant", "2"),
    )  # fmt: skip
    (question,) = questions_of([Conversation(turns, None, "x:1")], data.template)
    assert (question.prompt, question.reference, question.source) == ("One?\n\n1\n\nTwo?", "2", "x:1")
    assert question.tokens == tuple(data.template.prompt_ids(turns[:-1]))
    assert isinstance(question, Question)


def test_rows_of_which_none_can_be_asked(data: Data) -> None:
    text = Conversation((), None, "x:1", "text", "Once upon a time")
    with pytest.raises(DataError, match="nothing can be asked"):
        questions_of([text], data.template)
    assert len(questions_of([text, *data.train_conversations], data.template)) == 9


@pytest.mark.parametrize("family", ["gemma", "mistral", "llama2", "smollm2"])
def test_a_talk_that_the_assistant_opens_is_asked_as_it_was_learned(family: str) -> None:
    """Some templates reject the greeting, which then is cut of what is learned; serving refuses it still."""
    template = ChatTemplate(build_tokenizer(family))
    talk = (("assistant", "Welcome."), ("user", "A room?"), ("assistant", "Two coins."))
    row = Conversation(
        tuple(Message(role, text, 0.0 if text == "Welcome." else None) for role, text in talk), None, "x"
    )
    (item,) = template.encode(row)
    (question,) = questions_of([row], template)
    assert list(question.tokens) == item.tokens[: item.weights.index(1.0)]
    if family != "smollm2":
        with pytest.raises(DataError, match="it wants the user to begin"):
            template.prompt_ids(row.messages[:-1])
