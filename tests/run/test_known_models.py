"""`topwork models`: what is listed, and what is told of one base."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from run.fixtures import Said
from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_names
from topwork.models.source import ALIASES, embedded_file
from topwork.plan.built import base_skeleton
from topwork.plan.footprint import footprint
from topwork.run.models import model_details, models

Command = Callable[..., Said]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Path:
    """A Hub cache that holds one model of nobody's, and one of the shapes."""
    from huggingface_hub import constants

    for hub_id in ("someone/tiny-chat", "Qwen/Qwen2.5-0.5B"):
        snapshot = tmp_path / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for file in tiny_llama.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (tmp_path / "models--half--fetched").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("cache")
def test_all_names_are_listed_and_where_their_weights_are() -> None:
    rows = {row.name: row for row in models()}
    assert {*shape_names(), *ALIASES, "someone/tiny-chat"} == set(rows)
    assert rows["someone/tiny-chat"].here == "cache"
    assert rows["qwen2.5-0.5b"].here == "cache"
    assert rows["llama-3-70b"].here == ""
    assert {name for name, row in rows.items() if row.alias} == set(ALIASES)
    assert [row.parameters for row in models()] == sorted(row.parameters for row in models())
    here = embedded_file(ALIASES["smollm2-135m"]) is not None
    assert (rows["smollm2-135m"].here == "package") is here


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-2-2b", "gpt2"])
def test_memory_is_that_of_the_modules_themselves(name: str) -> None:
    row = model_details(name).row
    found = {each.name: each.total_bytes for each in footprint(base_skeleton(ModelConfig(model_name_or_path=name)))}
    assert row.bf16_bytes == found["bf16"]
    # each layer counts the map of its constants there, which all layers share
    assert row.nf4_bytes == pytest.approx(found["NF4 + DQ"], rel=3e-3)


def test_a_folder_is_told_of_too(topwork: Command, tiny_llama: Path) -> None:
    said = topwork("models", tiny_llama, "--json")
    found = json.loads(said.out)
    assert (found["family"], found["here"], found["layers"], found["chat_template"]) == ("llama", "file", 2, True)
    assert f"topwork init {tiny_llama} DATA" in topwork("models", tiny_llama).out


def test_the_command(topwork: Command) -> None:
    said = topwork("models")
    assert said.code == 0
    assert all(f"\n{name} " in said.out for name in shape_names())
    assert {row["name"] for row in json.loads(topwork("models", "--json").out)} >= set(shape_names())
    one = topwork("models", "llama-3-8b")
    assert "8,030,261,248" in one.out
    assert "41,943,040 trained" in one.out
    assert "topwork init meta-llama/Meta-Llama-3-8B DATA" in one.out
    wrong = topwork("models", "llama-3-80b")
    assert wrong.code == 2
    assert "did you mean" in wrong.err


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from topwork.run.models import models; models(); "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
