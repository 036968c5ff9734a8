"""Rows in the columns of well-known public data sets: read right, or refused in one line that helps."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.pasting import pasted, printed
from data.public_columns import COLUMNS
from data.public_shapes import CHATS
from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.examples import load_data


@pytest.fixture
def read(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Callable[..., tuple[list[str], list[str]]]:
    """read(row, **options) -> (the text of a file of three such rows, what was told)."""

    def shown(tokenizer: Any, example: Any) -> str:
        text, learned = "", False
        runs: list[tuple[bool, list[int]]] = []
        for token, weight in zip(example.tokens.tolist(), example.weights.tolist()):
            if not runs or runs[-1][0] != (weight > 0):
                runs.append((weight > 0, []))
            runs[-1][1].append(token)
        for learned, ids in runs:
            part = tokenizer.decode(ids, skip_special_tokens=False)
            text += f"⟦{part}⟧" if learned else part
        return text

    def loaded(row: dict[str, Any], **options: Any) -> tuple[list[str], list[str]]:
        path = tmp_path / "train.jsonl"
        path.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 3, "utf-8")
        told: list[str] = []
        tokenizer = make_tokenizer("smollm2", adds_bos=False)
        config = DataConfig(train=str(path), eval_fraction=0, max_length=4096, chat_template="chatml", **options)
        data = load_data(config, tokenizer, 4096, 0, told.append)
        assert {example.source for example in data.train} == {f"train.jsonl:{line}" for line in (1, 2, 3)}
        return [shown(tokenizer, example) for example in data.train], told

    return loaded


SHAPES = CHATS | COLUMNS


_MEANT = ("columns", "format", "response_part", "instruction_part", "roles")


def advised(message: str) -> dict[str, Any]:
    """The options that a refusal says to set; of two ways the first. None where it leaves a part of them open."""
    one_way = re.split(", or data\\.|; to learn ", message)[0]
    named = {option.partition(":")[0]: option for option in reversed(printed(one_way))}
    told = [option for name, option in named.items() if name.removeprefix("data.") in _MEANT]
    return {} if not told or "COLUMN" in one_way else pasted(told)


def one_line(message: str) -> bool:
    """A sentence, or a sentence over named rows."""
    return len([line for line in message.splitlines() if not re.match(r"\s+\S+(:\d+|\[\d+\]): ", line)]) <= 2


@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes(name: str, read: Any) -> None:
    shape = SHAPES[name]
    if shape.read:
        texts, told = read(shape.row)
        assert texts == [shape.read] * 3
        assert re.search(shape.words, "\n".join(told), re.DOTALL)
    else:
        with pytest.raises(DataError, match=re.compile(shape.words, re.DOTALL)) as refused:
            read(shape.row)
        assert one_line(str(refused.value)), refused.value
        if options := advised(str(refused.value)):
            read(shape.row, **options)  # no advice that the same data refuse
    if shape.advice:
        texts, _ = read(shape.row, **shape.advice)
        assert texts == [shape.then] * 3


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk"])
def test_a_class_is_its_name(kind: str, tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    """Hugging Face's class labels are numbers with names beside them."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    made = Dataset.from_dict({"sentence": ["a hollow tale", "a feast"], "label": [0, 1]}, features=features)
    path = tmp_path / ("train.parquet" if kind == "parquet" else "saved")
    made.to_parquet(path) if kind == "parquet" else made.save_to_disk(path)
    columns = {"prompt": "sentence", "completion": "label"}
    config = DataConfig(train=str(path), eval_fraction=0, chat_template="chatml", columns=columns)
    tokenizer = make_tokenizer("smollm2")
    data = load_data(config, tokenizer, 4096, 0, lambda _: None)
    answers = [tokenizer.decode(example.tokens[example.weights > 0]) for example in data.train]
    assert answers == ["bad<|im_end|>", "good<|im_end|>"]
