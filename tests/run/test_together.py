"""Several runs in one pass: each is the run it would be alone, whatever becomes of the others."""

import json
import math
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import topwork.run.fit
import topwork.run.training
from reference.measure import relative
from run import tiny
from run.processes import Commands, signal_at
from run.tiny import folder_bytes
from topwork.common.errors import NonFiniteLossError, RequestError
from topwork.common.memory import Free
from topwork.data.examples import load_data
from topwork.ops.workspace import Workspace
from topwork.recipe.recipe import Recipe, load_recipe
from topwork.run.fit import trials_that_fit
from topwork.run.folder import read_json
from topwork.run.opened import open_run
from topwork.run.outcome import TrainedRun
from topwork.run.session import Session, open_session
from topwork.run.train import train_together
from topwork.training.passes import step_passes
from topwork.training.progress import Silent
from topwork.training.step import Means, mean_losses

Recipes = Callable[..., Recipe]
TRAINING = {"max_steps": 12, "eval_steps": 4, "save_steps": 4}
MEMBERS: dict[str, dict[str, Any]] = {
    "wide": {"adapter": {"r": 8}, "training": {"learning_rate": 2e-3}},
    "narrow": {
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "training": {"seed": 3, "batch_size": 7, "max_steps": 7},
    },
    "other.rows": {"adapter": {"target_modules": ["down_proj"]}, "training": {"seed": 1, "batch_size": 3}},
    "plus": {
        "adapter": {"use_rslora": True, "lora_dropout": 0.0},
        "training": {"loraplus_lr_ratio": 4.0, "weight_decay": 0.1},
    },
}
BF16_LOSSES, BF16_WEIGHTS = 1e-3, 2e-2
POISON = {"learning_rate": 1e30, "max_steps": 12}
"""Not a number after its first step."""


@pytest.fixture
def recipes(tiny_llama: Path, tickets: Path, tmp_path: Path) -> Recipes:
    """recipes("wide", to="folder", **changes): the recipe of a member, with dropout."""
    few = tiny.write_rows(tmp_path / "few.jsonl", tiny.rows(11, first=100))

    def make(name: str, to: str = "together", **changes: Any) -> Recipe:
        own = MEMBERS.get(name, {})
        training = {**TRAINING, **own.get("training", {}), **changes.pop("training", {})}
        adapter = {"lora_dropout": 0.1, **own.get("adapter", {}), **changes.pop("adapter", {})}
        rows = few if name == "other.rows" else tickets
        given = {"adapter": adapter, "training": training, **changes}
        sections = {section: given.pop(section) for section in ("quantization",) if section in given}
        values = {**tiny.recipe_values(tiny_llama, rows, tmp_path / to / name, **given), **sections}
        return load_recipe(tiny.write_recipe(tmp_path / f"{to}-{name}.yaml", values))

    return make


def quietly(*recipes: Recipe, **options: Any) -> list[TrainedRun]:
    return train_together(recipes, log=lambda _: None, **options)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(run: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in records(run, kind)]


def weights(run: Path) -> list[torch.Tensor]:
    found = load_file(run / "adapter" / "adapter_model.safetensors")
    return [found[key] for key in sorted(found)]


def farthest(left: Path, right: Path) -> float:
    return max(relative(a, b) for a, b in zip(weights(left), weights(right), strict=True))


def test_in_one_pass_as_alone(recipes: Recipes) -> None:
    """Ranks, targets, rates, seeds, batch sizes, rows, lengths of the plan, dropout and LoRA+ all differ."""
    together = quietly(*(recipes(name) for name in MEMBERS))
    for name, run in zip(MEMBERS, together, strict=True):
        [alone] = quietly(recipes(name, "alone"))
        for kind in ("train", "eval"):
            assert losses(run.folder, kind) == pytest.approx(losses(alone.folder, kind), rel=1e-5), (name, kind)
        assert farthest(run.folder, alone.folder) < 1e-4, name
        same = ("stopped", "steps", "planned_steps", "tokens", "learned_tokens", "best_step", "parameters", "data")
        assert [run.result[key] for key in same] == [alone.result[key] for key in same]
        assert (run.result["shared_with"], alone.result["shared_with"]) == (len(MEMBERS), 1)
        assert open_run(run.folder, log=lambda _: None).result == run.result
    assert [run.result["steps"] for run in together] == [12, 7, 12, 12]
    assert len({run.result["last_loss"] for run in together}) == 4
    shared = records(together[0].folder, "train")[0]
    assert shared["pass_tokens"] > shared["tokens"]


def test_every_step_and_seed_drops_others(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step's draws come from: of members with one seed the same, of steps never, after a resume as without."""
    from topwork.training import loop

    given: list[dict[str, int] | None] = []

    def noted(*arguments: Any) -> Any:
        given.append(arguments[4] and dict(arguments[4]))
        return step_passes(*arguments)

    monkeypatch.setattr(loop, "step_passes", noted)
    names = ("wide", "plus", "narrow")
    made = [recipes(name) for name in names]
    folders = [run.folder for run in quietly(*made, stop_at=3)]
    quietly(*made, resume=True, stop_at=5)
    trained, validated = [seeds for seeds in given if seeds], [seeds for seeds in given if seeds is None]
    assert len(folders) == 3
    assert len(trained) == 5
    assert validated
    assert all(seeds["wide"] == seeds["plus"] for seeds in trained)
    assert len({seed for seeds in trained for seed in seeds.values()}) == 2 * 5


def test_in_bf16_within_its_rounding(recipes: Recipes) -> None:
    """As far apart as another order of the same sums takes them: products of other numbers of rows round otherwise.

    Measured on a CPU: losses within 3e-8, weights within 6e-8. A kernel that splits its sums by the number of rows may
    come to bf16's own rounding, 2^-9.
    """
    model = {"dtype": "bfloat16"}
    names = ("wide", "narrow")
    together = quietly(*(recipes(name, model=model) for name in names))
    for name, run in zip(names, together, strict=True):
        [alone] = quietly(recipes(name, "alone", model=model))
        assert losses(run.folder) == pytest.approx(losses(alone.folder), rel=BF16_LOSSES), name
        assert farthest(run.folder, alone.folder) < BF16_WEIGHTS, name


class Heard(Silent):
    """Remembers how it ended."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ends: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def ended(self, how: str) -> None:
        self.ends.append(how)


def test_one_that_diverges_leaves_and_the_others_end_as_alone(recipes: Recipes) -> None:
    heard = {name: Heard() for name in ("wide", "poison", "plus")}
    runs = quietly(recipes("wide"), recipes("poison", training=POISON), recipes("plus"), progress=heard.__getitem__)
    assert [run.result["stopped"] for run in runs] == ["finished", "diverged", "finished"]
    assert [heard[name].ends for name in heard] == [["finished"], ["diverged"], ["finished"]]
    poisoned = runs[1]
    assert "diverged, and left the pass: step 2: the loss is nan" in heard["poison"].notes[0]
    assert "The batch was" in poisoned.result["warnings"][0]
    assert poisoned.result["steps"] == 1
    assert not (poisoned.folder / "adapter").exists()
    for name, run in (("wide", runs[0]), ("plus", runs[2])):
        [alone] = quietly(recipes(name, "alone"))
        assert losses(run.folder) == pytest.approx(losses(alone.folder), rel=1e-5)
        assert farthest(run.folder, alone.folder) < 1e-4
    with pytest.raises(NonFiniteLossError, match="step 2: the loss is nan"):
        quietly(recipes("poison", "alone", training=POISON))
    again = quietly(recipes("wide"), recipes("poison", training=POISON), recipes("plus"), resume=True)
    assert [run.result["stopped"] for run in again] == ["finished", "diverged", "finished"]


@pytest.mark.parametrize("rate", [1e30, 1e39])
def test_nor_does_it_reach_those_beside_it_in_bfloat16(recipes: Recipes, rate: float) -> None:
    """In one pass, where adapters share tiles of a product: from values that are still finite, or are not."""
    model, training = {"dtype": "bfloat16"}, {"tokens_per_pass": 2000}
    poison = recipes("poison", model=model, training={**POISON, **training, "learning_rate": rate})
    runs = quietly(*(recipes(name, model=model, training=training) for name in ("wide", "plus")), poison)
    assert [run.result["stopped"] for run in runs] == ["finished", "finished", "diverged"]
    for name, run in zip(("wide", "plus"), runs):
        [alone] = quietly(recipes(name, "alone", model=model, training=training))
        assert losses(run.folder) == pytest.approx(losses(alone.folder), rel=BF16_LOSSES), name
        assert farthest(run.folder, alone.folder) < BF16_WEIGHTS, name


def test_one_whose_validation_is_no_number_leaves(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the very start, where no checkpoint is due, and at a later one; a resume finds both ended."""
    import topwork.training.loop

    proper = mean_losses
    for bad_at in (0, 4):
        seen: list[dict[str, Means]] = []

        def one_bad(*given: Any, bad: int = bad_at // 4, seen: list[dict[str, Means]] = seen) -> dict[str, Means]:
            seen.append(proper(*given))
            return {**seen[-1], "plus": Means(math.nan, {})} if len(seen) == bad + 1 else seen[-1]

        monkeypatch.setattr(topwork.training.loop, "mean_losses", one_bad)
        made = recipes("wide", f"bad{bad_at}"), recipes("plus", f"bad{bad_at}")
        runs = quietly(*made)
        assert [run.result["stopped"] for run in runs] == ["finished", "diverged"]
        assert [run.result["steps"] for run in runs] == [12, bad_at]
        assert f"the validation loss at step {bad_at} is nan" in runs[1].result["warnings"][0]
        again = quietly(*made, resume=True)
        assert [run.result["stopped"] for run in again] == ["finished", "diverged"]
        assert folder_bytes(again[0].folder / "adapter") == folder_bytes(runs[0].folder / "adapter")


def test_early_stopping_of_one(recipes: Recipes) -> None:
    """A rate so high that a validation is soon worse than the one before."""
    hasty = {"learning_rate": 0.5, "early_stopping_patience": 1, "eval_steps": 1, "max_steps": 12}
    runs = quietly(recipes("hasty", training=hasty), recipes("wide"))
    [alone] = quietly(recipes("hasty", "alone", training=hasty))
    assert [run.result["stopped"] for run in runs] == ["early stopping", "finished"]
    assert runs[0].result["steps"] == alone.result["steps"] < 12
    assert runs[1].result["steps"] == 12


def test_stopped_at_a_step_and_gone_on_with_is_the_whole_run(recipes: Recipes) -> None:
    """Without a part of the members, too, as halving leaves them."""
    names = ("wide", "narrow", "plus")
    paused = quietly(*(recipes(name) for name in names), stop_at=5)
    assert [(run.result["stopped"], run.result["steps"]) for run in paused] == [("paused", 5)] * 3
    assert all(records(run.folder, "eval")[-1]["step"] == 5 for run in paused)
    assert all((run.folder / "adapter").is_dir() for run in paused)
    assert quietly(recipes("wide"), recipes("plus"), resume=True, stop_at=5)[0].result["steps"] == 5
    on = quietly(recipes("wide"), recipes("plus"), resume=True)
    assert [(run.result["stopped"], run.result["steps"]) for run in on] == [("finished", 12)] * 2
    whole = quietly(*(recipes(name, "whole") for name in ("wide", "plus")))
    for run, other in zip(on, whole, strict=True):
        assert losses(run.folder) == pytest.approx(losses(other.folder), rel=1e-5)
        assert farthest(run.folder, other.folder) < 1e-4
        rates = [[record["learning_rate"] for record in records(each.folder, "train")] for each in (run, other)]
        assert rates[0] == rates[1]


def test_killed_at_random_moments_and_resumed_all_end_with_the_same_bytes(
    commands: Commands, tiny_llama: Path, tickets: Path, tmp_path: Path
) -> None:
    """With dropout; one member ends early, and one diverges."""
    plan = {"max_steps": 12}
    own: dict[str, dict[str, Any]] = {
        "a": {"training": {**plan, "save_steps": 4}},
        "b": {"training": {"max_steps": 5, "seed": 2, "save_steps": 3}, "adapter": {"r": 2, "lora_dropout": 0.3}},
        "poison": {"training": {**plan, "learning_rate": 1e30}},
    }

    def made(to: str) -> list[str]:
        return [
            str(
                tiny.write_recipe(
                    tmp_path / f"{to}-{name}.yaml",
                    tiny.recipe_values(tiny_llama, tickets, tmp_path / to / name, **changes),
                )
            )
            for name, changes in own.items()
        ]

    code, said = commands.run(["together", *made("unbroken")])
    assert code == 0, said
    draw = random.Random()
    moments = [(step, draw.uniform(0.0, 0.03)) for step in sorted(draw.sample(range(10), 3))]
    for step, delay in moments:
        run = tmp_path / "killed" / "a"
        code, said = commands.run(["together", *made("killed")], signal_at(run, step, signal.SIGKILL, delay))
        assert code == -signal.SIGKILL, (moments, said)
    code, said = commands.run(["together", *made("killed")])
    assert code == 0, (moments, said)
    last = {"a": 12, "b": 5, "poison": 1}
    for name, step in last.items():
        killed, unbroken = tmp_path / "killed" / name, tmp_path / "unbroken" / name
        place = f"checkpoints/step-{step:06d}"
        assert folder_bytes(killed / place) == folder_bytes(unbroken / place), (moments, name)
        if name != "poison":
            assert folder_bytes(killed / "adapter") == folder_bytes(unbroken / "adapter"), (moments, name)


def test_a_round_that_is_run_again_has_all_who_were_in_it(recipes: Recipes) -> None:
    """One diverged in a round whose checkpoints the others lost: it takes part again, and dropout draws as before."""
    noisy: dict[str, Any] = {"adapter": {"lora_dropout": 0.2}, "training": {"save_steps": 1, "save_total_limit": 12}}
    poison = {"adapter": {"lora_dropout": 0.2}, "training": POISON}
    unbroken = quietly(recipes("wide", "whole", **noisy), recipes("poison", "whole", **poison))
    made = recipes("wide", **noisy), recipes("poison", **poison)
    wide, poisoned = (run.folder for run in quietly(*made))
    for path in (wide / "checkpoints").iterdir():
        if path.name > "step-000001":
            shutil.rmtree(path)
    assert [path.name for path in (poisoned / "checkpoints").iterdir()] == ["step-000001"]
    quietly(*made, resume=True)
    assert len(records(poisoned, "note")) >= 1
    assert folder_bytes(wide / "adapter") == folder_bytes(unbroken[0].folder / "adapter")


def test_kept_on_a_base_they_are_there_to_be_asked(recipes: Recipes) -> None:
    on = open_session(recipes("wide"), lambda _: None)
    runs = quietly(recipes("wide"), recipes("other.rows"), on=on)
    assert [run.name for run in runs] == ["wide", "other_rows"] == list(on.adapters.configs)
    for run in runs:
        kept = load_file(run.folder / "adapter" / "adapter_model.safetensors")
        for name, tensor in on.adapters.state(run.name).items():
            assert torch.equal(kept[f"base_model.model.{name}"], tensor)
    more = quietly(recipes("wide", "again"), on=on)
    assert more[0].name == "wide-2"
    with pytest.raises(RequestError, match="model or quantization"):
        quietly(recipes("plus", model={"dtype": "bfloat16"}), on=on)
    assert list(on.adapters.configs) == ["wide", "other_rows", "wide-2"]


def test_data_that_is_named_alike_is_loaded_once(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    import topwork.run.train

    calls = []

    def counted(*given: Any) -> Any:
        calls.append(given[3])
        return load_data(*given)

    monkeypatch.setattr(topwork.run.train, "load_data", counted)
    short = {"max_steps": 1}
    quietly(
        recipes("wide", training=short), recipes("plus", training=short), recipes("narrow", training=short),
        recipes("other.rows", training={**short, "seed": 0}),
    )  # fmt: skip
    assert calls == [0, 3, 0]  # narrow's seed holds out other rows


def test_of_a_source_with_a_weight_the_seed_decides_which_rows_are_learned(recipes: Recipes, tickets: Path) -> None:
    """Though what validates is named: members that differ in the seed alone learn what each would alone."""
    weighed = {"train": [{"path": str(tickets), "weight": 0.5}], "eval": str(tickets)}
    changes = {"data": weighed, "training": {"max_steps": 1, "batch_size": 4, "num_train_epochs": 1}}
    digests = []
    for names in (("wide", "narrow"), ("narrow",)):
        runs = quietly(*(recipes(name, f"{len(names)}", **changes) for name in names))
        digests.append(read_json(runs[-1].folder / "provenance.json")["data"]["train"]["examples_sha256"])
    assert digests[0] == digests[1]


def test_what_cannot_share_a_pass_is_refused_before_anything_is_written(recipes: Recipes, tmp_path: Path) -> None:
    def refused(told: str, *given: Recipe, **options: Any) -> None:
        with pytest.raises(RequestError, match=told):
            quietly(*given, **options)

    wide = recipes("wide")
    refused("two runs have the output_dir", wide, recipes("plus").model_copy(update={"output_dir": wide.output_dir}))
    refused("model.dtype is 'float32' in the first and 'bfloat16'", wide, recipes("plus", model={"dtype": "bfloat16"}))
    refused("quantization.load_in_4bit is False", wide, recipes("plus", quantization={"load_in_4bit": True}))
    refused("tokens_per_pass is 300 .* 301", wide, recipes("plus", training={"tokens_per_pass": 301}))
    full = recipes("plus", training={"activation_checkpointing": "full"})
    refused("activation_checkpointing is 'auto' in the first and 'full'", wide, full)
    refused("no recipe")
    refused("stop_at is 0", wide, stop_at=0)
    assert not (tmp_path / "together").exists()


def test_a_run_that_was_not_begun_with_the_others_is_not_resumed_with_them(recipes: Recipes) -> None:
    quietly(recipes("wide"), stop_at=8)
    before = folder_bytes(Path(recipes("wide").output_dir))
    with pytest.raises(RequestError, match="plus was not begun with the others"):
        quietly(recipes("wide"), recipes("plus"), resume=True)
    quietly(recipes("plus"), stop_at=3)
    with pytest.raises(RequestError, match=r"no checkpoint of the same step .*wide has"):
        quietly(recipes("wide"), recipes("plus"), resume=True)
    assert folder_bytes(Path(recipes("wide").output_dir)) == before


def limited(monkeypatch: pytest.MonkeyPatch, on: Session, recipes: Sequence[Recipe]) -> None:
    """From now on there is just what these need together, with a pass as they ask for."""
    taken = 10**9
    monkeypatch.setattr(topwork.run.fit, "taken_memory", lambda _: taken)
    needed = topwork.run.fit._memory(on.base, recipes, 0, 0).needed_bytes(300, 1)
    monkeypatch.setattr(topwork.run.fit, "free_memory", lambda _: Free(needed - taken))


def test_more_than_memory_holds_are_refused_with_how_many_it_does(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = open_session(recipes("wide"), lambda _: None)
    three = [recipes(name) for name in ("wide", "plus", "other.rows")]
    assert trials_that_fit(on, three) == 3
    limited(monkeypatch, on, three[:2])
    assert trials_that_fit(on, three) == 2
    asked: list[int] = []
    monkeypatch.setattr(
        topwork.run.training, "trials_that_fit", lambda *given: asked.append(given[2]) or trials_that_fit(*given[:2])
    )
    with pytest.raises(RequestError, match=r"3 adapters do not fit .* the first 2 do"):
        quietly(*three, on=on)
    monkeypatch.setattr(topwork.run.fit, "free_memory", lambda _: Free(0))
    assert trials_that_fit(on, three) == 1
    assert not on.adapters.configs
    assert 0 < asked[0] < 300  # the longest sequence has to fit too; these are shorter than the pass of `limited`


def test_what_a_member_began_with_takes_memory_too(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    on = open_session(recipes("wide"), lambda _: None)
    limited(monkeypatch, on, [recipes("wide"), recipes("wide")])
    assert trials_that_fit(on, [recipes("wide"), recipes("wide")]) == 2
    pissa = recipes("wide", adapter={"init_lora_weights": "pissa"})
    assert trials_that_fit(on, [recipes("wide"), pissa]) == 1


def test_a_finished_run_gives_its_passes_memory_back(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    on, held, release = open_session(recipes("wide"), lambda _: None), [], Workspace.release

    def heard(memory: Workspace) -> None:
        held.append(len(memory._saved))
        release(memory)

    monkeypatch.setattr(Workspace, "release", heard)
    quietly(recipes("wide"), on=on)
    assert held == [1]  # it was used, and had grown to one block
    assert not on.base.workspace._saved
