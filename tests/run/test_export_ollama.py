"""`topwork export … --format ollama` of a run: what `ollama create` would get, read by llama.cpp, which runs in it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.families import logits
from reference.llama_cpp import Asked
from run import tiny
from run.fixtures import Said
from topwork.common.errors import RequestError, RunError
from topwork.data.conversations import Message
from topwork.export.gguf.adapter import write_gguf_adapter
from topwork.export.lowered import Lowered
from topwork.export.ollama.evaluator import ollama_text
from topwork.export.ollama.modelfile import parsed
from topwork.ops.batch import batch_of
from topwork.run.export import export
from topwork.run.exporting import gguf as export_gguf
from topwork.run.opened import open_run
from topwork.run.train import train


def system_rows(path: Path) -> Path:
    """Rows that share a system message."""
    rows = tiny.rows(24)
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Answer in JSON."})
    return tiny.write_rows(path, rows)


@pytest.fixture(scope="module")
def with_system(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rows share a system message, which training put into the first user turn."""
    folder = tmp_path_factory.mktemp("with-system")
    values = tiny.recipe_values(
        tiny_llama, system_rows(folder / "train.jsonl"), folder / "run", data={"fold_system": True},
        training={"learning_rate": 0.02, "max_steps": 4, "eval_steps": 4},
    )  # fmt: skip
    return train(tiny.write_recipe(folder / "recipe.yaml", values), log=lambda _: None).folder


def test_a_run_with_its_system_message(with_system: Path, tmp_path: Path) -> None:
    done = export(with_system, tmp_path / "out", "ollama", "f32", log=lambda _: None)
    commands = parsed((tmp_path / "out" / "Modelfile").read_text("utf-8"))
    values = dict(commands)
    assert values["SYSTEM"] == "Answer in JSON."
    assert (done.figures["compared_conversations"], done.figures["compared_prompts"]) == (25, 25)
    asked = [Message("system", "Answer in JSON."), Message("user", "Order 7: my lamp hums.")]
    opened = open_run(with_system, log=lambda _: None)
    prompt = opened.template.prompt_ids(asked)
    reader = Asked(tmp_path / "out" / values["FROM"], tmp_path / "out" / values["ADAPTER"])
    letter = opened.base.tokenizer.convert_tokens_to_ids("a")
    found = reader.log_probabilities(prompt, len(opened.base.tokenizer), letter)
    ours = torch.log_softmax(logits(opened.base, batch_of([torch.tensor(prompt)], "default"))[-1], -1)
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    assert opened.base.tokenizer(ollama_text(values["TEMPLATE"], asked), add_special_tokens=False).input_ids == prompt


def test_the_command(topwork: Callable[..., Said], trained: Path, tmp_path: Path) -> None:
    said = topwork("export", trained, tmp_path / "out", "--format", "ollama", "--type", "q8_0")
    assert said.code == 0, said.err
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["figures"]["model"].endswith("-q8_0.gguf")
    assert "ollama create NAME -f Modelfile" in said.out


def test_a_run_whose_rows_are_gone(with_system: Path, tmp_path: Path) -> None:
    told: list[str] = []
    moved = shutil.copytree(with_system, tmp_path / "moved")
    recipe = (moved / "recipe.yaml").read_text("utf-8")
    assert "train.jsonl" in recipe
    (moved / "recipe.yaml").write_text(recipe.replace("train.jsonl", "gone.jsonl"), "utf-8")
    done = export(moved, tmp_path / "out", "ollama", "f16", check=0, log=told.append)
    assert any("compared without rows of the run, which cannot be read" in line for line in told)
    assert done.figures["compared_conversations"] == 5


def test_a_run_that_learned_tools_is_refused(tmp_path: Path) -> None:
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    jinja = "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}" + turn + "{% endfor %}"
    jinja += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    base = tiny.write_model(tmp_path / "base", template=jinja)
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    rows = tiny.write_rows(tmp_path / "train.jsonl", [{**row, "tools": [tool]} for row in tiny.rows(8)])
    values = tiny.recipe_values(
        base, rows, tmp_path / "run", training={"max_steps": 1, "eval_steps": 1}, evaluation={"max_rows": 1}
    )
    folder = train(tiny.write_recipe(tmp_path / "recipe.yaml", values), log=lambda _: None).folder
    with pytest.raises(RequestError, match=r"bring tools, which an Ollama TEMPLATE here has not"):
        export(folder, tmp_path / "out", "ollama", "f16", check=0, log=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_wrong_scale_is_seen_by_llama_cpp(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a converter writes it that folds nothing: llama.cpp's answers are another adapter's."""

    def quartered(adapter: Lowered, *rest: Any) -> None:
        updates = {path: replace(update, b=update.b / 4) for path, update in adapter.updates.items()}
        write_gguf_adapter(Lowered(updates, adapter.rank), *rest)

    monkeypatch.setattr(export_gguf, "write_gguf_adapter", quartered)
    monkeypatch.setattr(export_gguf, "reread", lambda *_: 0.0)
    with pytest.raises(RunError, match=r"llama.cpp's log-probabilities with the adapter are .* nats from ours"):
        export(trained, tmp_path / "out", "gguf-adapter", log=lambda _: None)
    assert not (tmp_path / "out").exists()
