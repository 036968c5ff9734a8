"""What a path names: splits of folders, globs, lists, Hub folders; what is left out of them is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import DataError
from topwork.common.memory import Free
from topwork.data.config import DataConfig, SourceConfig
from topwork.data.examples import Data, load_data
from topwork.data.files import sources
from topwork.data.files.places import split_of
from topwork.data.files.rows import Reading, read_rows
from topwork.data.files.sources import implied_eval, memory_notes
from topwork.recipe.recipe import make_recipe

Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """folder(*names): a folder of files of one row each, whose text is the file's name."""

    def make(*names: str, under: str = "set") -> Path:
        for name in names:
            path = tmp_path / under / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name if path.suffix == ".txt" else json.dumps({"text": name}) + "\n", "utf-8")
        return tmp_path / under

    return make


def reading(path: Path | str, **source: Any) -> Reading:
    return read_rows(SourceConfig(path=str(path), **source))


def texts(path: Path | str, **source: Any) -> list[str]:
    return [row.fields["text"] for row in reading(path, **source).rows]


def refused(path: Path | str, *words: str, **source: Any) -> None:
    with pytest.raises(DataError) as error:
        reading(path, **source)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("my_training-data.jsonl", "train"),
        ("trainset.csv", "train"),
        ("Train", "train"),
        ("squad-dev-v1.1.json", "validation"),
        ("val_2.jsonl", "validation"),
        ("valid.txt", "validation"),
        ("held-out.jsonl", "validation"),
        ("testset_w_refs.csv", "test"),
        ("TEST.jsonl", "test"),
        ("eval.jsonl", "test"),
        ("test1.jsonl", "test"),
        ("latest.jsonl", None),
        ("constraints.jsonl", None),
        ("retrained.jsonl", None),
        ("valence.jsonl", None),
        ("medieval.txt", None),
        ("part-00000-of-00002.jsonl", None),
    ],
)
def test_a_split_is_a_word_of_its_own(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_of_a_folder_with_splits_only_the_training_split_is_learned(folder: Make) -> None:
    found = reading(folder("train.jsonl", "validation.jsonl", "test.jsonl"))
    assert [row.fields["text"] for row in found.rows] == ["train.jsonl"]
    assert found.notes == ("set: its training split is read (train.jsonl); not learned: test.jsonl, validation.jsonl",)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["data.jsonl", "test.jsonl"], ["data.jsonl"]),
        (["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"], ["train/0.jsonl", "train/1.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev-00000-of-00001.jsonl"],
         ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "README.md"],
         ["data/train-00000-of-00001.jsonl"]),
        (["train_en.jsonl", "train_de.jsonl", "val_en.jsonl"], ["train_de.jsonl", "train_en.jsonl"]),
        (["trainset.jsonl", "devset.jsonl", "testset_w_refs.jsonl"], ["trainset.jsonl"]),
        (["en/a.jsonl", "de/b.jsonl"], ["de/b.jsonl", "en/a.jsonl"]),
        (["a.jsonl", "old/b.jsonl"], ["a.jsonl"]),
        (["a.jsonl", "test/b.jsonl"], ["a.jsonl"]),
        (["a.jsonl", ".b.jsonl", "_c.jsonl", "README.txt", "LICENSE.txt", "dataset_infos.json", "a.jsonl.sha256"],
         ["a.jsonl"]),
        (["a.jsonl", "notes.txt"], ["a.jsonl"]),
        (["a.txt", "b.txt"], ["a.txt", "b.txt"]),
    ],
)  # fmt: skip
def test_which_files_of_a_folder_are_read(folder: Make, names: list[str], read: list[str]) -> None:
    assert texts(folder(*names)) == read


def test_a_split_is_named(folder: Make) -> None:
    path = folder("train.jsonl", "dev.jsonl", "test.jsonl")
    assert texts(path, split="test") == ["test.jsonl"]
    assert texts(path, split="dev") == texts(path, split="validation") == texts(path, split="val") == ["dev.jsonl"]
    assert texts(f"{path}::test") == texts(f"{path}:test") == ["test.jsonl"]
    assert texts(path, split="validation|test|") == ["dev.jsonl"]
    assert texts(path, split="holdout2|") == ["train.jsonl"]
    refused(path, "has no split 'tests'; did you mean 'test'?; its splits are validation, test, train", split="tests")
    refused(folder("a.jsonl", under="b"), "has no split 'test'; no file or folder in it is named", split="test")
    refused(path / "test.jsonl", "without splits; leave split out", split="train")
    assert texts(path / "test.jsonl") == texts(path / "test.jsonl", split="test") == ["test.jsonl"]


def test_a_folder_of_nothing_to_train_on_is_refused(folder: Make) -> None:
    path = folder("test.jsonl", "valid.jsonl")
    refused(path, "nothing to train on, only the splits test (test.jsonl), validation (valid.jsonl)", "split: test}")


def test_several_training_splits_are_not_mixed(folder: Make) -> None:
    path = folder("data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl")
    refused(path, "several training splits: train_gen, train_sft; name one: {path: ", "/set, split: train_gen}")
    assert texts(path, split="train_sft") == ["data/train_sft-00000-of-00001.jsonl"]


def test_what_is_left_out_and_what_is_twice_there_is_told(folder: Make, tmp_path: Path) -> None:
    assert reading(folder("a.jsonl", "notes.txt")).notes == ("set: one file is read (a.jsonl); not learned: notes.txt",)
    path = folder("train.jsonl", "x.jsonl", under="b")
    (path / "train.csv").write_text("text\nhi\n")
    found = reading(path)
    assert [row.fields["text"] for row in found.rows] == ["hi", "train.jsonl"]
    assert found.notes == (
        "b: its training split is read (train.csv, train.jsonl); not learned: x.jsonl",
        "b: train.csv and train.jsonl have one name in several formats, and all are read; if they are the same rows, "
        "name one of them",
    )


def test_files_of_one_name_are_told_apart(folder: Make) -> None:
    path = folder("en/part.jsonl", "de/part.jsonl")
    assert [row.source for row in reading(path).rows] == ["de/part.jsonl:1", "en/part.jsonl:1"]


def test_files_of_other_columns_are_other_sources(folder: Make) -> None:
    path = folder("a.jsonl", "c.jsonl")
    (path / "b.jsonl").write_text('{"prompt": "hi", "completion": "hello"}\n')
    told = f"[{path}/a.jsonl, {path}/b.jsonl]"
    refused(path, "a.jsonl has the columns text, and b.jsonl prompt, completion", f"name each as a source: {told}")
    (path / "b.jsonl").write_text('{"id": 1, "text": "hi"}\n')
    assert texts(path) == ["a.jsonl", "hi", "c.jsonl"]
    (path / "a.jsonl").write_text("{}\n")
    assert [row.fields for row in reading(path).rows] == [{}, {"id": 1, "text": "hi"}, {"text": "c.jsonl"}]


def test_globs(folder: Make) -> None:
    path = folder("part-1.jsonl", "part-2.jsonl", "other.jsonl", "train.jsonl", "test.jsonl", "deep/part-3.jsonl")
    assert texts(f"{path}/part-*.jsonl") == ["part-1.jsonl", "part-2.jsonl"]
    assert texts(f"{path}/**/part-*.jsonl") == ["deep/part-3.jsonl", "part-1.jsonl", "part-2.jsonl"]
    assert texts(f"{path}/t*.jsonl") == ["train.jsonl"]
    assert texts(f"{path}/te*.jsonl") == ["test.jsonl"]
    refused(
        f"{path}/prat-*.jsonl", "no data file matches", "did you mean 'part-2.jsonl'", "set holds deep, other.jsonl"
    )
    refused(f"{path}/no/*.jsonl", "no does not exist")
    strange = folder("a[1].jsonl", under="b")
    assert texts(strange / "a[1].jsonl") == ["a[1].jsonl"]


README = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: first/tr*
  - split: test
    path:
    - first/te*
- config_name: other
  data_files: second/*.jsonl
---
# a data set
"""


def test_a_hub_folder_is_read_as_its_readme_says(folder: Make) -> None:
    path = folder("first/tr1.jsonl", "first/tr2.jsonl", "first/te1.jsonl", "second/x.jsonl")
    (path / "README.md").write_text(README)
    assert texts(path) == ["first/tr1.jsonl", "first/tr2.jsonl"]
    assert texts(path, split="test") == texts(f"{path}:main:test") == ["first/te1.jsonl"]
    assert texts(f"{path}:other") == ["second/x.jsonl"]
    refused(f"{path}:othr", "no configuration 'othr'; did you mean 'other'?; its README names main, other")
    (path / "README.md").write_text(README.replace("  default: true\n", ""))
    refused(path, "several configurations: main, other; name one", ":main")
    (path / "README.md").write_text(README.replace("first/", "third/"))
    refused(path, "names data files of which none is there")


# What validates


def load(config: DataConfig, tokenizer: object, log: list[str] | None = None) -> Data:
    return load_data(config, tokenizer, 512, 0, [].append if log is None else log.append)


def learned(data: Data, tokenizer: Any) -> tuple[list[str], list[str]]:
    decoded = [
        [tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows] for rows in (data.train, data.eval)
    ]
    return decoded[0], decoded[1]


def test_the_validation_split_of_a_folder_validates(folder: Make, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("phi3")
    path, log = folder("train.jsonl", "validation.jsonl", "test.jsonl"), []
    found = load(DataConfig(train=str(path), eval_fraction=0.2), tokenizer, log)
    assert learned(found, tokenizer) == (["train.jsonl"], ["validation.jsonl"])
    assert [line for line in log if line.startswith("set: ")] == [
        "set: its training split is read (train.jsonl); not learned: test.jsonl, validation.jsonl",
        "set: its validation split is read (validation.jsonl)",
    ]
    whole = load(DataConfig(train=str(path), eval=str(path)), tokenizer)
    assert learned(whole, tokenizer) == (["train.jsonl"], ["validation.jsonl"])
    for test in (SourceConfig(path=str(path), split="test"), f"{path}::test"):
        tested = load(DataConfig(train=str(path), eval=test), tokenizer)
        assert learned(tested, tokenizer) == (["train.jsonl"], ["test.jsonl"])


def test_evaluation_reads_the_test_split(folder: Make, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("phi3")
    path = folder("train.jsonl", "validation.jsonl", "test.jsonl")
    config = DataConfig(train=str(path))
    assert learned(load(config.reading(str(path)), tokenizer), tokenizer) == (["test.jsonl"], [])
    assert learned(load(config.reading(f"{path}::train"), tokenizer), tokenizer)[0] == ["train.jsonl"]
    assert learned(load(config.reading(f"{path}:dev"), tokenizer), tokenizer)[0] == ["validation.jsonl"]
    only = folder("test.jsonl", under="b")
    assert learned(load(config.reading(str(only)), tokenizer), tokenizer) == (["test.jsonl"], [])
    plain = folder("a.jsonl", under="c")
    assert learned(load(config.reading([str(plain), str(path / "train.jsonl")]), tokenizer), tokenizer) == (
        ["a.jsonl", "train.jsonl"],
        [],
    )


def test_implied_eval_of_lists_and_of_what_has_none(folder: Make) -> None:
    first, second = folder("train.jsonl", "dev.jsonl"), folder("a.jsonl", under="b")
    listed: list[str | SourceConfig] = [SourceConfig(path=str(first), weight=2.0, max_rows=1), str(second)]
    implied = implied_eval(DataConfig(train=listed))
    assert implied is not None
    assert [(each.path, each.split, each.weight, each.max_rows) for each in implied] == [
        (str(first), "validation", 1.0, None)
    ]
    for config in (
        DataConfig(train=str(second)),
        DataConfig(train=str(first / "train.jsonl")),
        DataConfig(train=str(first), eval=str(second)),
        DataConfig(train=SourceConfig(path=str(first), split="validation")),
        DataConfig(train="owner/name"),
    ):
        assert implied_eval(config) is None


def test_rows_of_two_sources_with_files_of_one_name(folder: Make, make_tokenizer: Callable[..., Any]) -> None:
    paths = [str(folder("train.jsonl", under=under) / "train.jsonl") for under in ("a", "b")]
    Path(paths[1]).write_text('{"text": ""}\n{"text": "good"}\n')
    config = DataConfig(train=list(paths), on_bad_row="drop", eval_fraction=0)
    found = load(config, make_tokenizer("phi3"))
    assert [row.source for row in found.train] == ["train.jsonl:1", "source 2, train.jsonl:2"]


def test_notes_stand_beside_an_error_that_they_explain(folder: Make, make_tokenizer: Callable[..., Any]) -> None:
    path = folder("a.jsonl") / "a.csv"
    path.write_text("What is your name?,My name is Ann.\nWho?,Ann\n")
    with pytest.raises(DataError, match=r"none of the known formats.*; a.csv: its first line is taken for the names"):
        load(DataConfig(train=str(path)), make_tokenizer("phi3"))


# Beside the recipe, and memory


def test_lists_objects_and_globs_are_looked_for_beside_the_recipe(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder("a.jsonl", "b.jsonl", "train/c.jsonl")
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "model": {"model_name_or_path": "m"},
        "data": {
            "train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}, "?.jsonl", ".:train", "gone.csv"],
            "eval": "*.jsonl",
        },
        "evaluation": {"data": "a.jsonl"},
    }
    recipe = make_recipe(values, folder=path)
    assert recipe.data.train == [
        str(path / "a.jsonl"),
        SourceConfig(path=str(path / "b.jsonl"), weight=2),
        str(path / "?.jsonl"),
        f"{path}:train",
        "gone.csv",
    ]
    assert recipe.data.eval == str(path / "*.jsonl")
    assert recipe.evaluation.data == str(path / "a.jsonl")
    assert make_recipe(values, folder=tmp_path).data.eval == str(tmp_path / "*.jsonl"), "missed beside the recipe"


def test_files_larger_than_memory_are_told_before_they_are_read(folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder("a.jsonl")
    (path / "a.jsonl").write_text('{"text": "a"}\n' * 100)
    size = (path / "a.jsonl").stat().st_size
    config = DataConfig(train=str(path))
    for free, told in ((size * 2 - 2, 1), (size * 2, 0)):
        monkeypatch.setattr(sources, "free_host_memory", lambda free=free: Free(free))
        assert len(memory_notes(config)) == told
    monkeypatch.setattr(sources, "free_host_memory", lambda: Free(1))
    assert memory_notes(config)[0].startswith("warning: set holds about")
    assert "data.streaming: true" in memory_notes(config)[0]
    assert not memory_notes(config.model_copy(update={"streaming": True}))
    assert not memory_notes(config.model_copy(update={"max_rows": 10}))


def test_shards_that_are_missing_are_told(tmp_path: Path) -> None:
    for name in ("train-00000-of-00003", "test-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n', "utf-8")
    found = read_rows(SourceConfig(path=str(tmp_path)))
    assert found.notes[1:] == (f"warning: {tmp_path.name}: of 3 files train-…-of-00003 2 are missing",)
    assert read_rows(SourceConfig(path=str(tmp_path / "train-00000-of-00003.jsonl"))).notes == ()
    for number in (1, 2):
        (tmp_path / f"train-0000{number}-of-00003.jsonl").write_text('{"text": "b"}\n', "utf-8")
    assert len(read_rows(SourceConfig(path=str(tmp_path))).notes) == 1
