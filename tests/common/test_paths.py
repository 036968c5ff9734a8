"""Paths as people write them."""

import os
from pathlib import Path

import pytest

from topwork.common.errors import DataError, ModelError
from topwork.common.paths import is_path, missed, plain_path
from topwork.data.files.places import find_place
from topwork.models.config import ModelConfig
from topwork.models.source import find_source
from topwork.recipe.recipe import make_recipe


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a/b c/d.jsonl", "a/b c/d.jsonl"),
        ("  a.jsonl\n", "a.jsonl"),
        ("a.jsonl\r\n", "a.jsonl"),
        ("'a b.jsonl'", "a b.jsonl"),
        ('"a.jsonl"', "a.jsonl"),
        ("file:///data/a%20b.jsonl", "/data/a b.jsonl"),
        ("file://localhost/data/ä.jsonl", "/data/ä.jsonl"),
        ("FILE:///C:/data/a.jsonl", "C:/data/a.jsonl"),
        ("file://elsewhere/a.jsonl", "file://elsewhere/a.jsonl"),
        ("$HOME/a.jsonl", "$HOME/a.jsonl"),
        ("a~b", "a~b"),
        ("~nobody-of-this-name/a", "~nobody-of-this-name/a"),
        ("", ""),
        ("'", "'"),
    ],
)
def test_plain_path(given: str, meant: str) -> None:
    assert plain_path(given) == meant


def test_homes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [plain_path(given) for given in ("~", "~/a", "'~/a b'")] == [
        str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/a b",
    ]  # fmt: skip
    if os.name == "posix":
        assert plain_path("~root/a") == os.path.expanduser("~root/a") != "~root/a"


def test_a_name_that_has_quotes_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "'odd'").touch()
    assert plain_path("'odd'") == "'odd'"


def test_what_can_only_be_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    paths = ["./a/b", "../b", "/a", "~/a", "C:\\a", "D:/a", "a\\b", "a/b/c", "a/b.gguf", "a/b.safetensors"]
    assert [name for name in (*paths, "owner/name", "models/x", "gpt2", "name.with-dots/too") if is_path(name)] == paths


def test_what_is_said_of_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mistral").mkdir(parents=True)
    for path in ("models/mistrel", "model/mistral", "modles/deep/down"):
        assert "did you mean 'models" in missed(path), path
    assert missed("models/quite-another") == "", "the folder that they share is no likeness"
    assert "variables ($DATA) are not expanded" in missed("$DATA/rows.jsonl")
    assert "did you mean 'models/mistral'" in missed("models\\mistral")


@pytest.mark.parametrize("odd", ["x" * 5000, "a/" + "x" * 300, "a\0b", "ä" * 200])
def test_names_that_no_file_system_takes_are_not_there(odd: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        find_source(ModelConfig(model_name_or_path=f"./{odd}"), lambda _: None)
    with pytest.raises(DataError):
        find_place(f"./{odd}")
    values = {"model": {"model_name_or_path": odd}, "data": {"train": odd, "eval": f"~/{odd}"}}
    assert make_recipe(values, folder=tmp_path).data.train == odd
