"""A run that a signal stops: saved first, validated when it goes on, and the same bytes in the end."""

import errno
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from run.fixtures import Said
from topwork.ops.batch import Batch
from topwork.recipe.recipe import load_recipe
from topwork.run import evaluate as evaluation
from topwork.run.interrupted import RunInterrupted
from topwork.run.sweep.plan import SweepOptions
from topwork.run.sweep.run import sweep
from topwork.run.train import train, train_together
from topwork.training import loop
from topwork.training.checkpoint import checkpoint_path, read_state
from topwork.training.progress import Silent
from topwork.training.step import Means, mean_losses

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent to this process")

PLAN = {"max_steps": 6, "eval_steps": 3, "save_steps": 2, "tokens_per_pass": 200}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class At(Silent):
    """Sends a signal at the end of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        if step == self.step:
            send(self.number)


@pytest.fixture
def in_validation(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """in_validation(number): the next validation gets the signal after its first pass; it returns the passes' sizes."""

    def arm(number: int) -> list[int]:
        run: list[int] = []

        def counted(passes: Sequence[Batch]) -> Iterator[Batch]:
            for batch in passes:
                yield batch
                run.append(len(batch))
                if len(run) == 1:
                    send(number)

        def measured(base: Any, objectives: Any, passes: Any) -> dict[str, Means]:
            return mean_losses(base, objectives, passes if run else counted(passes))

        monkeypatch.setattr(loop, "mean_losses", measured)
        return run

    return arm


def stopped(recipe: Path, resume: bool = True, progress: Silent | None = None) -> dict[str, Any]:
    with pytest.raises(RunInterrupted) as caught:
        train(recipe, (), resume=resume, progress=progress, log=lambda _: None)
    assert caught.value.done.result["stopped"] == "interrupted"
    result: dict[str, Any] = json.loads((caught.value.done.folder / "result.json").read_text())
    assert result == caught.value.done.result
    return result


def test_stopped_in_every_phase_it_ends_with_the_bytes_of_an_unbroken_run(
    make_recipe: Callable[..., Path], in_validation: Callable[[int], list[int]], tmp_path: Path
) -> None:
    unbroken = train(make_recipe("unbroken", training=PLAN), log=lambda _: None).folder
    recipe, run = make_recipe(training=PLAN), tmp_path / "run"

    def state(step: int) -> Any:
        return read_state(checkpoint_path(run / "checkpoints", step))

    passes = in_validation(signal.SIGHUP)
    assert stopped(recipe, resume=False)["steps"] == 0
    assert len(passes) == 1, "the first validation was waited for"
    assert state(0).history == ()

    assert stopped(recipe, progress=At(1, signal.SIGXCPU))["steps"] == 1
    assert [one.step for one in state(1).history] == [0]

    assert stopped(recipe, progress=At(3, signal.SIGTERM))["steps"] == 3
    assert [one.step for one in state(3).history] == [0], "it was validated before it was saved"

    passes = in_validation(signal.SIGUSR1)
    assert stopped(recipe)["steps"] == 3, "the validation that was broken off is done first"
    assert len(passes) == 1

    assert stopped(recipe, progress=At(6, signal.SIGINT))["steps"] == 6
    assert [one.step for one in state(3).history] == [0, 3]
    assert (state(6).ended, len(state(6).history)) == (None, 2)
    assert not (run / "adapter").exists()

    assert train(recipe, resume=True, log=lambda _: None).result["stopped"] == "finished"
    for folder in ("adapter", "checkpoints/step-000006", "checkpoints/step-000004"):
        assert tiny.folder_bytes(run / folder) == tiny.folder_bytes(unbroken / folder), folder
    records = [
        [{key: record[key] for key in ("kind", "step", "loss") if key in record} for record in map(json.loads, lines)]
        for lines in ((folder / "metrics.jsonl").read_text().splitlines() for folder in (run, unbroken))
    ]
    assert records[0] == records[1]


def test_several_are_validated_in_the_same_passes_when_they_go_on(
    make_recipe: Callable[..., Path], in_validation: Callable[[int], list[int]], tmp_path: Path
) -> None:
    """One is due and the other is not; one ends there by its patience, one by its plan."""
    names = ("patient", "short", "long")
    changes = (
        {"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 3.0}, {"max_steps": 2}, {"eval_steps": 4},
    )  # fmt: skip

    def recipes(prefix: str) -> list[Any]:
        return [
            load_recipe(make_recipe(f"{prefix}-{name}", training={**PLAN, **change}))
            for name, change in zip(names, changes)
        ]

    unbroken = train_together(recipes("a"), log=lambda _: None)
    own = recipes("b")
    with pytest.raises(RunInterrupted) as caught:
        train_together(own, progress=lambda _: At(2, signal.SIGTERM), log=lambda _: None)
    assert [run.result["steps"] for run in caught.value.done] == [2, 2, 2]
    in_validation(signal.SIGTERM)
    with pytest.raises(RunInterrupted) as caught:
        train_together(own, True, log=lambda _: None)
    assert [run.result["stopped"] for run in caught.value.done] == ["interrupted"] * 3
    done = train_together(own, True, log=lambda _: None)
    assert [run.result["stopped"] for run in done] == [run.result["stopped"] for run in unbroken]
    assert [run.result["stopped"] for run in done] == ["early stopping", "finished", "finished"]
    for ours, theirs in zip(done, unbroken):
        assert tiny.folder_bytes(ours.folder / "adapter") == tiny.folder_bytes(theirs.folder / "adapter")
        last = f"checkpoints/step-{ours.result['steps']:06d}"
        assert tiny.folder_bytes(ours.folder / last) == tiny.folder_bytes(theirs.folder / last), ours.folder


def test_stopped_in_the_validation_of_a_pause_it_is_not_yet_paused(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    def paused(name: str, resume: bool = False, progress: Silent | None = None) -> dict[str, Any]:
        recipe = load_recipe(make_recipe(name, training=PLAN))
        one = progress or Silent()
        return train_together([recipe], resume, progress=lambda _: one, log=lambda _: None, stop_at=2)[0].result

    assert paused("unbroken")["stopped"] == "paused"
    with pytest.raises(RunInterrupted) as caught:
        paused("run", progress=At(2, signal.SIGTERM))
    assert caught.value.done[0].result["stopped"] == "interrupted"
    assert not (tmp_path / "run" / "adapter").exists()
    assert paused("run", resume=True)["stopped"] == "paused"
    for folder in ("adapter", "checkpoints"):
        assert tiny.folder_bytes(tmp_path / "run" / folder) == tiny.folder_bytes(tmp_path / "unbroken" / folder)


def test_a_run_whose_plan_was_cut_short_ends(make_recipe: Callable[..., Path]) -> None:
    """Whoever lowers max_steps in the run's recipe has it end where it is, and not never."""

    class Beyond(Silent):
        def stepped(self, step: int, record: dict[str, Any]) -> None:
            pytest.fail("it trained on")

    [run] = train_together([load_recipe(make_recipe(training=PLAN))], stop_at=4, log=lambda _: None)
    recipe = run.folder / "recipe.yaml"
    for steps in (4, 3):
        recipe.write_text(recipe.read_text().replace(f"max_steps: {PLAN['max_steps']}", f"max_steps: {steps}"))
        done = train(run.folder, resume=True, progress=Beyond(), log=lambda _: None).result
        assert (done["stopped"], done["steps"]) == ("finished", 4)
        recipe.write_text(recipe.read_text().replace(f"max_steps: {steps}", f"max_steps: {PLAN['max_steps']}"))


def test_steps_that_were_not_yet_logged_are_so_when_they_are_saved(make_recipe: Callable[..., Path]) -> None:
    plan = {**PLAN, "max_steps": 5, "logging_steps": 3}
    unbroken = train(make_recipe("unbroken", training=plan), log=lambda _: None)
    stopped(make_recipe(training=plan), resume=False, progress=At(2, signal.SIGTERM))
    run = train(make_recipe(training=plan), resume=True, log=lambda _: None)
    assert run.result["learned_tokens"] == unbroken.result["learned_tokens"]
    logged = [
        [(one["step"], one["tokens"]) for one in map(json.loads, lines) if one["kind"] == "train"]
        for lines in ((each.folder / "metrics.jsonl").read_text().splitlines() for each in (run, unbroken))
    ]
    assert logged[0] == logged[1]
    assert [step for step, _ in logged[0]] == [1, 2, 3, 4, 5]


def test_it_comes_out_of_another_process_as_it_is() -> None:
    told = RunInterrupted(["done"], signal.SIGTERM, "interrupted after step 3")
    again = pickle.loads(pickle.dumps(told))
    assert (again.done, again.number, str(again)) == (told.done, told.number, str(told))


def test_a_loop_over_runs_that_goes_on_after_errors_stops(make_recipe: Callable[..., Path]) -> None:
    begun = []

    def three() -> None:
        for name in ("first", "second", "third"):
            begun.append(name)
            try:
                train(make_recipe(name, training=PLAN), progress=At(2, signal.SIGINT), log=lambda _: None)
            except Exception:
                continue

    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 2 by SIGINT.*resume=True"):
        three()
    assert begun == ["first"]


def test_one_that_comes_when_all_is_done_does_not_start_the_next(make_recipe: Callable[..., Path]) -> None:
    class AtItsEnd(Silent):
        def ended(self, how: str) -> None:
            send(signal.SIGINT)

    with pytest.raises(RunInterrupted) as caught:
        train(make_recipe(training=PLAN), progress=AtItsEnd(), log=lambda _: None)
    assert caught.value.done.result["stopped"] == "finished"
    assert (caught.value.done.folder / "adapter" / "adapter_config.json").exists()


def test_a_sweep_raises_with_what_it_has(make_recipe: Callable[..., Path]) -> None:
    recipe, options = make_recipe(training=PLAN), SweepOptions(("adapter.r=2,4",))
    with pytest.raises(RunInterrupted) as caught:
        sweep(recipe, options=options, progress=lambda: lambda _: At(2, signal.SIGTERM), log=lambda _: None)
    assert caught.value.done.stopped == "interrupted"
    assert [trial.result.steps for trial in caught.value.done.state.trials] == [2, 2]
    assert not (caught.value.done.folder / "sweep.html").exists()


def test_a_rung_whose_validation_was_broken_off_is_not_done(make_recipe: Callable[..., Path]) -> None:
    """Its members would be compared by the losses of an earlier step."""
    recipe, options = (
        make_recipe(training={**PLAN, "max_steps": 9, "eval_steps": 1}),
        SweepOptions(("adapter.r=2,4",), halving=True),
    )
    with pytest.raises(RunInterrupted) as caught:
        sweep(recipe, options=options, progress=lambda: lambda _: At(1, signal.SIGTERM), log=lambda _: None)
    state = caught.value.done.state
    assert [(wave.stop_at, wave.done) for wave in state.waves] == [(1, False)]
    assert [(trial.result.steps, trial.rung) for trial in state.trials] == [(1, None)] * 2


def test_a_terminal_that_has_gone_loses_no_step(make_recipe: Callable[..., Path]) -> None:
    class Gone(Silent):
        """Hung up in step 2: whatever is written from there on fails."""

        def stepped(self, step: int, record: dict[str, Any]) -> None:
            if step == 2:
                send(signal.SIGHUP)
            if step >= 2:
                raise OSError(errno.EIO, "Input/output error")

        def finished(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    assert stopped(make_recipe(training=PLAN), resume=False, progress=Gone())["steps"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_eval_ends_with_a_sentence_and_keeps_the_scores_there_are(
    number: int, trained: Path, topwork: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked(*_: object) -> None:
        send(number)

    (trained / "evaluation.json").write_text("before")
    monkeypatch.setattr(evaluation, "score", asked)
    said = topwork("eval", trained)
    (trained / "evaluation.json").rename(tmp_path / "kept")
    assert said.code == 128 + number
    assert said.err.splitlines()[-1].startswith(f"stopped by {signal.Signals(number).name}")
    assert (tmp_path / "kept").read_text() == "before"


def test_train_is_stopped_while_it_loads(
    make_recipe: Callable[..., Path], topwork: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("topwork.run.train.open_session", lambda *_: send(signal.SIGTERM))
    said = topwork("train", make_recipe())
    assert said.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in said.err
    assert not (tmp_path / "run").exists()
