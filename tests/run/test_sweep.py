"""Whole sweeps on a tiny base: what is trained, scored and written; resume, divergence, waves, halving and jobs."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import topwork.reporting.sweep as sweep_report
import topwork.run.sweep.run as sweep_module
from run import tiny
from run.processes import Commands, signal_at
from topwork.common.errors import RequestError
from topwork.recipe.recipe import Recipe
from topwork.run.outcome import TrainedRun
from topwork.run.sweep.plan import SweepOptions, plan_sweep
from topwork.run.sweep.run import Swept, sweep
from topwork.run.sweep.state import recipe_hash
from topwork.run.sweep.trials import waves
from topwork.run.train import train_held

Recipes = Callable[..., Path]
SHORT = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "batch_size": 2}
WRITTEN = Path(__file__).parents[1] / "reporting" / "sweeps"
"""sweep.json of sweeps that knew no types."""
RATES = "training.learning_rate=5e-3,1e38"
"""The second cannot be survived: after one step the weights are beyond what a float holds."""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than the runs; `swept`, which lives as long as the module, has them."""
    monkeypatch.setattr(sweep_report, "_charts", lambda _sweep, _records: [])


def quietly(recipe: Path, *grid: str, overrides: tuple[str, ...] = (), **options: Any) -> Swept:
    chosen = {name: options.pop(name) for name in ("preset", "seeds", "halving", "measure_alone") if name in options}
    return sweep(recipe, overrides, SweepOptions(grid, **chosen), log=options.pop("log", lambda _: None), **options)


def by_name(swept: Swept) -> dict[str, dict[str, Any]]:
    return {member["name"]: member for member in swept.result["members"]}


@pytest.fixture(scope="module")
def swept(tiny_llama: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two ranks at two learning rates, of which one diverges."""
    folder = tmp_path_factory.mktemp("swept")
    recipe = tiny.write_recipe(
        folder / "recipe.yaml", tiny.recipe_values(tiny_llama, tickets, folder / "run", training=SHORT)
    )
    return quietly(recipe, "adapter.r=2,4", RATES)


def test_every_member_is_an_ordinary_run(swept: Swept) -> None:
    members = by_name(swept)
    assert list(members) == [f"r-{r}_learning_rate-{rate}" for r in (2, 4) for rate in ("0.005", "1e+38")]
    sound = [member for member in members.values() if member["state"] == "finished"]
    assert len(sound) == 2
    for member in sound:
        folder = swept.folder / member["folder"]
        assert folder.parent == swept.folder
        for file in ("recipe.yaml", "adapter/adapter_model.safetensors", "metrics.jsonl", "result.json"):
            assert (folder / file).is_file(), file
        evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
        assert evaluation["after"]["loss"] == member["scores"]["loss"]
        assert evaluation["rows"] == 3
        assert member["result"]["steps"] == 4
        assert member["result"]["shared_with"] == 4
    assert swept.result["waves"] == [
        {
            **swept.result["waves"][0], "members": list(members), "done": True, "scored": True, "stop_at": None,
        }
    ]  # fmt: skip


def test_scores_together_are_those_of_each_alone(swept: Swept) -> None:
    from topwork.run.evaluate import evaluate

    member = by_name(swept)["r-4_learning_rate-0.005"]
    alone = evaluate(swept.folder / member["folder"], log=lambda _: None)
    assert member["scores"]["loss"] == pytest.approx(alone["after"]["loss"], rel=1e-5)
    assert member["before"]["loss"] == pytest.approx(alone["before"]["loss"], rel=1e-5)
    assert member["scores"]["exact_match"] == alone["after"]["exact_match"]
    assert member["scores"]["loss"] != member["before"]["loss"]


def test_a_member_that_diverges_is_shown_and_drags_none_along(swept: Swept) -> None:
    lost = by_name(swept)["r-2_learning_rate-1e+38"]
    assert lost["state"] == "diverged"
    assert lost["scores"] is None
    points = {point["name"]: point for point in swept.result["points"]}
    assert points["r-2_learning_rate-1e+38"]["diverged"] == 1
    assert points["r-2_learning_rate-1e+38"]["loss"] is None
    assert points["r-2_learning_rate-0.005"]["diverged"] == 0
    for name in ("sweep.md", "sweep.html"):
        text = (swept.folder / name).read_text("utf-8")
        assert "r-2_learning_rate-1e+38" in text
        assert "diverged" in text
        assert "2 diverged" in text


def test_the_report_has_what_it_must(swept: Swept) -> None:
    text = (swept.folder / "sweep.md").read_text("utf-8")
    for told in ("4 members", "trained parameters", "The rule:", "an estimate", "peak memory", "bare base"):
        assert told in text, told
    page = (swept.folder / "sweep.html").read_text("utf-8")
    assert page.count("data:image/svg+xml") >= 2 * 3  # curves, loss against rank and against learning rate, twice
    pictures = {path.name for path in (swept.folder / "pictures").iterdir()}
    assert {"curves.png", "loss-adapter.r.png", "loss-training.learning_rate.png"} <= pictures


def test_a_finished_sweep_is_not_begun_again(swept: Swept) -> None:
    recipe = swept.folder.parent / "recipe.yaml"
    before = tiny.folder_bytes(swept.folder)
    with pytest.raises(RequestError, match="holds a sweep already"):
        quietly(recipe, "adapter.r=2,4", RATES)
    with pytest.raises(RequestError, match="was begun with another sweep: 2 members are in one of the two only"):
        quietly(recipe, "adapter.r=2", RATES, resume=True)
    with pytest.raises(RequestError, match="4 have other options"):
        quietly(recipe, "adapter.r=2,4", RATES, overrides=("training.batch_size=3",), resume=True)
    with pytest.raises(RequestError, match="4 have other options"):  # or scores would be of different rows
        quietly(recipe, "adapter.r=2,4", RATES, overrides=("evaluation.max_rows=2",), resume=True)
    for grid, told in (
        ("adapter.init_lora_weights=true,loftq", "what quantizing lost"),
        ("adapter.method=lora,ia3", "has no B matrices"),
    ):
        with pytest.raises(RequestError, match=told):  # before anything is cleared away
            quietly(recipe, grid, overrides=("training.loraplus_lr_ratio=16",), overwrite=True)
    assert tiny.folder_bytes(swept.folder) == before
    again = quietly(recipe, "adapter.r=2,4", RATES, resume=True)
    assert again.result == swept.result
    after = tiny.folder_bytes(swept.folder)
    assert {name: after[name] for name in after if "/adapter/" in name} == {
        name: before[name] for name in before if "/adapter/" in name
    }


def test_in_waves_of_as_many_as_fit(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "trials_that_fit", lambda _on, recipes, _longest: min(2, len(recipes)))
    heard: list[str] = []
    done = quietly(make_recipe(training=SHORT), "adapter.r=2,3,4", log=heard.append)
    assert any("2 of 3 members fit into free memory" in line and "2 waves of 2, 1" in line for line in heard)
    assert [wave["members"] for wave in done.result["waves"]] == [["r-2", "r-3"], ["r-4"]]
    assert all(member["scores"] is not None for member in done.result["members"])
    assert by_name(done)["r-4"]["result"]["shared_with"] == 1


def test_a_wave_that_no_longer_fits_is_cut_again(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([3, 3, 3, 2])  # two waves of three; the first still fits, the second has room for two
    monkeypatch.setattr(sweep_module, "trials_that_fit", lambda _on, rest, _longest: min(next(answers, 3), len(rest)))
    heard: list[str] = []
    done = quietly(make_recipe(training=SHORT), "adapter.r=2,3,4,5,6,7", log=heard.append)
    assert [wave["members"] for wave in done.result["waves"]] == [["r-2", "r-3", "r-4"], ["r-5", "r-6"], ["r-7"]]
    assert any("2 of r-5, r-6, r-7 still fit into free memory" in line for line in heard)
    assert [by_name(done)[name]["result"]["shared_with"] for name in ("r-2", "r-5", "r-7")] == [3, 2, 1]
    assert all(member["scores"] is not None for member in done.result["members"])


def test_alone_in_its_wave_a_member_that_diverges_is_shown_too(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "trials_that_fit", lambda *_: 1)
    done = quietly(make_recipe(training=SHORT), "training.learning_rate=1e38,5e-3")
    assert [member["state"] for member in done.result["members"]] == ["diverged", "finished"]


@pytest.mark.parametrize("preset", ["rank", "targets"])
def test_presets_hold_the_scale_whatever_the_recipe_says_of_rslora(make_recipe: Recipes, preset: str) -> None:
    plan = plan_sweep(make_recipe(adapter={"use_rslora": True}), (), SweepOptions(preset=preset))
    scales = {trial.recipe.adapter.lora_alpha / trial.recipe.adapter.r for trial in plan.trials}
    assert scales == {2}
    assert not any(trial.recipe.adapter.use_rslora for trial in plan.trials)


def test_nothing_held_out_is_refused_and_a_job_without_is_not_scored(make_recipe: Recipes, tmp_path: Path) -> None:
    one = tiny.write_rows(tmp_path / "one.jsonl", tiny.rows(1))
    with pytest.raises(RequestError, match="none are left to hold out"):
        quietly(make_recipe("grid", data={"train": str(one)}), "adapter.r=2,4")
    recipe = make_recipe("jobs", training=SHORT)
    described = yaml.safe_load(recipe.read_text("utf-8"))
    described["jobs"] = [{"name": "anna"}, {"name": "ben", "data": {"train": str(one)}}]
    done = quietly(tiny.write_recipe(recipe, described))
    assert [member["scores"] is not None for member in done.result["members"]] == [True, False]


def test_waves_hold_all_members_once() -> None:
    assert waves(["a", "b", "c", "d", "e"], lambda rest: 2 if "b" in rest else 9) == [["a", "b"], ["c", "d", "e"]]
    assert waves(["a", "b"], lambda _: 0) == [["a"], ["b"]]


def test_killed_and_resumed_it_ends_with_the_same_adapters(
    commands: Commands, make_recipe: Recipes, tmp_path: Path
) -> None:
    training = {"max_steps": 8, "eval_steps": 4, "save_steps": 2}
    grid = ["--grid", "adapter.r=2,4"]
    quietly(make_recipe("whole", training=training), "adapter.r=2,4")
    recipe = make_recipe("run", training=training)
    at = tmp_path / "run-sweep" / "r-4"
    code, said = commands.run(["sweep", str(recipe), *grid], signal_at(at, 5, signal.SIGKILL))
    assert code == -signal.SIGKILL, said
    known = json.loads((tmp_path / "run-sweep" / "sweep.json").read_text("utf-8"))
    assert [member["state"] for member in known["members"]] == ["training", "training"]
    code, said = commands.run(["sweep", str(recipe), *grid, "--resume"])
    assert code == 0, said
    assert "going on from" in said
    for name in ("r-2", "r-4"):
        whole = tiny.folder_bytes(tmp_path / "whole-sweep" / name / "adapter")
        assert tiny.folder_bytes(tmp_path / "run-sweep" / name / "adapter") == whole
    assert (tmp_path / "run-sweep" / "sweep.html").is_file()


def written_before(name: str, recipe: Path, grid: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `name` holds, put where the recipe's sweep goes. Hashes are today's: an option may be new since then."""
    plan = plan_sweep(recipe, overrides, SweepOptions((grid,)))
    found: dict[str, Any] = json.loads((WRITTEN / f"{name}.json").read_text("utf-8"))
    for member, trial in zip(found["members"], plan.trials, strict=True):
        assert member["name"] == trial.name
        member["recipe"] = recipe_hash(trial.recipe)
    plan.out.mkdir()
    (plan.out / "sweep.json").write_text(json.dumps(found), "utf-8")
    return found


@pytest.mark.parametrize("first_of_all", [False, True])
def test_a_sweep_that_was_begun_before_goes_on(
    first_of_all: bool, make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first wave is done and its second was killed; the first sweeps of all did not write that waves were begun."""
    recipe, grid = make_recipe(training=SHORT), "adapter.r=2,3,4"
    before = written_before("begun", recipe, grid)
    if first_of_all:
        for wave in before["waves"]:
            del wave["begun"]
        (Path(f"{recipe.with_suffix('')}-sweep") / "sweep.json").write_text(json.dumps(before), "utf-8")
    monkeypatch.setattr(sweep_module, "trials_that_fit", lambda *_: 1)  # a wave that was begun stays whole
    done = quietly(recipe, grid, resume=True)
    written = json.loads((done.folder / "sweep.json").read_text("utf-8"))
    assert written == done.result
    assert written["members"][:2] == before["members"][:2]
    assert written["waves"][0] == before["waves"][0]
    assert [wave["members"] for wave in written["waves"]] == [["r-2", "r-3"], ["r-4"]]
    kept, new = written["members"][0], written["members"][2]
    assert new["state"] == "finished"
    assert new.keys() == kept.keys()
    assert all(new[part].keys() == kept[part].keys() for part in ("result", "scores", "before"))
    assert written["waves"][1].keys() == before["waves"][0].keys() | {"begun"}
    assert [point["name"] for point in written["points"]] == ["r-2", "r-3", "r-4"]


def test_of_a_sweep_that_ended_before_the_report_is_made_anew(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**SHORT, "max_steps": 8, "eval_steps": 1, "lr_scheduler_type": "cosine"}
    recipe, grid = make_recipe(training=training), "training.learning_rate=1e-2,1e-5,3e-3,1e38"
    halving = ("sweep.halving={factor: 2, rungs: 3}",)
    before = written_before("halving", recipe, grid, halving)
    monkeypatch.setattr(sweep_module, "open_session", None)  # nothing is loaded
    done = quietly(recipe, grid, overrides=halving, resume=True)
    assert done.result == before
    assert "left at rung 1" in (done.folder / "sweep.md").read_text("utf-8")


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_state_that_cannot_be_read_is_told_first(
    options: dict[str, bool], make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, grid = make_recipe(training=SHORT), "adapter.r=2,3,4"
    written_before("begun", recipe, grid)
    file = Path(f"{recipe.with_suffix('')}-sweep") / "sweep.json"
    text = file.read_text("utf-8")
    monkeypatch.setattr(sweep_module, "open_session", None)  # before anything is loaded
    for content, told in (
        (text[:-9], "it is not whole JSON"),
        (text.replace('"state": "training"', '"state": "asleep"'), r"'members\[2\]\.state': input should be 'waiting'"),
        (text.replace('"seed"', '"sead"', 1), r"unknown field 'members\[0\]\.sead'"),
    ):
        file.write_text(content, "utf-8")
        with pytest.raises(RequestError, match=told):
            quietly(recipe, grid, **options)
        assert file.read_text("utf-8") == content


def test_interrupted_it_says_how_to_go_on(commands: Commands, make_recipe: Recipes, tmp_path: Path) -> None:
    recipe = make_recipe(training={"max_steps": 200})
    asked = ["sweep", str(recipe), "--grid", "adapter.r=2,4"]
    code, said = commands.run(asked, signal_at(tmp_path / "run-sweep" / "r-4", 2, signal.SIGINT))
    assert code == 1, said
    assert said.splitlines()[-1].strip() == f"topwork sweep {recipe} --grid adapter.r=2,4 --resume"
    assert not (tmp_path / "run-sweep" / "sweep.md").exists()


def test_halving_spends_the_steps_on_the_best(make_recipe: Recipes) -> None:
    training = {**SHORT, "max_steps": 8, "eval_steps": 1, "lr_scheduler_type": "cosine"}
    plain = {"training": training, "adapter": {"lora_dropout": 0.2}}
    halving = ("sweep.halving={factor: 2, rungs: 3}",)
    done = quietly(make_recipe(**plain), "training.learning_rate=1e-2,1e-5,3e-3,2e-5", overrides=halving)
    members = by_name(done)
    assert done.result["halving"]["stops"] == [2, 4]
    steps = {name: member["result"]["steps"] for name, member in members.items()}
    assert steps == {
        "learning_rate-0.01": 8, "learning_rate-1e-05": 2, "learning_rate-0.003": 4, "learning_rate-2e-05": 2,
    }  # fmt: skip
    assert [members[name]["left_at"] for name in steps] == [None, 0, 1, 0]
    whole = quietly(make_recipe("whole", **plain), "training.learning_rate=1e-2,3e-3")
    best = "learning_rate-0.01"  # as if it had never been compared: the schedule is the whole plan's
    assert members[best]["scores"]["loss"] == pytest.approx(by_name(whole)[best]["scores"]["loss"], rel=1e-5)
    text = (done.folder / "sweep.md").read_text("utf-8")
    assert "rung 1, step 2: learning_rate-1e-05" in text
    assert "left at rung 2" in text


def test_a_point_of_which_a_seed_diverged_does_not_go_on(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its losses at the rung are the best: one is told as diverged, which no rate does to one seed alone."""

    def told(recipes: Sequence[Recipe], **options: Any) -> list[TrainedRun]:
        runs = train_held(recipes, **options)
        for recipe, run in zip(recipes, runs):
            if (recipe.training.learning_rate, recipe.training.seed) == (1e-2, 0):
                run.result["stopped"] = "diverged"
        return runs

    monkeypatch.setattr(sweep_module, "train_held", told)
    recipe = make_recipe(training={**SHORT, "max_steps": 6, "eval_steps": 1}, adapter={"lora_dropout": 0.0})
    rates = "training.learning_rate=1e-2,1e-3,1e-5"
    members = by_name(quietly(recipe, rates, seeds=2, overrides=("sweep.halving={factor: 3, rungs: 2}",)))
    best = members["learning_rate-0.01_seed-1"]
    assert best["result"]["last_eval_loss"] < members["learning_rate-0.001_seed-1"]["result"]["last_eval_loss"]
    ended = {name: (member["state"], member["left_at"]) for name, member in members.items()}
    assert ended == {
        "learning_rate-0.01_seed-0": ("diverged", None), "learning_rate-0.01_seed-1": ("left", 0),
        "learning_rate-0.001_seed-0": ("finished", None), "learning_rate-0.001_seed-1": ("finished", None),
        "learning_rate-1e-05_seed-0": ("left", 0), "learning_rate-1e-05_seed-1": ("left", 0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "grid", "told"),
    [
        ({"training": SHORT}, "adapter.r=2,4", "set training.eval_steps to 1 or less"),
        ({"training": SHORT}, "training.max_steps=4,8", "after the same steps"),
        ({"data": {"eval_fraction": 0.0}, "evaluation": {"data": "TICKETS"}}, "adapter.r=2,4", "validation losses"),
    ],
)
def test_halving_that_cannot_be(
    changes: dict[str, Any], grid: str, told: str, make_recipe: Recipes, tickets: Path, tmp_path: Path
) -> None:
    if "evaluation" in changes:
        changes = {**changes, "evaluation": {"data": str(tickets)}}
    with pytest.raises(RequestError) as caught:
        quietly(make_recipe(**changes), grid, halving=True)
    assert told in str(caught.value)
    assert not (tmp_path / "run-sweep").exists()


def test_seeds_are_averaged_and_asked_the_same_rows(make_recipe: Recipes, tickets: Path) -> None:
    recipe = make_recipe(training=SHORT, evaluation={"data": str(tickets)})
    done = quietly(recipe, "adapter.r=2,4", seeds=2)
    assert len(done.result["members"]) == 4
    point = done.result["points"][0]
    losses = [by_name(done)[f"r-2_seed-{seed}"]["scores"]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    assert point["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert point["loss"]["error"] == pytest.approx(abs(losses[0] - losses[1]) / 2)
    before = {member["before"]["loss"] for member in done.result["members"]}
    assert len(before) == 1  # the bare base is asked once, and all are asked what it was


def test_jobs_are_users_with_data_of_their_own(make_recipe: Recipes, tmp_path: Path) -> None:
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.rows(20, first=100))
    jobs = [
        {"name": "anna", "adapter": {"r": 2}},
        {"name": "ben", "data": {"train": "other.jsonl", "eval_fraction": 0.0}, "output_dir": str(tmp_path / "bens")},
    ]
    done = quietly(make_recipe(training={**SHORT, "eval_steps": 2}, jobs=jobs))
    anna, ben = done.result["members"]
    assert (anna["folder"], ben["folder"]) == ("anna", str(tmp_path / "bens"))
    assert done.folder == tmp_path / "run"
    assert anna["scores"] is not None
    assert ben["scores"] is None  # it has no rows to be scored on
    provenance = json.loads((tmp_path / "bens" / "provenance.json").read_text("utf-8"))
    assert str(other) in json.dumps(provenance) or "other.jsonl" in json.dumps(provenance)
    assert (tmp_path / "bens" / "adapter").is_dir()
    assert anna["result"]["shared_with"] == ben["result"]["shared_with"] == 2


def test_alone_is_measured_in_processes_of_their_own(make_recipe: Recipes) -> None:
    done = quietly(make_recipe(training=SHORT), "training.seed=0,1", measure_alone=True)
    cost = done.result["cost"]
    assert cost["alone_seconds"] > 0
    together, alone, cut = cost["pass_seconds"], cost["alone_seconds"], 0.005  # both are rounded to hundredths
    assert (together - cut) / (alone + cut) - 1e-4 <= cost["time_ratio"]
    assert cost["time_ratio"] * max(alone - cut, 0.0) <= together + cut + 1e-4
    assert set(done.result["alone"]) == {"all"}  # one for all seeds
    text = (done.folder / "sweep.md").read_text("utf-8")
    assert "measured alone for" in text
    assert "one by one (an estimate" not in text
