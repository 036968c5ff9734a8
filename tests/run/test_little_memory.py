"""Training where memory is short: what is planned, what is refused, and what is said where an allocation fails."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import topwork.run.fit as fit
import topwork.run.loading as loading
import topwork.training.loop as loop
from reference.containers import container
from run import tiny
from run.fixtures import Said
from run.processes import Commands
from run.tiny import folder_bytes
from topwork.common.errors import RequestError, RunError
from topwork.common.memory import Free
from topwork.data.examples import load_data
from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_values
from topwork.models.load import load_base
from topwork.ops.batch import Batch
from topwork.plan.base import structure_named
from topwork.plan.setup import setup_of
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe, load_recipe
from topwork.run.outcome import TrainedRun
from topwork.run.quantize import quantize
from topwork.run.session import open_session
from topwork.run.train import train
from topwork.training.step import Learner, train_step

Recipes = Callable[..., Path]
MB = 10**6
TAKEN = 10**9
CONTAINER = "the 400 MB that this container may use"
SHORT: dict[str, Any] = {"max_steps": 3, "eval_steps": 3, "tokens_per_pass": None}


def told(recipe: Path, **how: Any) -> tuple[TrainedRun, str]:
    lines: list[str] = []
    return train(recipe, log=lines.append, **how), "\n".join(lines)


def allocates(monkeypatch: pytest.MonkeyPatch, name: str, most_tokens: int) -> list[int]:
    """From now on a pass of more tokens asks torch for more than there is, with gradients half made. Returns what was
    asked for."""
    real, asked = getattr(loop, name), []

    def run(base: Any, learners: Any, given: Iterable[Batch]) -> Any:
        passes = list(given)
        asked.append(max(len(batch.tokens) for batch in passes))
        if asked[-1] > most_tokens:
            for learner in learners:
                for parameter in learner.parameters if isinstance(learner, Learner) else ():
                    parameter.grad = torch.full_like(parameter, 7.0)
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(base, learners, passes)

    monkeypatch.setattr(loop, name, run)
    return asked


def test_a_pass_that_does_not_fit_is_halved_and_the_step_is_the_same(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, _ = told(make_recipe("small", training=SHORT | {"tokens_per_pass": 256}))
    asked = allocates(monkeypatch, "train_step", 256)
    run, said = told(make_recipe("run", training=SHORT))
    assert asked[0] > 256 >= max(asked[-3:]), "the first step was run again, and the others with what fits"
    assert "out of memory at step 1: on with 256 tokens per pass" in said
    assert "DefaultCPUAllocator" not in said
    first, second = (folder_bytes(one.folder / "adapter")["adapter_model.safetensors"] for one in (small, run))
    assert first == second
    assert run.result["tokens_per_pass"] == 256
    assert json.loads((run.folder / "provenance.json").read_text("utf-8"))["tokens_per_pass"] == 256


def test_a_validation_that_does_not_fit_is_halved(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    allocates(monkeypatch, "mean_losses", 256)
    run, said = told(make_recipe(training=SHORT, data={"eval_fraction": 0.3}))
    assert "out of memory in the validation at step 0: on with" in said
    assert run.result["steps"] == 3


@pytest.mark.parametrize(
    ("name", "where"), [("train_step", "at step 1"), ("mean_losses", "in the validation at step 0")]
)
def test_a_size_that_was_asked_for_is_kept_and_what_to_lower_is_said(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    allocates(monkeypatch, name, 0)
    with pytest.raises(RunError, match=rf"^out of memory {where} with 512 .*--set training.tokens_per_pass=256 or"):
        told(make_recipe(training=SHORT | {"tokens_per_pass": 512}))


def test_halving_ends_where_a_row_would_not_fit(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    allocates(monkeypatch, "train_step", 0)
    with pytest.raises(RunError, match=r"with 256 tokens per pass; .*--set training.activation_checkpointing=full"):
        told(make_recipe(training=SHORT))


def test_a_row_that_is_longer_than_a_pass_became_has_one_of_its_own(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory was short once, for other rows: the run goes on, and may be gone on with."""
    rows = tiny.rows(12)
    rows[3]["messages"][0]["content"] *= 10
    data = {"train": str(tiny.write_rows(tmp_path / "long.jsonl", rows)), "eval_fraction": 0.0}
    asked = allocates(monkeypatch, "train_step", 256)
    recipe = make_recipe(training=SHORT | {"max_steps": 4, "batch_size": 3}, data=data)
    real, told_of = loop.train_step, []

    def once(base: Any, learners: Any, passes: Any) -> Any:
        told_of.append(1)
        return real(base, learners, passes) if len(told_of) <= 2 else train_step(base, learners, passes)

    monkeypatch.setattr(loop, "train_step", once)
    run, said = told(recipe)
    assert re.findall("on with .* tokens per pass", said) == ["on with 256 tokens per pass"], said
    assert asked[0] > 256
    assert told(recipe, resume=True)[0].result["tokens_per_pass"] == run.result["tokens_per_pass"] == 256


def test_an_optimizer_that_does_not_fit_is_no_step_to_run_again(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(RunError, match=r"^out of memory while updating the weights; .*--resume"):
        told(make_recipe(training=SHORT))


def short_of(monkeypatch: pytest.MonkeyPatch, recipe: Path, tokens: int, spare: int = 0, layers: int = 1) -> None:
    """From now on there is as much as passes of so many tokens need, with so many checkpointed layers, and `spare`; a
    process of another size changes nothing."""
    monkeypatch.setattr(fit, "taken_memory", lambda _: TAKEN)
    read = load_recipe(recipe)
    on = open_session(read, lambda _: None)
    longest = load_data(read.data, on.base.tokenizer, on.base.context_length, 0, lambda _: None, False).longest(0)
    memory = replace(fit._memory(on.base, [read], 1, 0), longest=longest)
    more = memory.needed_bytes(tokens, layers) - TAKEN + loading.CHARGED_BYTES + spare
    monkeypatch.setattr(fit, "free_memory", lambda _: Free(more, CONTAINER))


def test_what_else_training_takes_is_planned_with(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, the optimizer's state, kernels: not the pass alone."""
    recipe = make_recipe(training=SHORT)
    monkeypatch.setattr("topwork.run.train.refuse_small_memory", lambda *_: None)
    short_of(monkeypatch, recipe, 2048, layers=0)
    assert f"tokens per pass: 2,048, from {CONTAINER}" in told(recipe)[1]
    short_of(monkeypatch, recipe, 2048, spare=-1, layers=0)
    assert f"tokens per pass: 1,024, from {CONTAINER}" in told(recipe, overwrite=True)[1]


def test_what_cannot_fit_is_refused_before_any_weight_is_read(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import topwork.run.train as module

    monkeypatch.setattr(module, "open_session", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(fit, "free_memory", lambda _: Free(9 * MB, CONTAINER))
    recipe = make_recipe(training=SHORT)
    with pytest.raises(RequestError, match=rf"takes at least \d+ MB, .* 9 MB of {CONTAINER} are free. .*4bit"):
        told(recipe)
    assert not recipe.with_suffix("").exists()


def test_a_base_that_does_not_fit_is_refused_without_advice_that_would_be_refused_too(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda _: Free(9, CONTAINER))
    for size in (None, 256):
        with pytest.raises(RequestError, match=r"lower what is needed: .*data.max_length\. TOPWORK_ANYWAY=1 [^.]*$"):
            told(make_recipe(training=SHORT | {"tokens_per_pass": size}))


def test_what_cannot_fit_is_tried_where_the_environment_says_so(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swap may hold it, which is not counted: weights that do not fit, and passes."""
    monkeypatch.setattr(fit, "free_memory", lambda _: Free(9, CONTAINER))
    monkeypatch.setenv("TOPWORK_ANYWAY", "1")
    run, said = told(make_recipe(training=SHORT))
    assert run.result["steps"] == 3
    assert re.search("^warning: training takes at least .* are free; tried all the same", said, re.MULTILINE)
    assert re.search("^warning: training with 256 tokens per pass .*; tried all the same", said, re.MULTILINE)


# Using a base


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no base fits, and none may be read."""
    monkeypatch.setattr(loading, "free_memory", lambda _: Free(90 * MB, CONTAINER))
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("weights were read"))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("arguments", [["eval", "RUN"], ["chat", "RUN", "Hello?"], ["serve", "RUN"]])
def test_a_base_that_does_not_fit_is_refused_before_it_is_read(
    trained: Path, topwork: Callable[..., Said], arguments: list[str]
) -> None:
    said = topwork(*(str(trained) if argument == "RUN" else argument for argument in arguments))
    assert said.code == 2, said.err
    last = said.err.splitlines()[-1]
    assert re.search(rf"error: holding .* takes about \d+ MB, and 90 MB of {CONTAINER} are free\. Give more", last), (
        last
    )
    assert "load_in_4bit: true" in last
    assert "TOPWORK_ANYWAY=1" in last


@pytest.mark.usefixtures("large")
def test_a_base_that_was_named_alone_is_refused_too(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"^holding {tiny_llama} takes"):
        quantize(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu"), tmp_path / "out", log=str)


def test_a_base_is_tried_where_the_environment_says_so(
    trained: Path, topwork: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda _: Free(9 * MB, CONTAINER))
    monkeypatch.setenv("TOPWORK_ANYWAY", "0")
    assert topwork("chat", trained, "Hello?").code == 2
    monkeypatch.setenv("TOPWORK_ANYWAY", "1")
    said = topwork("chat", trained, "Hello?")
    assert said.code == 0, said.err
    assert "warning: holding" in said.err + said.out


def test_what_a_base_takes_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B in 16 bits and in 4, from its config alone; with a base of a structure that nobody knows it goes on."""
    monkeypatch.setattr(loading, "load_base", lambda *_: "read")
    model, packed = ModelConfig(model_name_or_path="llama-3-8b", device="cpu"), QuantizationConfig(load_in_4bit=True)
    monkeypatch.setattr(loading, "free_memory", lambda _: Free(6 * 10**9))
    assert loading.open_base(model, str, packed) == "read"
    with pytest.raises(RequestError, match=r"^holding llama-3-8b takes about 16,0\d\d MB, and 6,000 MB are free\."):
        loading.open_base(model, str)
    with pytest.raises(RequestError, match=r"takes about 32,1\d\d MB"):
        loading.open_base(model.model_copy(update={"dtype": "float32"}), str)
    monkeypatch.setattr(loading, "free_memory", lambda _: Free(5 * 10**9))
    with pytest.raises(RequestError, match=r"a smaller base\. TOPWORK_ANYWAY"):
        loading.open_base(model, str, packed)
    assert loading.open_base(ModelConfig(model_name_or_path="./nowhere", device="cpu"), str) == "read"


def test_a_base_that_is_stored_packed_is_counted_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its use and for training over it."""
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = dict(shape_values("llama-3-8b")) | {"quantization_config": stored | {"bnb_4bit_use_double_quant": True}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr(loading, "load_base", lambda *_: "read")
    monkeypatch.setattr(loading, "free_memory", lambda _: Free(6 * 10**9))
    model = {"model_name_or_path": str(tmp_path), "device": "cpu"}
    assert loading.open_base(ModelConfig.model_validate(model), str) == "read"
    recipe = Recipe.model_validate({"model": model, "data": {"train": "rows.jsonl"}})
    packed = QuantizationConfig(load_in_4bit=True)
    assert setup_of([recipe], structure_named(recipe.model)).quantization == packed
    stored.pop("load_in_4bit")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stored}), "utf-8")
    assert not setup_of([recipe], structure_named(recipe.model)).quantization.active


def test_a_run_that_goes_on_with_less_memory(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its size as long as that fits, and leaves it, which is told, where it does not."""
    recipe = make_recipe(training=SHORT | {"max_steps": 2})
    told(recipe)
    assert "tokens per pass" not in told(recipe, resume=True)[1]
    monkeypatch.setattr("topwork.run.train.refuse_small_memory", lambda *_: None)
    short_of(monkeypatch, recipe, 512, layers=0)
    said = told(recipe, resume=True)[1]
    assert f"MB of {CONTAINER} are free: the run goes on with fewer" in said
    assert re.search(r"^tokens per pass: (256|512|1,024), from", said, re.MULTILINE)


def test_a_size_that_was_asked_for_and_does_not_fit_is_told(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training=SHORT | {"tokens_per_pass": 2048, "activation_checkpointing": "off"})
    short_of(monkeypatch, recipe, 1024, layers=0)
    said = told(recipe)[1]
    assert "warning: training with 2,048 tokens per pass takes about" in said


def asks_for_too_much(*_: Any, **__: Any) -> Any:
    """As torch fails on a CPU."""
    return torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("place", "told_as"),
    [
        ("topwork.run.train.load_data", "reading the rows; data.streaming"),
        ("topwork.models.auto.AutoModelForCausalLM.from_pretrained", "reading the base; quantization.load_in_4bit"),
        ("topwork.run.training.Trial", "training; .*adapter.r"),
    ],
)
def test_wherever_training_allocates(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, place: str, told_as: str
) -> None:
    monkeypatch.setattr(place, asks_for_too_much)
    with pytest.raises(RunError, match=f"^out of memory while {told_as}"):
        told(make_recipe(training=SHORT))


def test_a_shard_that_memory_does_not_hold_is_not_called_altered(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped(*_: Any, **__: Any) -> Any:
        raise SafetensorError("Error while opening: Cannot allocate memory (os error 12)")

    monkeypatch.setattr("topwork.models.shards.safe_open", mapped)
    with pytest.raises(RunError, match=r"^out of memory while reading the base;"):
        load_base(str(tiny_llama), quantization=QuantizationConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    ("verb", "place", "told_as"),
    [
        ("eval", "topwork.generation.engine.Engine", "writing answers; a smaller batch of answers"),
        (
            "eval",
            "topwork.evaluation.score.mean_answer_loss",
            "evaluating; a smaller evaluation.batch_size or evaluation.max_new_tokens in the run's",
        ),
        ("merge", "topwork.run.merging.plan._write", "merging; the check runs the whole model"),
        ("merge", "topwork.run.merging.check.measure", "preparing the merge; the check runs the whole model"),
        ("report", "topwork.run.report.report", "running this command; give more memory"),
    ],
)
def test_wherever_a_verb_allocates(
    trained: Path, topwork: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, place: str,
    told_as: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(place, asks_for_too_much)
    said = topwork(verb, trained, *([tmp_path / "merged"] if verb == "merge" else []))
    assert said.code == 1
    assert said.err.splitlines()[-1].startswith(f"error: out of memory while {told_as}")
    assert not (tmp_path / "merged").exists()


LIMITED = """
import os, resource
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("{field}")) * 1024
resource.setrlimit(resource.{limit}, (size + {more},) * 2)
"""


@pytest.mark.parametrize(("limit", "field", "option"), [("RLIMIT_AS", "VmSize", "-v"), ("RLIMIT_DATA", "VmData", "-d")])
def test_under_a_limit_of_the_process(
    make_recipe: Recipes, commands: Commands, limit: str, field: str, option: str
) -> None:
    """Too little by far is refused; where the plan is wrong, the allocation that really fails ends in a sentence."""
    recipe, tried = make_recipe(training=SHORT), make_recipe("tried", training=SHORT | {"tokens_per_pass": 300})
    how = {"limit": limit, "field": field}
    code, said = commands.run(["train", str(recipe)], before=LIMITED.format(more=5 * MB, **how))
    assert (code, f"(ulimit {option}) are free" in said) == (2, True), said
    code, said = commands.run(["train", str(tried)], before=LIMITED.format(more=50 * MB, **how))
    assert code == 1, said
    assert said.splitlines()[-1].startswith("error: out of memory"), said
    assert "DefaultCPUAllocator" not in said


def test_a_base_under_a_limit_of_the_process(trained: Path, commands: Commands) -> None:
    limit = LIMITED.format(more=5 * MB, limit="RLIMIT_AS", field="VmSize")
    code, said = commands.run(["eval", str(trained)], before=limit)
    assert (code, "error: holding" in said, "(ulimit -v) are free" in said) == (2, True, True), said


def test_in_a_container(make_recipe: Recipes, commands: Commands) -> None:
    """A real control group: what it may use is what is planned with, and too little of it is refused."""
    recipe, said = make_recipe(training=SHORT), {}
    for megabytes in (400, 140):
        try:
            with container(megabytes * MB) as group:
                join = f"open({str(group.folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
                said[megabytes] = commands.run(["train", str(recipe), "--overwrite"], before=join)
        except OSError as error:
            pytest.skip(f"no control group with a limit on memory can be made here: {error}")
    assert said[140][0] == 2
    assert "of the 140 MB that this container may use are free" in said[140][1]
    assert said[400][0] == 0, said[400][1]
    assert f"from {CONTAINER}" in said[400][1]
