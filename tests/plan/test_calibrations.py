"""What a measurement says of a step, which models it runs, and how it is kept: arithmetic, with times that are made
up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from topwork.adapters.config import FullConfig, Ia3Config, LoraConfig
from topwork.common.cache import CACHE
from topwork.models.config import ModelConfig
from topwork.plan.base import structure_named
from topwork.plan.calibration import (
    Arm,
    Measured,
    Question,
    Rows,
    fewer_layers,
    measured,
    planned_arms,
    rows_of,
    spread_rows,
)
from topwork.plan.calibrations import FOLDER, keep, kept, seconds_here
from topwork.plan.speeds import cpu_speed
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory_setup import Member, Setup

SPEED = cpu_speed(2)
FOUND = Measured(10.0, 0.3, None, 0.01, 0.5, (2, 8), 5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))


def question(name: str = "smollm2-135m", **changes: Any) -> Question:
    base = structure_named(ModelConfig(model_name_or_path=name))
    layers = [module for module in base.modules if module.kind == "linear" and module.path != base.head]
    member = Member(LoraConfig(), "adamw", {module.path: (16 * module.rows, 16 * module.columns) for module in layers})
    setup = Setup(base, "bfloat16", QuantizationConfig(), (member,))
    return replace(Question(setup, Rows(256, 128, 256, 256), 4, 1024, 0), **changes)


def with_member(adapter: Any) -> Setup:
    setup = question().setup
    return replace(setup, members=(replace(setup.members[0], adapter=adapter),))


def times(fixed: float, layer: float, layers: int, noise: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(fixed + layer * layers + more for more in noise)


def test_a_step_follows_from_two_models_of_few_layers() -> None:
    quiet = (0.0, 0.0, 0.0)
    arms = [Arm(2, 0, times(5.0, 0.25, 2, quiet)), Arm(8, 0, times(5.0, 0.25, 8, quiet))]
    found = measured(arms, 30, 0, 1.5)
    assert found.step == pytest.approx(5.0 + 30 * 0.25)
    assert found.layer == pytest.approx(0.25)
    assert found.recomputed is None
    assert (found.load, found.layers, found.rounds) == (1.5, (2, 8), 3)
    assert found.spread == pytest.approx(0.0)


def test_what_slows_a_round_down_slows_both_and_the_median_round_counts() -> None:
    slow = (0.0, 3.0, 0.1, 0.0, 0.0)
    arms = [Arm(8, 0, times(5.0, 0.25, 8, slow)), Arm(2, 0, times(5.0, 0.25, 2, slow))]
    found = measured(arms, 30, 0, 0.0)
    assert found.layer == pytest.approx(0.25)
    assert found.step == pytest.approx(12.5)
    assert 0 < found.spread < 0.05


def test_checkpointed_layers_are_measured_beside_the_others() -> None:
    quiet = (0.0, 0.0)
    arms = [
        Arm(2, 0, times(5.0, 0.25, 2, quiet)),
        Arm(8, 0, times(5.0, 0.25, 8, quiet)),
        Arm(8, 8, times(5.0, 0.35, 8, quiet)),
    ]
    found = measured(arms, 30, 15, 0.0)
    assert found.recomputed == pytest.approx(0.1)
    assert found.step == pytest.approx(5.0 + 30 * 0.25 + 15 * 0.1)


def test_all_layers_checkpointed_need_no_third_model() -> None:
    arms = [Arm(2, 2, times(5.0, 0.35, 2, (0.0,))), Arm(8, 8, times(5.0, 0.35, 8, (0.0,)))]
    assert measured(arms, 30, 30, 0.0).step == pytest.approx(5.0 + 30 * 0.35)


def test_the_whole_model_needs_no_arithmetic() -> None:
    found = measured([Arm(30, 15, (3.0, 9.0, 2.0))], 30, 15, 0.0)
    assert (found.step, found.layer) == (3.0, None)


def test_a_small_model_is_measured_whole_and_a_large_one_in_part() -> None:
    small, large = question(), question("llama-3-8b")
    assert planned_arms(small, SPEED, 1e6, 30) == [(30, 0)]
    assert planned_arms(small, SPEED, 1e6, 20) == [(5, 0), (20, 0)]
    (least, _), (most, _) = planned_arms(large, SPEED, 60.0, 32)
    assert 1 == least < most < 32
    assert planned_arms(large, SPEED, 1e-3, 32) == [(1, 0), (2, 0)]
    (least, _), (most, _) = planned_arms(small, SPEED, 3.0, 30)
    assert 1 <= least < most < 30
    longer = planned_arms(small, SPEED, 6.0, 30)
    assert longer[-1][0] > most


def test_the_models_checkpoint_as_the_run_will() -> None:
    assert planned_arms(question(checkpointed_layers=30), SPEED, 2.0, 20)[0][1] > 0
    mixed = planned_arms(question(checkpointed_layers=15), SPEED, 2.0, 20)
    assert [count > 0 for _, count in mixed] == [False, False, True]
    assert mixed[1][0] == mixed[2][0] == mixed[2][1]


def test_what_the_models_take_is_bounded() -> None:
    asked = question()
    for seconds in (3.0, 8.0, 20.0):
        models = planned_arms(asked, SPEED, seconds, 30)
        each = [replace(asked, setup=fewer_layers(asked.setup, layers)).reckoned(SPEED) for layers, _ in models]
        assert 5 * sum(each) <= seconds


def test_fewer_layers_keep_embedding_and_head() -> None:
    setup = question().setup
    cut = fewer_layers(setup, 2)
    assert cut.structure.layers == 2
    assert cut.structure.head in cut.structure.by_path
    assert cut.structure.embedding in cut.structure.by_path
    assert cut.members[0].values * 15 == setup.members[0].values
    assert not [module for module in cut.structure.modules if "layers.2." in module.path]


def test_rows_are_known_by_their_means() -> None:
    found = rows_of([(10, 2), (30, 20)])
    assert found == Rows(20.0, 11.0, (100 + 900) / 40, 30)


def test_rows_are_drawn_like_those_that_are_known_by_percentiles() -> None:
    rows = spread_rows(200.0, 0.5, 900, {50: 150, 90: 400, 99: 800})
    lengths = [length for length, _ in rows]
    assert sum(lengths) / len(lengths) == pytest.approx(200, rel=0.05)
    assert max(lengths) <= 900
    assert all(0 < learned < length for length, learned in rows)
    assert sum(learned for _, learned in rows) / sum(lengths) == pytest.approx(0.5, abs=0.02)
    same = spread_rows(64.0, 1.0, 64, {50: 64, 90: 64, 99: 64})
    assert set(same) == {(64, 63)}
    assert {length for length, _ in spread_rows(64.0, 0.5, 64, {})} == {64}


def test_passes_follow_from_rows() -> None:
    asked = question(batch_size=16)
    assert asked.step_tokens == 16 * 256
    assert asked.passes == 4.0
    assert (asked.shape.tokens, asked.shape.learned_tokens, asked.shape.longest) == (1024, 512, 256)
    assert question(batch_size=1).passes == 1.0
    assert question(batch_size=1).shape.tokens == 256


def test_a_measurement_of_the_very_question_is_taken() -> None:
    keep(question(), FOUND, SPEED, "2026-11-29")
    records, notes = kept()
    found = seconds_here(question(), SPEED, records, notes)
    assert (found.seconds, found.exact, notes) == (10.0, True, [])
    assert "measured on this machine, 2026-11-29" in found.source
    assert question().reckoned(found.speed) == pytest.approx(10.0)


CHANGES: dict[str, Any] = {
    "rows": {"rows": Rows(300, 128, 300, 400)},
    "batch": {"batch_size": 8},
    "pass": {"tokens_per_pass": 512},
    "checkpointing": {"checkpointed_layers": 3},
    "method": {"setup": with_member(Ia3Config())},
    "rank": {"setup": with_member(LoraConfig(r=8))},
    "dtype": {"setup": replace(question().setup, dtype="float32")},
    "bits": {"setup": replace(question().setup, quantization=QuantizationConfig(load_in_4bit=True))},
    "members": {"setup": replace(question().setup, members=question().setup.members * 2)},
    "base": {"setup": question("smollm2-360m").setup},
}


def test_what_was_measured_while_the_machine_was_busy_says_so() -> None:
    asked = question()
    keep(asked, FOUND, SPEED, "2026-11-29 12:00 UTC")
    assert not seconds_here(asked, SPEED, *kept()).notes
    keep(asked, replace(FOUND, spread=0.67), SPEED, "2026-11-29 12:00 UTC")
    told = seconds_here(asked, SPEED, *kept()).notes
    assert len(told) == 1
    assert "busy" in told[0]
    assert "67%" in told[0]


@pytest.mark.parametrize("name", CHANGES)
def test_another_question_is_reckoned_from_the_nearest_measurement(name: str) -> None:
    other = question(**CHANGES[name])
    assert other.key() != question().key()
    keep(question(), FOUND, SPEED, "2026-11-29")
    found = seconds_here(other, SPEED, *kept())
    assert not found.exact
    assert found.seconds == pytest.approx(other.reckoned(SPEED) * 10.0 / question().reckoned(SPEED))
    assert "lora on a llama of 30 layers" in found.source


def test_the_nearest_is_held_and_trained_alike_before_it_is_of_one_size() -> None:
    keep(question("smollm2-360m"), FOUND, SPEED, "far")
    keep(question(setup=with_member(FullConfig())), replace(FOUND, step=99.0), SPEED, "full")
    keep(question(**CHANGES["bits"]), replace(FOUND, step=77.0), SPEED, "bits")
    assert "far" in seconds_here(question(batch_size=2), SPEED, *kept()).source
    assert "bits" in seconds_here(question(batch_size=2, **CHANGES["bits"]), SPEED, *kept()).source


def test_without_a_measurement_the_default_says_how_to_measure() -> None:
    found = seconds_here(question(), SPEED, *kept())
    assert found.seconds == question().reckoned(SPEED)
    assert "--calibrate" in found.source


def test_a_new_measurement_takes_the_place_of_the_old() -> None:
    first = keep(question(), FOUND, SPEED, "2026-11-28")
    assert keep(question(), replace(FOUND, step=11.0), SPEED, "2026-11-29") == first
    assert seconds_here(question(), SPEED, *kept()).seconds == 11.0


def test_another_machines_measurements_are_passed_over_with_a_sentence() -> None:
    path = keep(question(), FOUND, SPEED, "2026-11-29")
    values = json.loads(path.read_text("utf-8"))
    values["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(values), "utf-8")
    records, notes = kept()
    assert records == []
    assert notes == [f"the measurement of 2026-11-29 in {path.name} was made with another torch: not used"]
    assert seconds_here(question(), SPEED, records, notes).notes == tuple(notes)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"form": 1}', '{"form": 0}', "\x00\x01", '{"form": 1, "measured": {"step": "x"}}'],
)
def test_damaged_files_are_passed_over_with_a_sentence(text: str) -> None:
    good = keep(question(), FOUND, SPEED, "2026-11-29")
    (good.parent / "0.json").write_text(text, "utf-8")
    records, notes = kept()
    assert len(records) == 1
    assert len(notes) == 1
    assert "not used" in notes[0]


@pytest.mark.parametrize(("key", "value"), [("step", -1.0), ("step", None), ("layers", 3), ("more", 1)])
def test_figures_that_cannot_be_are_damage(key: str, value: Any) -> None:
    path = keep(question(), FOUND, SPEED, "2026-11-29")
    values = json.loads(path.read_text("utf-8"))
    values["measured"][key] = value
    path.write_text(json.dumps(values), "utf-8")
    assert kept()[0] == []


def test_no_folder_is_no_measurement(tmp_path: Path) -> None:
    assert not (tmp_path / FOLDER).exists()
    assert kept() == ([], [])
