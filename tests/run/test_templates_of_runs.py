"""What a run was trained with is what its chat, its evaluation and its merged folder are prompted with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from run import tiny
from topwork.common.errors import DataError
from topwork.data.conversations import Message
from topwork.run.evaluate import evaluate
from topwork.run.merge import merge
from topwork.run.opened import open_run
from topwork.run.train import train
from topwork.serving.config import ServeConfig
from topwork.serving.opening import named_by

MakeRecipe = Callable[..., Path]
FEW = {"max_steps": 2, "eval_steps": 1}
ASKED = [Message("user", "Hi there")]


def quiet(_: str) -> None:
    pass


def test_variables_hold_for_whoever_asks(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "qwen3", family="qwen3")
    model, data = {"model_name_or_path": str(base)}, {"chat_template_kwargs": {"enable_thinking": False}}
    folder = train(make_recipe(model=model, data=data, training=FEW), log=quiet).folder
    opened = open_run(folder, log=quiet)
    prompt = opened.base.tokenizer.decode(opened.template.prompt_ids(ASKED))
    assert prompt == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    merge(folder, tmp_path / "out", log=quiet)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    given = [{"role": "user", "content": "Hi there"}]
    assert merged.apply_chat_template(given, add_generation_prompt=True, tokenize=False) == prompt
    named = named_by(ServeConfig.model_validate({"model": {"model_name_or_path": str(folder)}}))
    assert named.template is not None
    assert Path(named.template).read_text("utf-8") == opened.template.jinja
    assert evaluate(folder, max_rows=1, log=quiet)["rows"] == 1


@pytest.mark.parametrize("separator", ["", "\n\nAnswer: "])
def test_prompt_and_completion_are_asked_as_they_were_read(
    make_recipe: MakeRecipe, tmp_path: Path, separator: str
) -> None:
    base = tiny.write_model(tmp_path / "bare", family="mistral", template="")
    rows = [{"prompt": f"Order {n}: a", "completion": f" kettle {n}"} for n in range(20)]
    path = tiny.write_rows(tmp_path / "raw.jsonl", rows)
    model, data = {"model_name_or_path": str(base)}, {"train": str(path), "separator": separator}
    said: list[str] = []
    folder = train(make_recipe(model=model, data=data, training=FEW), log=said.append).folder
    assert any("prompt and completion one after the other as they are" in line for line in said)
    opened = open_run(folder, log=quiet)
    tokenizer = opened.base.tokenizer
    asked = [Message("user", "Order 3: a")]
    assert opened.template.prompt_ids(asked) == tokenizer(f"Order 3: a{separator}")["input_ids"]
    with pytest.raises(DataError, match="all that is read raw"):
        opened.template.prompt_ids([*asked, Message("assistant", "b"), *asked])
    assert evaluate(folder, max_rows=2, log=quiet)["rows"] == 2
    merge(folder, tmp_path / "out", log=quiet)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    given = [{"role": "user", "content": "Order 3: a"}]
    assert merged.apply_chat_template(given, add_generation_prompt=True, tokenize=False) == f"Order 3: a{separator}"


def test_a_template_file_that_is_gone_is_not_missed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Nor is another in its place taken: rows are read by the one that the run keeps."""
    own = tmp_path / "own.jinja"
    turns = "{% for m in messages %}<|im_start|>SIGN{{ m.content }}<|im_end|>{% endfor %}"
    opened = "{% if add_generation_prompt %}<|im_start|>SIGN{% endif %}"
    own.write_text((turns + opened).replace("SIGN", "a"), "utf-8")
    folder = train(make_recipe(data={"chat_template": str(own)}, training=FEW), log=quiet).folder
    before = evaluate(folder, max_rows=2, log=quiet)
    own.write_text((turns + opened).replace("SIGN", "Your turn: "), "utf-8")
    assert evaluate(folder, max_rows=2, log=quiet)["after"]["loss"] == before["after"]["loss"]
    own.unlink()
    assert evaluate(folder, max_rows=2, log=quiet)["after"]["loss"] == before["after"]["loss"]
    merge(folder, tmp_path / "out", log=quiet)
