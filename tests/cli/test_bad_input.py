"""Bad input through the command line: exit code 2, a message that helps, and not one file written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from run.fixtures import Said

Recipes = Callable[..., Path]
Command = Callable[..., Said]


@pytest.fixture
def refused(topwork: Command, tmp_path: Path) -> Callable[..., str]:
    """refused("train", …): the message, after the checks that hold for each."""

    def run(*arguments: object) -> str:
        before = tiny.folder_bytes(tmp_path)
        said = topwork(*arguments)
        assert said.code == 2, said
        assert tiny.folder_bytes(tmp_path) == before
        assert not (tmp_path / "run").exists() or before
        assert "Traceback" not in said.err
        _, error, message = said.err.rpartition("error: ")
        assert error
        return message

    return run


def row(answer: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}


JSONL = json.dumps(row("Hello!")) + "\n"
FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "is empty; expected at least one row"),
    "blank.jsonl": (b"\n\n", "is empty; expected at least one row"),
    "no_answer.jsonl": (
        (JSONL + json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n").encode(),
        "no_answer.jsonl:2: no answer",
    ),
    "empty_answer.jsonl": ((JSONL * 2 + json.dumps(row("")) + "\n").encode(), "empty_answer.jsonl:3: no answer"),
    "malformed.jsonl": ((JSONL * 4 + '{"messages": [\n' + JSONL).encode(), "line 5, column 15: malformed JSON"),
    "utf16.jsonl": (JSONL.encode("utf-16-le"), "data.encoding: utf-16-le"),
    "latin.jsonl": (JSONL.replace("Hello!", "K\xe4se").encode("latin-1"), "Say data.encoding: cp1252"),
    "unknown.jsonl": (b'{"a": "x", "b": "y"}\n', "data.columns: {prompt: a, completion: b}"),
    "preference.jsonl": (b'{"prompt": "x", "chosen": "y", "rejected": "z"}\n', "preference data"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_data_file_that_cannot_be_used(
    name: str, refused: Callable[..., str], make_recipe: Recipes, tmp_path: Path
) -> None:
    content, told = FILES[name]
    (tmp_path / name).write_bytes(content)
    message = refused("train", make_recipe(data={"train": str(tmp_path / name), "eval_fraction": 0.0}))
    assert told in message
    assert name in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("adapter.lora_alhpa=8", "unknown key 'adapter.lora_alhpa'; did you mean 'lora_alpha'?"),
        ("adapter.r=none", "'adapter.r'"),
        ("adapter.target_modules=[q_porj]", "did you mean 'q_proj'"),
        ("adapter.target_modules=.*nothing", "matches no module"),
        ("adapter.modules_to_save=[lm_haed]", "did you mean 'lm_head'"),
        ("adapter.rank_pattern={x_proj: 3}", "rank_pattern"),
        ("model.model_name_or_path=smollm-135m", "did you mean 'smollm2-135m'"),
        ("model.device=cuda:77", "is not to be had here"),
        ("training.tokens_per_pass=30", "training.tokens_per_pass is 30, and the longest sequence has"),
        ("data.max_length=40", "sequences are longer than 40 tokens"),
        ("data.train=nothing.jsonl", "nothing.jsonl does not exist"),
        ("data.chat_template=chatlm", "did you mean 'chatml'"),
        ("data.too_long=split", "cuts plain text in pieces"),
        ("training.report_to=[wandb]", "pip install wandb"),
        ("training.report_to=[tensorbord]", "'tensorboard' or 'wandb'"),
    ],
)
def test_a_recipe_that_does_not_fit(change: str, told: str, refused: Callable[..., str], make_recipe: Recipes) -> None:
    if "wandb]" in told:
        from importlib.util import find_spec

        if find_spec("wandb"):
            pytest.skip("Weights & Biases is installed here")
    assert told in refused("train", make_recipe(), "--set", change)


def test_long_answers_are_counted_and_cut_or_dropped_only_when_asked(
    refused: Callable[..., str], topwork: Command, make_recipe: Recipes, tmp_path: Path
) -> None:
    made = tiny.rows(12)
    for index in (3, 7):
        made[index]["messages"][1]["content"] *= 9
    rows = tiny.write_rows(tmp_path / "long.jsonl", made)
    recipe = make_recipe(data={"train": str(rows), "max_length": 250, "eval_fraction": 0.0}, training={"max_steps": 1})
    message = refused("train", recipe)
    assert "2 of 12 sequences are longer than 250 tokens" in message
    assert "long.jsonl:" in message
    for way, told in (("truncate", "2 truncated"), ("drop", "2 too long and dropped")):
        said = topwork("train", recipe, "--set", f"data.too_long={way}", "--overwrite")
        assert said.code == 0, said.err
        assert told in said.out


@pytest.mark.parametrize(
    ("family", "template", "data", "told"),
    [
        ("smollm2", "", {}, "chat_template"),
        ("gemma", None, {"system": "Be brief."}, "fold_system"),
    ],
)
def test_a_template_that_is_missing_or_rejects_the_rows(
    family: str, template: str | None, data: dict[str, Any], told: str, refused: Callable[..., str],
    topwork: Command, make_recipe: Recipes, tmp_path: Path,
) -> None:  # fmt: skip
    model = tiny.write_model(tmp_path / "model", family=family, template=template)
    talks = [{"messages": row["messages"] * 2} for row in tiny.rows(8)]  # one question and its answer would be read raw
    data = {**data, "train": str(tiny.write_rows(tmp_path / "talks.jsonl", talks))}
    recipe = make_recipe(model={"model_name_or_path": str(model)}, data=data, training={"max_steps": 1})
    assert told in refused("train", recipe)
    way = "data.chat_template=chatml" if template == "" else "data.fold_system=true"
    assert topwork("train", recipe, "--set", way).code == 0


def test_a_csv_with_byte_order_mark_and_semicolons_is_read(
    topwork: Command, make_recipe: Recipes, tmp_path: Path
) -> None:
    table = "\ufeffprompt;completion\n" + "".join(f'"Order {n}; late?";"yes, {n}"\n' for n in range(8))
    (tmp_path / "table.csv").write_text(table, "utf-8")
    said = topwork("train", make_recipe(data={"train": str(tmp_path / "table.csv")}, training={"max_steps": 1}))
    assert said.code == 0, said.err
    assert "prompt -> completion, 8 rows" in said.out


# The run's folder


def test_an_output_dir_that_holds_a_run(refused: Callable[..., str], trained: Path, make_recipe: Recipes) -> None:
    before = tiny.folder_bytes(trained)
    message = refused("train", make_recipe(), "--set", f"output_dir={trained}")
    assert all(way in message for way in ("--resume", "--overwrite"))
    assert tiny.folder_bytes(trained) == before


@pytest.mark.parametrize("flag", ["--resume", "--overwrite", None])
def test_an_output_dir_that_holds_something_else(
    flag: str | None, refused: Callable[..., str], make_recipe: Recipes, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("important")
    assert "holds other files" in refused("train", make_recipe(), *([flag] if flag else []))


def test_an_output_dir_that_is_a_file(refused: Callable[..., str], make_recipe: Recipes, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert "run is a file; name another place" in refused("train", make_recipe())
    assert "run is a file; name another place" in refused(
        "train", make_recipe("below"), "--set", f"output_dir={tmp_path}/run/a"
    )


# The other commands


def test_a_folder_that_is_no_run(refused: Callable[..., str], topwork: Command, tmp_path: Path) -> None:
    for arguments in (("eval", tmp_path), ("chat", tmp_path, "Hi")):
        assert "run's folder (no recipe.yaml)" in refused(*arguments)
    assert "is neither a run's folder" in refused("merge", tmp_path, tmp_path / "out")
    assert "metrics.jsonl is missing" in refused("report", tmp_path)
    assert "no run folder" in refused("report", tmp_path / "none")


def test_a_run_without_an_adapter_yet(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_bytes((trained / "recipe.yaml").read_bytes())
    message = refused("eval", tmp_path / "begun")
    assert "no finished adapter" in message
    assert "--resume" in message


def test_eval_needs_a_run_or_a_model(refused: Callable[..., str], trained: Path, tiny_llama: Path) -> None:
    assert "give a run's folder, or --model" in refused("eval")
    assert "both name an adapter" in refused("eval", trained, "--model", tiny_llama, "--adapter", trained / "adapter")
    assert "only a run has them" in refused("eval", "--model", tiny_llama, "--checkpoint", "best")
    assert "no rows of its own" in refused("eval", "--model", tiny_llama)
    assert "does not exist" in refused("eval", trained, "--data", "nothing.jsonl")


def test_eval_of_a_run_that_held_nothing_out(
    refused: Callable[..., str], topwork: Command, make_recipe: Recipes
) -> None:
    recipe = make_recipe(data={"eval_fraction": 0.0}, training={"max_steps": 1})
    assert topwork("train", recipe).code == 0
    assert "--data" in refused("eval", recipe.with_suffix(""))


def test_merging_into_what_is_there(refused: Callable[..., str], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    assert "holds files already" in refused("merge", trained, tmp_path)
    assert "is a file" in refused("merge", trained, tmp_path / "thesis.tex")
    assert "'bfloat16', 'float16' or 'float32'" in refused("merge", trained, tmp_path / "out", "--dtype", "float8")


def test_counting_what_is_not_there(refused: Callable[..., str]) -> None:
    assert "did you mean 'smollm2-135m'" in refused("count", "smollm2-135")
    assert "cannot be read" in refused("count", "nothing.yaml")


@pytest.mark.parametrize(
    "arguments", [("trian",), ("train",), ("train", "a", "--sett", "b"), ("chat", "a", "--top-p", "2")]
)
def test_commands_and_options_that_do_not_exist(arguments: tuple[str, ...], topwork: Command) -> None:
    said = topwork(*arguments)
    assert said.code == 2
    assert said.err.startswith("Usage: ")


def test_a_place_that_cannot_be_a_folder(topwork: Command, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    long = topwork("combine", tmp_path, tmp_path.parent / ("x" * 300))
    assert (long.code, "Traceback" in long.err) == (2, False)
    assert "cannot be a folder (a name of 300 bytes is too long" in long.err
    source = topwork("push", "y" * 300, "ada/x")
    assert (source.code, "Traceback" in source.err) == (2, False)
    assert "is too long for the disk" in source.err
