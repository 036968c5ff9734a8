"""`topwork plan`: what a run takes, whether it fits, what would make it fit, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import topwork
from run.tiny import rows, write_rows
from topwork.common.errors import DataError, ModelError, RecipeError, RequestError
from topwork.common.memory import Free
from topwork.plan.calibration import Question
from topwork.plan.devices import find_device, shipped_devices
from topwork.plan.fits import Job
from topwork.recipe.recipe import make_recipe
from topwork.run import fit
from topwork.run.plan import plan
from topwork.run.planning import place as places
from topwork.run.planning.first import would_fit
from topwork.run.planning.place import find_place, memory_bytes
from topwork.training.memory import MARGIN, peak
from topwork.training.passes import Memory, plan_passes

SIZES = {
    "24GB": 24 * 10**9, "24GiB": 24 << 30, "24000MB": 24 * 10**9, "24": 24 * 10**9, " 5,5 gb ": 5_500_000_000,
    "512MiB": 512 << 20, "1.5T": 1_500_000_000_000, "80g": 80 * 10**9,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """LoRA on a shipped shape of which nothing else is at hand, with rows."""
    write_rows(tmp_path / "train.jsonl", rows(60))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": {"model_name_or_path": "qwen2.5-0.5b"}, "data": {"train": "train.jsonl"}}))
    return path


# Where


@pytest.mark.parametrize("text", SIZES)
def test_memory_is_read_as_people_write_it(text: str) -> None:
    assert memory_bytes(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["", "0", "0GB", "-4GB", "lots", "24 GB of it", "1e99GB", "24XB", "nan", "inf", "9" * 30]
)
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--memory is"):
        memory_bytes(text)


def test_a_device_is_found_by_name_and_refused_beside_memory() -> None:
    card = find_place("rtx4090", None, "auto")
    assert (card.kind, card.memory_bytes) == ("cuda", find_device("RTX 4090").memory_bytes)
    assert card.price_per_hour == find_device("RTX 4090").price_per_hour
    with pytest.raises(RequestError, match="RTX 4090"):
        find_place("rtx 4900", None, "auto")
    with pytest.raises(RequestError, match="one of them"):
        find_place("T4", "16GB", "auto")


def test_so_much_memory_is_a_cards_unless_the_recipe_says_cpu() -> None:
    assert find_place(None, "8GB", "auto").kind == "cuda"
    assert find_place(None, "8GB", "cpu").kind == "cpu"
    assert find_place(None, "8GB", "auto").speed is None


def test_this_machines_card_is_asked_of_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = places._cards
    assert asked(tmp_path) == []  # no driver, and nobody is asked
    (tmp_path / places._DRIVER).mkdir(parents=True)
    monkeypatch.setattr(places, "_ASK", ("echo", "NVIDIA H200, 140000\nNVIDIA Thing 9000, 1000"))
    assert asked(tmp_path) == [("NVIDIA H200", 140000 << 20), ("NVIDIA Thing 9000", 1000 << 20)]
    monkeypatch.setattr(places, "_ASK", ("no-such-program",))
    assert asked(tmp_path) == []
    monkeypatch.setattr(places, "_cards", lambda: [("NVIDIA H200", 1 << 36), ("NVIDIA Thing 9000", 1 << 30)])
    assert find_place(None, None, "auto").name == "H200"
    unknown = find_place(None, None, "cuda:1")
    assert (unknown.name, unknown.memory_bytes, unknown.speed) == ("NVIDIA Thing 9000", 1 << 30, None)
    assert find_place(None, None, "cpu").kind == "cpu"


def test_without_a_card_the_machines_free_memory_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_cards", list)
    here = find_place(None, None, "auto")
    assert here.kind == "cpu"
    assert here.memory_bytes > 0
    assert here.speed is not None
    assert "free" in here.of


# What it takes


def test_measured_rows_are_as_long_as_those_that_are_known(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their virtual tokens, so that a step's rows fill as many passes as in training."""
    measured = []

    def told(_recipes: Any, question: Question, lengths: Any, **_: Any) -> None:
        measured.append((question.rows, [length for length, _ in lengths]))

    monkeypatch.setattr("topwork.run.calibrate.calibrate", told)
    virtual = 20
    for options in ([], ["adapter.method=prefix", f"adapter.num_virtual_tokens={virtual}"]):
        plan(recipe, options, calibrate=True)
    (rows, lengths), (longer_rows, longer) = measured
    assert sum(lengths) / len(lengths) == pytest.approx(rows.tokens, rel=0.05)
    assert longer_rows.tokens == rows.tokens + virtual
    assert sum(longer) / len(longer) == pytest.approx(longer_rows.tokens, rel=0.05)


@pytest.mark.parametrize("share", [1.0, 1.05, 1.2, 1.5, 2.0, 6.0])
def test_the_pass_is_the_one_that_training_plans(recipe: Path, share: float) -> None:
    """However few of the rows' tokens are learned."""
    least = plan(recipe, memory="1MB").fit.needed_bytes
    found = plan(recipe, memory=f"{share * least / 10**6:.0f}MB")
    job = found.job
    assert found.tokens is not None
    assert found.tokens.learned_share < 0.6
    expected = plan_passes(None, "auto", job.longest, Memory(job.setup, job.memory_bytes, job.longest))
    assert (found.tokens_per_pass, found.checkpointed_layers) == (
        expected.tokens_per_pass, expected.checkpointed_layers,
    )  # fmt: skip


def test_the_peak_is_the_largest_moment_of_the_rows_largest_pass(recipe: Path) -> None:
    found = plan(recipe, device="T4")
    job, tokens = found.job, found.tokens
    assert found.fits
    assert tokens is not None
    assert found.peak == peak(job.setup, found.shape, found.checkpointed_layers)
    assert found.peak in found.moments
    step = tokens.fullest_step(found.recipe.training.batch_size, found.timing.steps or 0)  # type: ignore[union-attr]
    assert found.shape.tokens == step < found.tokens_per_pass
    assert found.shape.learned_tokens == pytest.approx(tokens.learned_share * step, abs=1)
    assert found.peak.bytes < found.fit.peak.bytes
    assert found.fit.needed_bytes == round(MARGIN[found.place.kind] * found.fit.peak.bytes) <= found.place.memory_bytes
    assert f"a step of these rows has {step:,} at most" in found.as_text()


def test_rows_that_fill_a_pass_take_a_full_one(recipe: Path) -> None:
    found = plan(recipe, ["training.batch_size=4096", "training.tokens_per_pass=512"], device="T4")
    assert found.shape.tokens == 512
    assert not found.shape.alone
    assert "at most" not in found.as_text()
    small = plan(recipe, memory="1MB")
    assert small.shape == small.job.shape(small.tokens_per_pass)


def test_a_pass_that_the_recipe_names_stays(recipe: Path) -> None:
    found = plan(recipe, ["training.tokens_per_pass=4096"], device="T4")
    assert found.tokens_per_pass == 4096
    tight = plan(recipe, ["training.tokens_per_pass=4096"], memory=f"{found.fit.needed_bytes / 2**20 - 10:.0f}MiB")
    assert tight.tokens_per_pass == 4096
    assert tight.checkpointed_layers > found.checkpointed_layers
    off = plan(recipe, ["training.tokens_per_pass=4096", "training.activation_checkpointing=full"], device="T4")
    assert off.checkpointed_layers == off.job.structure.checkpointable


def test_steps_time_and_money_follow_from_the_rows(recipe: Path) -> None:
    found = plan(recipe, ["training.num_train_epochs=3", "training.batch_size=8"], device="T4")
    assert found.tokens is not None
    assert found.timing is not None
    assert found.timing.steps == round(3 * -(-found.tokens.sequences // 8))
    assert found.timing.run_tokens == 3 * found.tokens.tokens
    cost = found.timing.cost
    assert cost.seconds > found.timing.steps * cost.step_seconds > 0
    assert cost.money == pytest.approx(cost.hours * (find_device("T4").price_per_hour or 0))
    assert plan(recipe, ["training.max_steps=7"], device="T4").timing.steps == 7  # type: ignore[union-attr]
    assert plan(recipe, memory="16GB").timing is None


def test_a_model_alone_is_planned_with_the_defaults() -> None:
    found = plan("qwen2.5-0.5b", ["adapter.r=4", "data.max_length=300"], device="T4")
    assert found.tokens is None
    assert found.job.longest == 300
    assert getattr(found.recipe.adapter, "r", 0) == 4
    assert found.timing is not None
    assert found.timing.steps is None
    assert found.timing.run_tokens == 10**6
    assert any("defaults" in note for note in found.notes)


def test_virtual_tokens_stand_before_every_sequence(recipe: Path) -> None:
    plain = plan(recipe, device="T4")
    virtual = plan(recipe, ["adapter.method=prompt", "adapter.num_virtual_tokens=20"], device="T4")
    assert virtual.job.longest == plain.job.longest + 20


def test_a_recipe_object_and_a_runs_folder_are_planned_too(recipe: Path, tmp_path: Path) -> None:
    read = topwork.load_recipe(recipe)
    assert plan(read, device="T4").as_json() == plan(recipe, device="T4").as_json()
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.read_text().replace("train.jsonl", str(tmp_path / "train.jsonl")))
    (run / "run.json").write_text(json.dumps({"format": 1, "topwork": "0", "files": ["recipe.yaml"]}))
    assert plan(run, device="T4").tokens_per_pass == plan(recipe, device="T4").tokens_per_pass


# What would fit


def test_what_fits_needs_no_change(recipe: Path) -> None:
    assert plan(recipe, device="H100").changes == ()


def test_changes_are_told_in_the_order_of_harm_and_make_it_fit() -> None:
    found = plan("llama-3-8b", memory="9GB")
    assert not found.fits
    keys = [change.key for change in found.changes]
    assert keys[0] == "quantization.load_in_4bit"
    assert found.changes[-1].fits
    assert all(not change.fits for change in found.changes[:-1])
    saved = sum(change.saved_bytes for change in found.changes)
    assert found.job.least.needed_bytes - saved == found.changes[-1].total_bytes <= found.place.memory_bytes
    sets = [f"{change.key}={json.dumps(change.value)}" for change in found.changes]
    assert plan("llama-3-8b", sets, memory="9GB").fits  # as it is told, it is


def test_no_change_is_told_that_is_not_needed() -> None:
    found = plan("llama-3-8b", memory="9GB")
    sets = [f"{change.key}={json.dumps(change.value)}" for change in found.changes]
    for left in range(len(sets)):
        rest = sets[:left] + sets[left + 1 :]
        if rest or left == 0:
            assert not plan("llama-3-8b", rest, memory="9GB").fits


def test_full_fine_tuning_that_is_too_large_becomes_an_adapter() -> None:
    found = plan("llama-3-8b", ["adapter.method=full"], memory="40GB")
    assert "adapter.method" in [change.key for change in found.changes]
    assert found.changes[-1].fits


def test_a_pass_that_was_named_too_large_is_left_out_first() -> None:
    names = ["training.tokens_per_pass=200000", "training.activation_checkpointing=off"]
    found = plan("qwen2.5-0.5b", names, memory="16GB")
    assert [change.key for change in found.changes] == ["training.tokens_per_pass"]


def test_where_the_base_itself_is_too_large_a_smaller_one_is_named() -> None:
    found = plan("llama-3-70b", memory="6GB")
    last = found.changes[-1]
    assert (last.key, last.fits) == ("model.model_name_or_path", True)
    assert "llama" in str(last.value)
    nothing = plan("smollm2-135m", memory="100MB")
    assert not nothing.changes or not nothing.changes[-1].fits
    assert "nothing makes it fit" in nothing.as_text() or not nothing.changes


def test_a_base_without_the_targets_is_no_way_out() -> None:
    """gpt2 is smaller than Qwen2.5, and has no layers of these names."""
    found = plan("qwen2.5-0.5b", ["adapter.target_modules=[q_proj, v_proj]"], memory="1MB")
    assert not found.fits
    assert all(change.value != "gpt2" for change in found.changes)


def test_long_sequences_may_be_what_does_not_fit() -> None:
    given = ["data.max_length=100000", "model.dtype=bfloat16"]
    found = plan("qwen2.5-0.5b", given, memory="6GB")
    assert "data.max_length" in [change.key for change in found.changes]


# Beside each other


def test_methods_are_compared_on_all_devices() -> None:
    found = plan("llama-3-8b", device="T4", compare=True)
    assert len(found.table) == 3 * (len(shipped_devices()) + 1)
    by = {(row.device, row.method): row for row in found.table}
    assert not by["RTX 4090", "full"].fits
    assert by["RTX 4090", "QLoRA"].fits
    assert by["B200", "full"].fits
    lora, qlora = by["A100 80GB", "LoRA"], by["A100 80GB", "QLoRA"]
    assert qlora.needed_bytes < lora.needed_bytes or qlora.checkpointed_layers <= lora.checkpointed_layers
    assert lora.money == pytest.approx((lora.seconds or 0) / 3600 * (find_device("A100 80GB").price_per_hour or 0))


# What is refused


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ({"device": "rtx 4091"}, RequestError, "RTX 4090"),
        ({"memory": "none"}, RequestError, "--memory"),
        ({"devices": "no-such.yaml"}, RequestError, "no-such.yaml"),
        ({"overrides": ["adapter.ranks=3"]}, RecipeError, "adapter.ranks"),
        ({"overrides": ["data.train=nowhere.jsonl"]}, DataError, "nowhere.jsonl"),
        ({"overrides": ["model.model_name_or_path=qwen2.5-0.7b"]}, ModelError, "qwen2.5-0.5b"),
        ({"overrides": ["adapter.target_modules=[q_prj]"]}, RequestError, "q_proj"),
    ],
)
def test_wrong_requests_are_refused(recipe: Path, given: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        plan(recipe, **{"device": "T4", **given} if "memory" not in given else given)


def test_prices_below_nothing_are_refused(recipe: Path, tmp_path: Path) -> None:
    from importlib.resources import files

    text = files("topwork.plan").joinpath("devices.yaml").read_text("utf-8")
    price = f"value: {find_device('T4').price_per_hour}"
    assert price in text
    path = tmp_path / "devices.yaml"
    path.write_text(text.replace(price, price.replace("value: ", "value: -")))
    with pytest.raises(RequestError, match="price_per_hour"):
        plan(recipe, device="T4", devices=path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "llama"}, "num_hidden_layers"),
        ({"model_type": "no-such-family", "hidden_size": 8}, "no-such-family"),
        ({}, "model_type"),
        ([], "JSON object|config"),
    ],
)
def test_configs_that_tell_no_model_are_refused(tmp_path: Path, config: Any, told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=told):
        plan(str(tmp_path), device="T4")


# What is told


def test_names_of_the_json_stay(recipe: Path) -> None:
    found = plan(recipe, device="T4", compare=True).as_json()
    assert list(found) == [
        "model", "parameters", "trained_parameters", "method", "load_in_4bit", "load_in_8bit", "device", "device_kind",
        "memory_bytes", "price_per_hour", "fits", "needed_bytes", "peak", "moments", "tokens_per_pass", "largest_pass",
        "checkpointed_layers", "checkpointable_layers", "together", "data", "time", "changes", "compare", "notes",
    ]  # fmt: skip
    assert list(found["data"]) == [
        "rows", "sequences", "tokens", "learned_tokens", "longest", "percentiles", "attended", "held_out_rows",
        "held_out_tokens", "counted", "looked_at",
    ]  # fmt: skip
    assert list(found["time"]) == [
        "steps", "epochs", "tokens", "step_seconds", "tokens_per_second", "start_seconds", "validation_seconds",
        "seconds", "money", "source", "notes",
    ]  # fmt: skip
    assert list(found["compare"][0]) == [
        "device", "method", "fits", "needed_bytes", "memory_bytes", "tokens_per_pass", "checkpointed_layers", "seconds",
        "money",
    ]  # fmt: skip
    change = plan("llama-3-8b", memory="9GB").as_json()["changes"][0]
    assert list(change) == ["key", "value", "says", "saved_bytes", "total_bytes", "fits"]
    assert json.loads(json.dumps(found)) == found


def test_the_text_begins_with_the_verdict_and_tells_what_to_change(recipe: Path) -> None:
    lines = plan(recipe, device="T4").as_text().splitlines()
    assert lines[0].startswith("LoRA r 16 on qwen2.5-0.5b: ")
    assert lines[1].startswith("fits: peak ")
    assert lines[1].endswith(("backward", "forward", "loss", "update", "read", "saved"))
    text = "\n".join(lines)
    assert all(
        word in text for word in ("base weights", "optimizer", "process", "by moment:", "pass ", "steps ", "cost ")
    )
    assert all(len(line) <= 120 for line in lines if not line.startswith("       by "))
    short = plan("llama-3-8b", memory="9GB").as_text()
    assert "does not fit: it takes" in short
    assert "the least harmful first" in short
    assert "quantization.load_in_4bit: true" in short
    assert "it fits" in short
    table = plan("qwen2.5-0.5b", device="T4", compare=True).as_text()
    assert "QLoRA" in table
    assert "RTX 3060" in table


def test_a_job_speaks_of_several_members(recipe: Path) -> None:
    one = topwork.load_recipe(recipe)
    job = plan(recipe, device="T4").job
    two = Job([one, one], job.structure, job.device, job.memory_bytes, job.longest)
    assert two.fit.peak.bytes > job.fit.peak.bytes or two.fit.tokens_per_pass < job.fit.tokens_per_pass


def test_a_plan_imports_neither_torch_nor_transformers_nor_datasets(recipe: Path) -> None:
    code = (
        "import sys; from topwork.run.plan import plan; "
        f"found = plan({str(recipe)!r}, device='T4', compare=True); plan('llama-3-8b', memory='9GB'); found.as_text(); "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"


# Before a training


def test_a_training_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda _: Free(9 * 10**9))
    monkeypatch.setattr(fit, "taken_memory", lambda _: 0)
    values = {"model": {"model_name_or_path": "llama-3-8b", "device": "cpu"}, "data": {"train": "rows.jsonl"}}
    with pytest.raises(
        RequestError, match=r"takes at least .*\nWhat would make it fit, the least harmful first"
    ) as refused:
        fit.refuse_small_memory(make_recipe(values), 512)
    assert "quantization.load_in_4bit: true saves" in str(refused.value)
    assert str(refused.value).count("and it fits") == 1


def test_nothing_is_advised_where_a_run_fits(recipe: Path) -> None:
    assert would_fit(plan(recipe, device="T4").job) == ""


# Several members


def swept(recipe: Path, **sections: Any) -> Path:
    path = recipe.with_name("sweep.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | sections))
    return path


def test_a_sweeps_members_are_planned_in_waves(recipe: Path) -> None:
    path = swept(recipe, sweep={"grid": {"adapter.r": [8, 16, 32], "training.learning_rate": [1e-4, 1e-3]}})
    roomy = plan(path, device="H100")
    assert roomy.several is not None
    assert roomy.several.waves == (6,)
    assert len(roomy.job.recipes) == 6
    largest = plan(recipe, ["adapter.r=32"], memory="1MB")
    tight = plan(path, memory=f"{1.02 * largest.fit.needed_bytes / 10**6:.0f}MB")
    assert tight.fits
    assert tight.several is not None
    assert sum(tight.several.waves) == 6
    assert len(tight.several.waves) > 1
    assert len(tight.job.recipes) == tight.several.waves[0]
    assert "6 members in" in tight.as_text()
    small = plan(path, memory="500MB")
    assert not small.fits
    assert "not even alone" in small.as_text()


def test_all_waves_take_longer_than_one(recipe: Path) -> None:
    path = swept(recipe, sweep={"grid": {"training.learning_rate": [1e-4, 1e-3]}}, training={"optim": "adamw"})
    found = plan(path, device="T4")
    assert found.several is not None
    assert found.timing is not None
    assert found.several.seconds == pytest.approx(found.timing.cost.seconds)
    assert found.several.money == pytest.approx(found.timing.cost.money)
    steps = plan(swept(recipe, sweep={"grid": {"training.batch_size": [4, 8]}}), device="T4")
    assert steps.several is not None
    assert steps.several.seconds is None


def test_jobs_have_rows_of_their_own(recipe: Path) -> None:
    write_rows(recipe.with_name("other.jsonl"), rows(20))
    jobs = [{"name": "a", "data": {"train": "train.jsonl"}}, {"name": "b", "data": {"train": "other.jsonl"}}]
    found = plan(swept(recipe, jobs=jobs), device="T4")
    assert found.tokens is None
    assert found.several is not None
    assert found.several.members == 2
    assert "rows of their own" in found.as_text()


def test_a_sweep_whose_members_do_not_fit_is_refused_with_how_many(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "taken_memory", lambda _: 0)
    one = topwork.load_recipe(recipe, ["model.device=cpu"])
    large = topwork.load_recipe(recipe, ["model.device=cpu", "adapter.r=1024", "adapter.lora_alpha=1024"])
    monkeypatch.setattr(fit, "free_memory", lambda _: Free(4 * 10**9))
    fit.refuse_large_members([one, one])
    with pytest.raises(RequestError, match=r"1 of 3 members do not fit into memory, not even alone: the largest takes"):
        fit.refuse_large_members([one, large, one])


def test_a_plan_is_made_from_python() -> None:
    assert topwork.plan_run("qwen2.5-0.5b", device="T4").fits
