"""Files that are given to `topwork import`: recognised, or refused in a sentence, never a traceback."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from run.test_import_meaning import AXOLOTL, LLAMAFACTORY, MLX, TORCHTUNE, TRL, UNSLOTH, imported
from topwork.cli.app import app
from topwork.common.errors import RequestError
from topwork.recipe.recipe import all_keys, load_recipe
from topwork.run.import_ import import_recipe, write_recipe
from topwork.run.importing.tools.table import TOOLS

LETTERS = "abcdefgh"
BOMB = "base_model: x\na: &a [x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n" for before, after in zip(LETTERS, LETTERS[1:])
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.yaml", b"", "is empty"),
        ("comment.yaml", b"# nothing\n", "is empty"),
        ("list.yaml", b"- a\n- b\n", "holds no keys"),
        ("broken.yaml", b"a: [1,\nb: }", "is not YAML"),
        ("twice.yaml", b"base_model: a\nbase_model: b\n", "given twice"),
        ("binary.yaml", b"\x80\x81\x00", "no text in UTF-8"),
        ("zeros.yaml", b"a\0b", "is no text"),
        ("bad.py", b"def f(:\n", "line 1 is not Python"),
        ("other.py", b"print('hello')\n", "calls none of"),
        ("bad.ipynb", b"{\"cells\": 3", "is no notebook"),
        ("none.ipynb", b"{}", "is no notebook"),
        ("notes.sh", b"echo hello\n", "holds no command"),
        ("huge.yaml", b"#" * (2 * 2**20 + 1), "no training config has"),
        ("bomb.yaml", BOMB.encode(), "more than 20,000 values"),
        ("deep.yaml", b"base_model: " + b"[" * 1500 + b"]" * 1500, "YAML|nested too deep"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=says):
        import_recipe(tmp_path / name)


def test_a_folder_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(AXOLOTL)
    with pytest.raises(RequestError, match="is a folder"):
        import_recipe(tmp_path)
    with pytest.raises(RequestError, match=r"train\.yml cannot be read.*train\.yaml"):
        import_recipe(tmp_path / "train.yml")


def test_names_that_blow_up_are_not_read(tmp_path: Path) -> None:
    names = [f"a{n} = [{', '.join([f'a{n - 1}'] * 10)}]" for n in range(1, 12)]
    text = "\n".join(["a0 = 1", *names, UNSLOTH.replace("r = 8", "r = a11")])
    found = imported(tmp_path, text, "train.py")
    assert "get_peft_model.r" in {told.given.key for told in found.of("not read")}


# Which tool


@pytest.mark.parametrize(
    ("text", "tool"),
    [(AXOLOTL, "axolotl"), (LLAMAFACTORY, "llamafactory"), (TRL, "trl"), (TORCHTUNE, "torchtune"), (MLX, "mlx-lm")],
)
def test_the_tool_is_known_by_its_keys(text: str, tool: str, tmp_path: Path) -> None:
    assert imported(tmp_path, text).tool == tool
    as_json = json.dumps(yaml.safe_load(text))
    assert imported(tmp_path, as_json, "config.json").tool == tool


def test_a_tool_that_is_said_goes_before_its_keys(tmp_path: Path) -> None:
    found = imported(tmp_path, TRL, tool="llamafactory")
    assert found.tool == "llamafactory"
    assert not found.recognised
    assert {told.given.key for told in found.of("unknown")} == {"dataset_name", "use_peft", "lora_r"}
    with pytest.raises(RequestError, match="did you mean 'axolotl'"):
        imported(tmp_path, TRL, tool="axolotel")


def test_keys_of_none_and_of_two(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the keys of no tool.*'sequence_length' may be axolotl's 'sequence_len'"):
        imported(tmp_path, "sequence_length: 3\n")
    with pytest.raises(RequestError, match="may be for axolotl or trl"):
        imported(tmp_path, "base_model: a\ndataset_name: b\n")
    with pytest.raises(RequestError, match="a recipe of Topwork's already"):
        imported(tmp_path, "model: {model_name_or_path: a}\ndata: {train: b}\n")


def test_a_key_that_is_not_known_is_told_with_the_nearest(tmp_path: Path) -> None:
    found = imported(tmp_path, AXOLOTL + "context_parapllel_size: 2\n")
    told = found.of("unknown")[0]
    assert told.given.line == 17
    assert "did you mean 'context_parallel_size'" in told.note


# What is missing


def test_what_is_missing_is_told_and_nothing_written(tmp_path: Path) -> None:
    found = imported(tmp_path, "\n".join(AXOLOTL.splitlines()[:4]) + "\nsequence_len: 8\nlora_r: 4\n")
    assert found.missing == ("data.train: no data set is given (datasets); name a file, a folder or a Hub data set",)
    with pytest.raises(RequestError, match="--partial"):
        write_recipe(found, tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()
    written = write_recipe(found, tmp_path / "recipe.yaml", partial=True)
    assert "# Missing: data.train" in written.read_text()
    assert load_recipe(written, ["data.train=rows.jsonl"]).adapter.r == 4  # type: ignore[attr-defined]


def test_a_value_that_a_recipe_refuses_is_missing(tmp_path: Path) -> None:
    found = imported(tmp_path, AXOLOTL.replace("learning_rate: 1e-4", "learning_rate: -1"))
    assert any("'training.learning_rate'" in each for each in found.missing)


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    found = imported(tmp_path, AXOLOTL)
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(RequestError, match="is there already"):
        write_recipe(found, tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_line_breaks_in_their_values_stay_in_comments(tmp_path: Path) -> None:
    hostile = 'output_dir: "a\\nadapter: {method: full}\\n\\u2028b"\n"odd\\nkey: 1": "x\\ny: 2"\n'
    found = imported(tmp_path, AXOLOTL + hostile)
    read = yaml.safe_load(found.recipe)
    assert set(read) == {"model", "quantization", "adapter", "data", "training", "output_dir"}
    assert read["output_dir"] == "a\nadapter: {method: full}\n\u2028b"


ODD: tuple[Any, ...] = (None, True, -1, 0, 0.5, 1e30, "", "x", "1e-4", [], [1], ["a", None], {}, {"a": [1]}, [[]], "$x")


@pytest.mark.parametrize("tool", TOOLS)
def test_any_value_at_any_key_is_answered(tool: str, tmp_path: Path) -> None:
    draw = random.Random(tool)
    names = [key.theirs.replace("*", "x").replace("[]", "[0]") for key in TOOLS[tool].keys]
    for number in range(12):
        values: dict[str, Any] = {}
        for name in draw.sample(names, min(25, len(names))):
            _put(values, name, draw.choice(ODD))
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(values))
        found = import_recipe(file, tool)
        given = {told.given.key.partition("[")[0].partition(".")[0] for told in found.told}
        assert set(values) <= given  # nothing is dropped in silence
        assert yaml.safe_load(found.recipe) is None or found.values == yaml.safe_load(found.recipe)


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.replace("[0]", "").split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        values[parent] = values = inner if isinstance(inner, dict) else {}
    values[last] = value


# The tables


@pytest.mark.parametrize("tool", TOOLS.values(), ids=lambda tool: tool.name)
def test_every_record_says_what_becomes_of_its_key(tool: Any) -> None:
    known = {*all_keys(), "training.objective", ""}
    for key in tool.keys:
        assert set(key.ours.split(", ")) <= known, key.theirs
        assert key.ours or key.how or key.convert, key.theirs
    assert all(tool.record(sign) or tool.has_inside(sign) for sign in tool.signs)


# The command


def test_it_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(MLX)  # whose layers are counted
    heavy = "{'torch', 'transformers', 'datasets'} & set(sys.modules)"
    code = f"import sys, topwork; topwork.import_recipe('config.yaml'); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["import", *arguments])


def test_the_command_prints_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(AXOLOTL)
    done = run(str(file))
    assert done.exit_code == 0
    assert yaml.safe_load(done.stdout)["adapter"]["r"] == 8
    assert "is axolotl's (recognised)" in done.stderr
    assert "lora_r" not in done.stderr
    assert "line 14: lora_r: 8 -> adapter.r" in run(str(file), "--all").stderr


def test_the_command_writes_a_recipe_and_tells(tmp_path: Path) -> None:
    file, out = tmp_path / "config.yaml", tmp_path / "recipe.yaml"
    file.write_text(AXOLOTL)
    done = run(str(file), "--out", str(out), "--devices", "2")
    assert f"written to {out}" in done.stdout
    assert load_recipe(out).training.batch_size == 16
    assert isinstance(run(str(file), "--out", str(out)).exception, RequestError)


def test_the_command_for_programs(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(AXOLOTL + "rl: dpo\n")
    done = run(str(file), "--json")
    told = json.loads(done.stdout)
    assert told["tool"] == "axolotl"
    assert told["refused"]
    assert {
        "key": "lora_r",
        "value": 8,
        "line": 14,
        "cell": None,
        "fate": "mapped",
        "ours": "adapter.r",
        "note": "",
    } in told["keys"]
    assert isinstance(done.exception, RequestError)
    assert done.exception.exit_code == 2
