"""`topwork combine` and `topwork compare` on runs and PEFT folders, whole."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from merging.adapters_of import write_one
from reference.combining import furthest, peft_deltas, weighted
from run import tiny
from run.fixtures import Said
from topwork.adapters.peft_format import read_adapter
from topwork.common.errors import AdapterError, DataError, ModelError, RequestError, RunError
from topwork.common.files import verify_folder
from topwork.merging.combine.table import WAYS
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.run.combine import combine
from topwork.run.likeness import compare_adapters
from topwork.run.train import train

Command = Callable[..., Said]
SILENT: Callable[[str], None] = lambda _: None  # noqa: E731


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two PEFT folders of unlike ranks, scales and targets."""
    base, place = load_base(ModelConfig(model_name_or_path=str(tiny_llama)), SILENT), tmp_path_factory.mktemp("pair")
    options: list[dict[str, Any]] = [
        {"r": 4, "lora_alpha": 8}, {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    ]  # fmt: skip
    made = [
        write_one(place / name, base, each, seed, str(tiny_llama))
        for seed, (name, each) in enumerate(zip(("first", "second"), options))
    ]
    return made[0], made[1]


@pytest.fixture(scope="module")
def other_run(tiny_llama: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run of two steps, on other rows."""
    folder = tmp_path_factory.mktemp("other")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.rows(30, first=100))
    training = {"learning_rate": 0.02, "max_steps": 2, "eval_steps": 2}
    values = tiny.recipe_values(tiny_llama, rows, folder / "second", training=training, adapter={"r": 2})
    return train(tiny.write_recipe(folder / "recipe.yaml", values), log=SILENT).folder


@pytest.mark.parametrize("method", WAYS)
def test_every_method_by_the_command_line(
    method: str, pair: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, topwork: Command
) -> None:
    said = topwork("combine", *pair, tmp_path / "out", "--method", method, "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert record == json.loads((tmp_path / "out" / "combine.json").read_text("utf-8"))
    assert (record["method"], record["rank"]) == (method, 4 if method == "svd" else 6)
    assert [(s["name"], s["rank"], s["weight"]) for s in record["sources"]] == [("first", 4, 1), ("second", 2, 1)]
    assert all(source["content"].startswith("sha256:") for source in record["sources"])
    lost = record["discarded_energy"]
    assert len(lost["modules"]) == record["modules"] == 14
    assert (lost["overall"] < 1e-12) == (method in ("cat", "linear", "task-arithmetic", "slerp", "knots"))
    verify_folder(tmp_path / "out")
    saved = read_adapter(tmp_path / "out")
    assert saved.config.model_dump()["lora_alpha"] == record["rank"]
    assert str(tiny_llama.parent) not in (tmp_path / "out" / "combine.json").read_text("utf-8")


def test_signed_weights_of_folders_and_what_peft_reads(
    pair: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, topwork: Command
) -> None:
    said = topwork("combine", *pair, tmp_path / "out", "--method", "task-arithmetic", "--weights", "-1,0.5")
    assert said.code == 0, said.err
    assert "-1 first (rank 4, 14 modules)" in said.out
    assert "first: 10 modules are changed by it alone; the others count as zero there" in said.out
    assert "exact: this rank leaves nothing out" in said.out
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    expected = weighted([peft_deltas(folder, model) for folder in pair], [-1.0, 0.5])
    assert furthest(peft_deltas(tmp_path / "out", model), expected) <= 1e-5
    PeftModel.from_pretrained(model, str(tmp_path / "out"))


def test_the_same_request_gives_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        combine(pair, tmp_path / name, "della", seed=3, log=SILENT)
    assert tiny.folder_bytes(tmp_path / "one") == tiny.folder_bytes(tmp_path / "two")
    combine(pair, tmp_path / "one", "della", seed=4, overwrite=True, log=SILENT)
    assert tiny.folder_bytes(tmp_path / "one") != tiny.folder_bytes(tmp_path / "two")


def test_runs_keep_their_template_and_are_scored(
    trained: Path, other_run: Path, tmp_path: Path, topwork: Command
) -> None:
    out = tmp_path / "both"
    said = topwork("combine", trained, other_run, out, "--method", "linear", "--evaluate", "--max-rows", "2")
    assert said.code == 0, said.err
    assert (out / "chat_template.jinja").read_text("utf-8") == (trained / "chat_template.jinja").read_text("utf-8")
    record = json.loads((out / "combine.json").read_text("utf-8"))
    verify_folder(out)
    assert [tested["data"] for tested in record["evaluation"]] == [trained.name, other_run.name]
    for tested in record["evaluation"]:
        assert list(tested["scores"]) == sorted(["base", "combined", tested["data"]])
        assert tested["rows"] == 2
        losses = [summary["loss"] for summary in tested["scores"].values()]
        assert len(set(losses)) == 3
        assert f"{tested['scores']['combined']['loss']:.4f}" in said.out
    assert record["base"]["fingerprint"] == read_adapter(trained / "adapter").base.fingerprint
    again = combine([out], tmp_path / "again", log=SILENT)  # a result is a source like any other
    assert again["base"] == record["base"]
    assert (tmp_path / "again" / "chat_template.jinja").exists()


def test_one_run_scores_as_the_run_does(trained: Path, tmp_path: Path) -> None:
    record = combine([trained], tmp_path / "out", evaluate=True, max_rows=2, log=SILENT)
    [tested] = record["evaluation"]
    assert tested["scores"]["combined"]["loss"] == pytest.approx(tested["scores"][trained.name]["loss"], rel=1e-5)


def test_folders_are_scored_on_named_rows(pair: tuple[Path, Path], tickets: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="first, second is an adapter alone; name rows for all with --data"):
        combine(pair, tmp_path / "out", evaluate=True, log=SILENT)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="does not exist"):
        combine(pair, tmp_path / "out", evaluate=True, data=str(tmp_path / "rows.jsonl"), log=SILENT)
    assert not (tmp_path / "out").exists()
    record = combine(pair, tmp_path / "out", evaluate=True, data=str(tickets), max_rows=2, log=SILENT)
    [tested] = record["evaluation"]
    assert list(tested["scores"]) == ["base", "first", "second", "combined"]


def test_templates_that_differ_are_told(
    trained: Path, other_run: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    combine([trained, pair[0]], tmp_path / "known", log=said.append)
    assert not any("chat templates" in line for line in said)
    assert (tmp_path / "known" / "chat_template.jinja").exists()
    shutil.copytree(other_run, tmp_path / "changed")
    (tmp_path / "changed" / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    combine([trained, tmp_path / "changed"], tmp_path / "out", log=said.append)
    assert any(f"different chat templates ({trained.name}, changed)" in line for line in said)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_adapters_of_different_bases(
    pair: tuple[Path, Path], trained: Path, tiny_llama: Path, tmp_path: Path, topwork: Command
) -> None:
    shutil.copytree(pair[1], tmp_path / "theirs")
    marks = json.loads((trained / "adapter" / "topwork.json").read_text("utf-8"))
    (tmp_path / "theirs" / "topwork.json").write_text(json.dumps(marks | {"base_fingerprint": "sha256:other"}), "utf-8")
    for command in (
        ("combine", trained, tmp_path / "theirs", tmp_path / "out"),
        ("compare", trained, tmp_path / "theirs"),
    ):
        said = topwork(*command)
        assert said.code == 2
        assert f"{trained.name} is an adapter of" in said.err
        assert "theirs of" in said.err
        assert "--force" in said.err
    assert not (tmp_path / "out").exists()
    said = topwork("combine", trained, tmp_path / "theirs", tmp_path / "out", "--force")
    assert said.code == 0
    assert "warning" in said.out


def test_places_that_are_refused(pair: tuple[Path, Path], tmp_path: Path, topwork: Command) -> None:
    first, second = pair
    for arguments, told in (
        ((first, second), "OUT comes last"),
        ((first, first, tmp_path / "out"), "is named twice"),
        ((first, tmp_path / "nothing", tmp_path / "out"), "neither a run's folder"),
        ((first, second, first / "inside"), "is the source"),
        ((first, second, tmp_path / "out", "--weights", "1,x"), "--weights '1,x': expected numbers"),
        ((first, second, tmp_path / "out", "--dtype", "float8"), "--dtype float8"),
        ((first, second, tmp_path / "out", "--max-rows", "3"), "go with --evaluate"),
    ):
        said = topwork("combine", *arguments)
        assert (said.code, told in said.err) == (2, True), said.err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", "utf-8")
    for options, told in (((), "holds files already"), (("--overwrite",), "has not written")):
        said = topwork("combine", first, second, tmp_path / "mine", *options)
        assert (said.code, told in said.err) == (2, True), said.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_another_type(pair: tuple[Path, Path], tmp_path: Path) -> None:
    record = combine(pair, tmp_path / "out", dtype="bfloat16", log=SILENT)
    assert 2**-10 < record["rounding"] < 2**-7
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    with pytest.raises(RequestError, match="float16 cannot hold"):
        combine(pair, tmp_path / "large", weights=[1e9, 1], dtype="float16", log=SILENT)


def test_folders_of_one_name_are_told_apart_without_this_machines_paths(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, place in zip("ab", pair):
        shutil.copytree(place, tmp_path / name / "combined")
    places = [tmp_path / name / "combined" for name in "ab"]
    record = combine(places, tmp_path / "out", log=SILENT)
    assert [source["name"] for source in record["sources"]] == ["a/combined", "b/combined"]


def test_a_source_may_be_called_as_an_arm(pair: tuple[Path, Path], tickets: Path, tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "combined")
    record = combine(
        [tmp_path / "combined"],
        tmp_path / "out",
        weights=[2.0],
        evaluate=True,
        data=str(tickets),
        max_rows=2,
        log=SILENT,
    )
    assert list(record["evaluation"][0]["scores"]) == ["base", "source combined", "combined"]


def test_the_base_may_be_elsewhere(pair: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> None:
    for place in pair:
        shutil.copytree(place, tmp_path / place.name)
        config = json.loads((place / "adapter_config.json").read_text("utf-8"))
        config["base_model_name_or_path"] = "/models/that/was/there"
        (tmp_path / place.name / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    moved = [tmp_path / place.name for place in pair]
    with pytest.raises(RequestError, match="/models/that/was/there"):
        combine(moved, tmp_path / "out", log=SILENT)
    combine(moved, tmp_path / "out", model=str(tiny_llama), log=SILENT)
    assert read_adapter(tmp_path / "out").base.name == "/models/that/was/there"


def test_dora_after_qlora_is_taken_from_the_weights_it_was_trained_on(
    tiny_llama: Path, tickets: Path, trained: Path, tmp_path: Path
) -> None:
    adapter, training = {"use_dora": True, "lora_dropout": 0.0}, {"max_steps": 2, "learning_rate": 0.02}
    values = tiny.recipe_values(tiny_llama, tickets, tmp_path / "run", adapter=adapter, training=training)
    values["quantization"] = {"load_in_4bit": True}
    run = train(tiny.write_recipe(tmp_path / "recipe.yaml", values), log=SILENT).folder
    record = combine([run], tmp_path / "out", rank=32, evaluate=True, max_rows=2, log=SILENT)
    scores = record["evaluation"][0]["scores"]
    assert scores["combined"]["loss"] == pytest.approx(scores[run.name]["loss"], rel=1e-4)
    assert scores["combined"]["loss"] != pytest.approx(scores["base"]["loss"], rel=1e-3)
    shutil.copytree(trained, tmp_path / "dense")
    said: list[str] = []
    combine([run, tmp_path / "dense"], tmp_path / "both", log=said.append)
    assert any("run, dense were trained on the same base held in different bits" in line for line in said)


def test_a_full_disk_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk itself says is tested where folders are written (`tests/common/test_files.py`)."""
    combine(pair, tmp_path / "earlier", log=SILENT)
    before = tiny.folder_bytes(tmp_path / "earlier")

    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("out", "earlier"):
        with pytest.raises(RunError, match="the disk is full"):
            combine(pair, tmp_path / name, "ties", overwrite=True, log=SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert tiny.folder_bytes(tmp_path / "earlier") == before


def test_compare_tells_kinds_layers_and_json(pair: tuple[Path, Path], trained: Path, topwork: Command) -> None:
    said = topwork("compare", *pair)
    assert said.code == 0, said.err
    rows = {line.split(" ")[0]: line for line in said.out.splitlines()}
    assert "A: first   B: second" in said.out
    assert "–" in rows["k_proj"]
    assert "–" not in rows["q_proj"]
    assert "all" in rows
    layers = topwork("compare", *pair, "--layers", "--base")
    assert "model.layers.1.self_attn.q_proj" in layers.out
    assert "A / W" in layers.out
    found = json.loads(topwork("compare", *pair, "--json").out)
    assert found["labels"] == ["first", "second"]
    assert found["only"] == {"first": 10, "second": 0}
    assert len(found["modules"]) == 14
    assert found["modules"]["model.layers.0.self_attn.q_proj"]["cosine"] is not None
    same = compare_adapters(trained, trained / "adapter", log=SILENT)
    assert same.overall.cosine == pytest.approx(1)
    assert same.overall.columns == pytest.approx((1, 1))


def test_a_run_knows_the_base_of_folders_beside_it(pair: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(pair[0], tmp_path / "theirs")
    config = json.loads((pair[0] / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    said: list[str] = []
    record = combine([tmp_path / "theirs", trained], tmp_path / "out", log=said.append)
    assert record["base"] == {"name": Path(str(read_adapter(trained / "adapter").base.name)).name, "fingerprint": None}
    assert any(line.startswith("warning") and "None" in line for line in said)
    with pytest.raises(ModelError, match="no model 'elsewhere'"):
        combine([tmp_path / "theirs", trained], tmp_path / "again", model="elsewhere", log=SILENT)


def test_tensors_of_no_module_are_told_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    more = shutil.copytree(pair[0], tmp_path / "more")
    tensors = load_file(more / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, more / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers up to 9 \(1 tensors, first model\.layers\.9\."):
        combine([more, pair[1]], tmp_path / "out", log=SILENT)
