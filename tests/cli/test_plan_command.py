"""`topwork plan` at the command line: what is printed, exit codes, one sentence for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = [sys.executable, "-m", "topwork", "plan"]


def said(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_a_model_alone_is_planned() -> None:
    ended = said("llama-3-8b", "--device", "rtx 4090", "--set", "quantization.load_in_4bit=true")
    lines = ended.stdout.splitlines()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert lines[0] == "LoRA r 16 on 4-bit llama-3-8b: 41.9 M of 8.03 B parameters are trained (0.52%)"
    assert lines[1].startswith("fits: peak ")
    assert "25.8 GB on the RTX 4090" in lines[1]


def test_json_is_one_object() -> None:
    ended = said("qwen2.5-0.5b", "--memory", "8GB", "--json")
    found = json.loads(ended.stdout)
    assert ended.returncode == 0
    assert found["memory_bytes"] == 8 * 10**9
    assert found["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("llama-3-8b", "--device", "RTX 4900"), "RTX 4090"),
        (("llama-3-8b", "--memory", "-4"), "--memory is '-4'"),
        (("llama-3-8b", "--memory", "24GB", "--device", "T4"), "one of them"),
        (("llama-3-9b",), "llama-3-8b"),
        (("no-such.yaml",), "no-such.yaml"),
    ],
)
def test_wrong_requests_end_with_two(arguments: tuple[str, ...], told: str) -> None:
    ended = said(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_recipe_whose_data_are_not_there_ends_with_two(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {model_name_or_path: qwen2.5-0.5b}\ndata: {train: rows.jsonl}\n")
    ended = said(str(recipe))
    assert ended.returncode == 2
    assert "rows.jsonl" in ended.stderr


def test_rows_in_the_place_of_a_recipe_are_told_apart(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    ended = said(str(rows))
    assert ended.returncode == 2
    assert "topwork init MODEL" in ended.stderr
