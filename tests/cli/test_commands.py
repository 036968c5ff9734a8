"""Every command on a finished run."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import topwork as package
from run import tiny
from run.fixtures import Said
from topwork.cli.app import app

Command = Callable[..., Said]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)  # type: ignore[union-attr]


# Help


def test_help_imports_no_torch_and_every_command_has_an_example() -> None:
    code = """
import contextlib, io, json, sys
from topwork.cli.app import app
said = {}
for name in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            app([*([name] if name else []), "--help"], prog_name="topwork")
        except SystemExit as exit:
            assert not exit.code, name
    said[name] = out.getvalue()
heavy = sorted({"torch", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules))
print(json.dumps([said, heavy]))
"""
    arguments = [sys.executable, "-c", code, json.dumps(["", *COMMANDS])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    said, heavy = json.loads(done.stdout)
    assert heavy == []
    assert all(command in said[""] for command in COMMANDS)
    assert {"train", "eval", "chat", "merge", "count", "report"} <= set(COMMANDS)
    for command in COMMANDS:
        assert f"Example: topwork {command} " in said[command], command
        options = re.findall(r"^│ +(?:\* +)?(--[\w-]+)(.*)", said[command], re.MULTILINE)
        assert options
        for option, told in options:
            assert re.search(r"[a-z]{3}", re.sub(r"<[^>]*>|\[[^]]*]", "", told)), f"{command} {option} says nothing"


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run([sys.executable, "-m", "topwork", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage: python -m topwork" in done.stderr


# train


def test_training_prints_lines_and_what_to_do_next(
    topwork: Command, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    said = topwork("train", make_recipe(training={"max_steps": 3}), "--set", "adapter.r=2")
    assert said.code == 0, said.err
    assert "step 3/3  loss " in said.out
    assert "step 0: validation loss" in said.out
    assert f"next: topwork eval {tmp_path / 'run'}" in said.out
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_training_for_a_program_prints_one_object(topwork: Command, make_recipe: Callable[..., Path]) -> None:
    said = topwork("train", make_recipe(training={"max_steps": 2}), "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps"] == 2
    assert "parameters are trained" in said.err


def test_a_failed_run_ends_with_one(topwork: Command, make_recipe: Callable[..., Path]) -> None:
    said = topwork("train", make_recipe(training={"learning_rate": 1e30, "eval_steps": 100}))
    assert said.code == 1
    assert re.search(r"error: step \d+: the loss is nan .* The batch was train\.jsonl:\d+, ", said.err)
    assert "Traceback" not in said.err


# eval


def test_eval_of_a_run(topwork: Command, trained: Path) -> None:
    said = topwork("eval", trained, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result == json.loads((trained / "evaluation.json").read_text("utf-8"))
    assert (result["rows"], result["grader"]) == (3, "json")
    assert set(result["before"]["fields"]) == {"product", "order", "urgent"}
    assert result["after"]["loss"] < result["before"]["loss"]
    assert [set(sample) for sample in result["samples"]] == [
        {"prompt", "reference", "source", "before", "after", "correct_before", "correct_after"}
    ] * 3

    said = topwork("eval", trained, "--only-after", "--max-rows", 2)
    assert said.code == 0
    assert said.out.splitlines()[-7].split() == ["after"]
    assert "2 rows, graded as json" in said.out
    assert "exact match" in said.out


def test_eval_of_other_rows(topwork: Command, trained: Path, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "other.jsonl", tiny.rows(5, first=100))
    result = json.loads(topwork("eval", trained, "--data", rows, "--max-rows", 5, "--json").out)
    assert result["rows"] == 5
    assert {sample["source"] for sample in result["samples"]} == {f"other.jsonl:{n}" for n in range(1, 6)}


def test_eval_of_any_model_and_adapter(
    topwork: Command, trained: Path, tiny_llama: Path, tickets: Path, tmp_path: Path
) -> None:
    asked = ("--data", tickets, "--max-rows", 3, "--max-new-tokens", 4, "--json")
    bare = json.loads(topwork("eval", "--model", tiny_llama, *asked).out)
    assert "after" not in bare
    both = json.loads(topwork("eval", "--model", tiny_llama, "--adapter", trained / "adapter", *asked).out)
    assert both["before"]["loss"] == bare["before"]["loss"]
    assert both["after"]["loss"] != both["before"]["loss"]


def test_an_adapter_of_another_base_is_refused_with_both_names(
    topwork: Command, trained: Path, tiny_llama: Path, tickets: Path, tmp_path: Path
) -> None:
    other = tiny.write_model(tmp_path / "other-llama", seed_shift=0.01)
    asked = ("eval", "--model", other, "--adapter", trained / "adapter", "--data", tickets, "--max-rows", 2)
    said = topwork(*asked, "--max-new-tokens", 2)
    assert said.code == 2
    assert str(other) in said.err
    assert str(tiny_llama) in said.err
    assert "--force" in said.err
    said = topwork(*asked, "--max-new-tokens", 2, "--force")
    assert said.code == 0, said.err
    assert "loaded all the same" in said.out


# chat


def test_one_question(topwork: Command, trained: Path) -> None:
    asked = ("chat", trained, "Order 7: my lamp hums.", "--max-new-tokens", 12)
    with_it, without = topwork(*asked), topwork(*asked, "--base")
    assert with_it.code == without.code == 0
    assert with_it.out.strip() != without.out.strip()
    assert topwork(*asked, "--compare").out == (
        f"without the adapter:\n{without.out[:-1]}\n\nwith the adapter:\n{with_it.out[:-1]}\n"
    )
    assert package.answer(trained, "Order 7: my lamp hums.", sampling=_sampling(12)) == with_it.out[:-1]
    warm = (*asked, "--temperature", 1.5, "--seed")
    assert topwork(*warm, 1).out == topwork(*warm, 1).out != topwork(*warm, 2).out
    assert topwork(*asked, "--base", "--system", "Count to ten.").out != without.out


def _sampling(tokens: int):  # type: ignore[no-untyped-def]
    from topwork.generation.sampling import Sampling

    return Sampling(max_new_tokens=tokens)


def test_a_conversation(topwork: Command, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(*lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        said = topwork("chat", trained, "--max-new-tokens", 1)
        assert said.code == 0, said.err
        assert "/base and /adapter switch" in said.err
        return said.out.removesuffix("\n").split("\n")

    question = "Order 7: my lamp hums."
    first, second = say(question, "And order 8?")
    assert say(question, "/new", question) == [first, first]
    assert say("", question, "/quit", question) == [first]
    assert say("/unknown", question) == [first]
    bare = topwork("chat", trained, question, "--base", "--max-new-tokens", 1).out.removesuffix("\n")
    assert say("/base", question, "/new", "/adapter", question) == [bare, first]
    assert second is not None


# report, merge, count


def test_report_of_a_run(topwork: Command, trained: Path) -> None:
    topwork("eval", trained)
    said = topwork("report", trained)
    assert said.code == 0, said.err
    page, picture = map(Path, said.out.split())
    assert page == trained / "report" / "index.html"
    assert picture.read_bytes().startswith(b"\x89PNG")
    html = page.read_text("utf-8")
    assert "Order " in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_a_merged_model_is_an_ordinary_one(topwork: Command, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = topwork("merge", trained, out, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["dtype"] == "float32"
    assert result["largest_relative_difference"] <= 1e-5
    assert result["sequences"] == 40
    assert result["verdict"]["grade"] == "same"
    assert json.loads((out / "merge.json").read_text("utf-8"))["verdict"] == result["verdict"]

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    messages = [{"role": "user", "content": "Order 7: my lamp hums."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    asked = topwork("chat", trained, "Order 7: my lamp hums.", "--max-new-tokens", 12)
    assert tokenizer.decode(generated, skip_special_tokens=True) == asked.out[:-1]

    assert "holds files already" in topwork("merge", trained, out).err
    said = topwork("merge", trained, out, "--overwrite", "--dtype", "bfloat16")
    assert said.code == 0, said.err
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert "merged in bfloat16 and compared on 40 inputs" in said.out
    told = json.loads((out / "merge.json").read_text("utf-8"))["verdict"]
    results = said.out.splitlines()
    assert told["text"] == results[results.index("merged in bfloat16 and compared on 40 inputs: " + _inputs(out)) - 1]
    unchecked = topwork("merge", trained, out, "--overwrite", "--check", 0).out
    assert "nothing says whether it answers as base + adapter does" in unchecked


def _inputs(folder: Path) -> str:
    return str(json.loads((folder / "merge.json").read_text("utf-8"))["inputs"])


def test_counting(topwork: Command, trained: Path, tiny_llama: Path, make_recipe: Callable[..., Path]) -> None:
    said = topwork("count", tiny_llama, "--rank", 4, "--rank", 8, "--json")
    assert said.code == 0, said.err
    table = json.loads(said.out)["table"]
    assert {row["r"] for row in table} == {4, 8}
    trainable = json.loads((trained / "result.json").read_text())["parameters"]["trainable"]
    rows = {(row["target_set"], row["r"]): row["count"]["trainable"] for row in table}
    assert rows["all-linear", 4] == trainable
    own = json.loads(topwork("count", make_recipe(), "--json").out)["own"]
    assert own["trainable"] == trainable
    text = topwork("count", make_recipe(), "--set", "adapter.r=8").out
    assert f"this recipe: {2 * trainable:,} trained" in text


# The same from Python


def test_the_same_from_python(make_recipe: Callable[..., Path], tmp_path: Path, trained: Path) -> None:
    run = package.train(str(make_recipe(training={"max_steps": 2})), log=lambda _: None)
    scores = package.evaluate(run.folder, max_rows=2, log=lambda _: None)
    assert math.isfinite(scores["after"]["loss"])
    assert isinstance(package.answer(run.folder, "Hi", sampling=_sampling(2)), str)
    merged = package.merge(run.folder, tmp_path / "merged", log=lambda _: None)
    assert merged["sequences"] == 40
    copied = shutil.copytree(trained, tmp_path / "copied")
    assert package.report(copied).html.is_file()
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match=r"it has .*evaluate"):
        package.evalute  # noqa: B018
