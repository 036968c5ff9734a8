"""`--model M --adapter A` wherever a command takes a run's folder: any PEFT folder, a run's, an id on the Hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from run import tiny
from run.fixtures import Said
from topwork.cli.naming import base_named_by, named_first
from topwork.common.errors import AdapterError, RequestError
from topwork.run.given import given_adapter

Command = Callable[..., Said]
ASKED = "Order 7: my lamp hums."
HUB_ID = "ada/tickets"


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's adapter as somebody sends it."""
    return shutil.copytree(trained / "adapter", tmp_path_factory.mktemp("sent") / "tickets")


@pytest.fixture
def on_hub(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same in the Hub's cache, as its client keeps it."""
    import huggingface_hub.constants as constants

    cache, commit = tmp_path / "hub", "a" * 40
    place = cache / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(alone, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    return HUB_ID


def test_an_adapter_is_named_once() -> None:
    names = ("RUN", "OUT")
    assert named_first(("run", "out"), None, names) == (Path("run"), ["out"])
    assert named_first((None, None), "a", names) == ("a", [None])
    assert named_first(("out", None), "a", names) == ("a", ["out"])
    with pytest.raises(RequestError, match="--adapter a and run: both name an adapter"):
        named_first(("run", "out"), "a", names)
    with pytest.raises(RequestError, match="give RUN, or --adapter with a PEFT folder"):
        named_first((None, None), None, names)


def test_every_command_says_what_contradicts_itself(
    topwork: Command, trained: Path, alone: Path, tmp_path: Path
) -> None:
    both = {
        "merge": (trained, tmp_path / "out"), "export": (trained, tmp_path / "out", "--format", "peft"),
        "chat": (trained, ASKED), "eval": (trained,), "report": (trained,),
    }  # fmt: skip
    for verb, arguments in both.items():
        said = topwork(verb, *arguments, "--adapter", alone)
        assert said.code == 2, verb
        assert "both name an adapter" in said.err, verb
        said = topwork(verb, *(("--format", "peft") if verb == "export" else ()))
        assert said.code == 2, verb
        assert "or --adapter with a PEFT folder" in said.err, verb
    assert "OUT is missing" in topwork("merge", "--adapter", alone).err
    assert "given as the base already" in topwork("serve", "base", "--model", "other", "--adapter", alone).err
    said = topwork("train", "recipe.yaml", "--adapter", alone, "--set", f"adapter.init_from={trained}")
    assert "says the same option" in said.err
    said = topwork("eval", "--adapter", alone, "--checkpoint", 3)
    assert "only runs have them" in said.err


def test_merge_and_export(topwork: Command, alone: Path, trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for number, named in enumerate(((alone,), ("--adapter", alone), ("--model", tiny_llama, "--adapter", alone))):
        said = topwork("merge", *named, tmp_path / f"out-{number}", "--check", 0)
        assert said.code == 0, said.err
    weights = [(tmp_path / f"out-{number}" / "model.safetensors").read_bytes() for number in range(3)]
    assert weights[0] == weights[1] == weights[2]
    assert json.loads((tmp_path / "out-2" / "merge.json").read_text())["adapter"] == "tickets"
    said = topwork("merge", "--adapter", trained, tmp_path / "of-run", "--check", 0)
    assert said.code == 0, said.err
    assert (tmp_path / "of-run" / "model.safetensors").read_bytes() == weights[0]
    said = topwork(
        "export", "--model", tiny_llama, "--adapter", alone, tmp_path / "peft", "--format", "peft", "--check", 0
    )
    assert said.code == 0, said.err
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_chat(topwork: Command, alone: Path, trained: Path, tiny_llama: Path) -> None:
    length = ("--max-new-tokens", 6)
    by_run = topwork("chat", trained, ASKED, *length)
    assert by_run.code == 0, by_run.err
    for named in ((alone,), ("--adapter", alone), ("--model", tiny_llama, "--adapter", alone), ("--adapter", trained)):
        said = topwork("chat", *named, ASKED, *length)
        assert said.code == 0, said.err
        assert said.out == by_run.out, named
    bare = topwork("chat", "--adapter", alone, ASKED, "--base", *length)
    assert bare.out == topwork("chat", trained, ASKED, "--base", *length).out != by_run.out
    both = topwork("chat", "--compare", "--adapter", alone, ASKED, *length)
    assert both.out == f"without the adapter:\n{bare.out[:-1]}\n\nwith the adapter:\n{by_run.out[:-1]}\n"


def test_eval(topwork: Command, alone: Path, trained: Path, tiny_llama: Path, tickets: Path, tmp_path: Path) -> None:
    asked = ("--data", tickets, "--max-rows", 3, "--max-new-tokens", 4, "--json")
    named = json.loads(topwork("eval", "--model", tiny_llama, "--adapter", alone, *asked).out)
    assert {"before", "after"} <= named.keys()
    told = json.loads(topwork("eval", "--adapter", alone, *asked).out)
    assert told["rows"] == 3
    run = shutil.copytree(trained, tmp_path / "run")
    said = topwork("eval", "--adapter", run, "--max-rows", 2, "--json")
    assert json.loads(said.out)["data"] == "held out of training"
    assert (run / "evaluation-trial.json").is_file()
    assert "give --data" in topwork("eval", "--adapter", alone).err


def test_report(
    topwork: Command, alone: Path, tiny_llama: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = tmp_path / "scores.json"
    asked = ("--data", tickets, "--max-rows", 3, "--max-new-tokens", 4, "--out", scores)
    assert topwork("eval", "--adapter", alone, *asked).code == 0
    said = topwork("report", "--model", tiny_llama, "--adapter", alone, "--scores", scores)
    assert said.code == 0, said.err
    page = Path(said.out.strip())
    assert page == Path("reports") / "tickets" / "index.html"
    html = page.read_text("utf-8")
    assert "LoRA" in html
    assert "lies in no run" in html
    assert "Order " in html, "the samples"
    trainable = json.loads(topwork("count", tiny_llama, "--rank", 4, "--json").out)["table"]
    count = next(row["count"]["trainable"] for row in trainable if row["target_set"] == "all-linear")
    assert f"{count:,}" in html.replace("\u202f", ",").replace("\u2009", ",").replace("&#8239;", ",")
    assert not list(alone.glob("*.html")), "others' folders stay as they are"
    assert topwork("report", "--adapter", alone).code == 0, "its own page may be written again"
    (page.parent / "mine.txt").touch()
    assert "holds other files" in topwork("report", "--adapter", alone).err
    assert "holds no scores" in topwork("report", "--adapter", alone, "--scores", tickets, "--out", tmp_path / "p").err


def test_train_goes_on(
    topwork: Command, alone: Path, make_recipe: Callable[..., Path], trained: Path, tmp_path: Path
) -> None:
    import yaml

    path = make_recipe("on", training={"max_steps": 2, "eval_steps": 1, "save_steps": 1})
    values = yaml.safe_load(path.read_text("utf-8"))
    del values["adapter"]
    said = topwork("train", tiny.write_recipe(path, values), "--adapter", alone, "--json")
    assert said.code == 0, said.err
    before = json.loads((trained / "result.json").read_text("utf-8"))["eval_loss_after"]
    assert json.loads(said.out)["eval_loss_before"] == before
    assert yaml.safe_load((tmp_path / "on" / "recipe.yaml").read_text())["adapter"]["init_from"] == str(alone)


def test_serve_finds_its_base(alone: Path, trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    from topwork.cli.serve import _adapters, _base

    assert _adapters([str(alone), f"other={trained}"]) == {"tickets": str(alone), "other": str(trained)}
    assert list(_adapters([str(trained / "adapter")])) == [trained.name]
    with pytest.raises(RequestError, match="'tickets' is given twice"):
        _adapters([str(alone), f"tickets={trained}"])
    assert _base(None, None, {"a": str(alone)}, False) == str(tiny_llama)
    assert _base(None, str(tiny_llama), {"a": str(alone)}, False) == str(tiny_llama)
    assert _base(None, None, {"a": str(alone)}, True) is None, "the file names it"
    assert base_named_by(str(trained)) == str(trained)
    with pytest.raises(RequestError, match="no run's folder"):
        base_named_by(str(tmp_path))


def test_an_id_on_the_hub(topwork: Command, on_hub: str, trained: Path, tickets: Path, tmp_path: Path) -> None:
    given = given_adapter(on_hub)
    assert (given.name, given.recipe) == (HUB_ID, None)
    said = topwork("merge", "--adapter", on_hub, tmp_path / "out", "--check", 0)
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["adapter"] == HUB_ID
    asked = ("--data", tickets, "--max-rows", 2, "--max-new-tokens", 2)
    assert topwork("eval", "--adapter", on_hub, *asked).code == 0
    said = topwork("chat", "--adapter", "ada/nobody", ASKED)
    assert said.code == 2
    assert "there is no adapter 'ada/nobody'" in said.err
    with pytest.raises(AdapterError, match="tried as a Hub id"):
        given_adapter("ada/nobody")
    with pytest.raises(RequestError, match="is neither a run's folder"):
        given_adapter(Path("ada/nobody"))


def test_training_on_from_the_hub(
    topwork: Command, on_hub: str, make_recipe: Callable[..., Path], trained: Path
) -> None:
    import yaml

    path = make_recipe("on", training={"max_steps": 1, "eval_steps": 1, "save_steps": 1})
    values = yaml.safe_load(path.read_text("utf-8")) | {"adapter": {"init_from": on_hub}}
    said = topwork("train", tiny.write_recipe(path, values), "--json")
    assert said.code == 0, said.err
    before = json.loads((trained / "result.json").read_text("utf-8"))["eval_loss_after"]
    assert json.loads(said.out)["eval_loss_before"] == before
