"""QLoRA runs: what they train, what they leave alone, and that everything after training works on them."""

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from reference.measure import apart_by_rounding, furthest, relative
from reference.padded import padded
from reference.padded import train as train_padded
from reference.quantized_by_others import differing, load_theirs, their_layers, write_base
from run import tiny
from run.fixtures import Said
from run.processes import Commands, signal_at
from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PREFIX
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.common.errors import AdapterError, RequestError
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.objectives.sft import Sft
from topwork.ops.batch import Batch, Labels, batch_of
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_modules
from topwork.run import session
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import given_adapter
from topwork.run.merge import merge
from topwork.run.merging.inputs import merge_inputs
from topwork.run.opened import open_run
from topwork.run.quantize import quantize
from topwork.run.train import train
from topwork.training.step import Learner, StepResult, train_step

NF4 = {"load_in_4bit": True}
INT8 = {"load_in_8bit": True}
ALONE = {"lora_dropout": 0.0}
LEARNING = {"learning_rate": 0.01, "max_steps": 20, "eval_steps": 10, "lr_scheduler_type": "constant"}
SHORT = {"learning_rate": 0.05, "max_steps": 4, "eval_steps": 4}
PEFTS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def silent(_: str) -> None:
    """A report that nobody reads."""


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tied llama whose rows are whole blocks of 64, with a context for the tickets."""
    return write_base(
        tmp_path_factory.mktemp("wide") / "base", "llama", intermediate_size=128, max_position_embeddings=tiny.CONTEXT,
        tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def packed_folder(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, as `topwork quantize` writes it."""
    config = ModelConfig(model_name_or_path=str(wide), dtype="float32", device="cpu")
    return Path(quantize(config, tmp_path_factory.mktemp("packed") / "out", log=silent).folder)


@pytest.fixture
def recipe(wide: Path, tickets: Path, tmp_path: Path) -> Callable[..., Path]:
    """recipe("name", base=..., quantization=..., training=..., …): a file."""

    def make(name: str = "run", base: Path = wide, quantization: dict[str, Any] | None = None, **changes: Any) -> Path:
        changes = {"adapter": ALONE, "training": LEARNING} | changes
        values = tiny.recipe_values(base, tickets, tmp_path / name, **changes)
        return tiny.write_recipe(tmp_path / f"{name}.yaml", values | {"quantization": quantization or {}})

    return make


@pytest.fixture(scope="module")
def run_of(wide: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """run_of(quantization, base): the folder of a short finished run, made once."""
    made: dict[str, Path] = {}

    def folder_of(quantization: dict[str, Any], base: Path = wide, dtype: str = "float32", **changes: Any) -> Path:
        name = json.dumps([quantization, str(base), dtype, changes])
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            changes = {"adapter": ALONE, "training": SHORT} | changes
            values = tiny.recipe_values(base, tickets, folder / "run", **changes) | {"quantization": quantization}
            values["model"]["dtype"] = dtype
            made[name] = train(tiny.write_recipe(folder / "recipe.yaml", values), log=silent).folder
        return made[name]

    return folder_of


def read(folder: Path, dtype: str = "float32", **options: Any) -> Base:
    config = ModelConfig.model_validate({"model_name_or_path": str(folder), "dtype": dtype, "device": "cpu"})
    return load_base(config, silent, QuantizationConfig(**options))


def tokens_of(vocabulary: int = 300) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in (19, 6, 40)]


def our_logits(base: Base, adapter: str | None) -> Tensor:
    batch = batch_of(tokens_of(), adapter)
    with torch.no_grad():
        return base.logits(batch, torch.arange(len(batch.tokens)))


def plain_logits(model: torch.nn.Module, parts: Sequence[Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts or tokens_of()])


# Training


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "a packed checkpoint"])
def test_the_loss_falls_and_nothing_but_the_adapter_moves(
    kind: str, recipe: Callable[..., Path], packed_folder: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantization = {
        "nf4": NF4, "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"}, "int8": INT8, "a packed checkpoint": {},
    }[kind]  # fmt: skip
    folder = wide if quantization else packed_folder
    bases: list[Base] = []

    def kept(*arguments: Any) -> Base:
        bases.append(load_base(*arguments))
        return bases[-1]

    monkeypatch.setattr(session, "load_base", kept)
    run = train(recipe(base=folder, quantization=quantization), log=silent)
    assert run.result["eval_loss_after"] < run.result["eval_loss_before"] - 0.2
    (base,) = bases
    trained = [name for name, parameter in base.module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 14
    assert all(".adapters." in name for name in trained)
    fresh = read(folder, **quantization)
    packed = {path.replace(".base_layer", ""): m.packed for path, m in packed_modules(base.module).items()}
    assert len(packed) == 14
    for path, module in packed_modules(fresh.module).items():
        assert differing(packed[path], module.packed) == []
    for name, parameter in fresh.module.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(base.module.get_parameter(name), parameter), name


def test_loftq_begins_as_what_quantizing_lost(recipe: Callable[..., Path], wide: Path) -> None:
    r, scaling = 4, 0.5
    adapter = {
        **ALONE, "r": r, "lora_alpha": r * scaling, "init_lora_weights": "loftq", "target_modules": ["q_proj"],
    }  # fmt: skip
    still = {"learning_rate": 1e-12, "max_steps": 1, "eval_steps": 1, "warmup_steps": 0}
    run = train(recipe(quantization=NF4, adapter=adapter, training=still), log=silent)
    found = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    dense, quantized = read(wide).module, read(wide, **NF4).module
    for path, layer in packed_modules(quantized).items():
        if path.endswith("q_proj"):
            a, b = (found[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            u, s, v = torch.linalg.svd(dense.get_submodule(path).weight.detach() - layer.packed.dense())
            assert relative(scaling * b @ a, (u[:, :r] * s[:r]) @ v[:r]) < 1e-4
    with pytest.raises(RequestError, match="began with LoftQ"):  # it would add what quantizing lost to the whole weight
        merge(run.folder, run.folder.with_name("merged"), base="16bit", check=0, log=silent)


def test_the_figures_of_a_run(run_of: Callable[..., Path]) -> None:
    dense, quantized = (json.loads((run_of(q) / "result.json").read_text()) for q in ({}, NF4))
    assert quantized["parameters"] == dense["parameters"]
    assert quantized["base_weights_bytes"] < 0.75 * dense["base_weights_bytes"]
    assert quantized["first_loss"] != dense["first_loss"]
    provenance = json.loads((run_of(NF4) / "provenance.json").read_text())
    assert (
        provenance["base"]["fingerprint"]
        == json.loads((run_of({}) / "provenance.json").read_text())["base"]["fingerprint"]
    )
    assert "nf4" in json.dumps(provenance["base"])
    assert "load_in_4bit: true" in (run_of(NF4) / "recipe.yaml").read_text()


def test_two_runs_give_the_same_bytes(recipe: Callable[..., Path]) -> None:
    training = {**LEARNING, "max_steps": 5}
    first, second = (train(recipe(name, quantization=NF4, training=training), log=silent) for name in ("a", "b"))
    assert tiny.folder_bytes(first.folder / "adapter") == tiny.folder_bytes(second.folder / "adapter")


def test_killed_and_resumed_it_ends_with_the_same_bytes(
    commands: Commands, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 12, "save_steps": 2}
    unbroken = recipe("unbroken", quantization=NF4, adapter={}, training=training)
    code, said = commands.run(["train", str(unbroken)])
    assert code == 0, said
    broken = recipe("broken", quantization=NF4, adapter={}, training=training)
    code, said = commands.run(["train", str(broken)], signal_at(tmp_path / "broken", 5, signal.SIGKILL))
    assert code == -signal.SIGKILL, said
    code, said = commands.run(["train", str(broken), "--resume"])
    assert code == 0, said
    assert "going on from" in said
    assert tiny.folder_bytes(tmp_path / "broken" / "adapter") == tiny.folder_bytes(tmp_path / "unbroken" / "adapter")


@pytest.mark.parametrize("other", [{}, INT8, {**NF4, "block_size": 128}, {**NF4, "head": "int8"}])
def test_resumed_with_another_quantization_it_is_refused(other: dict[str, Any], recipe: Callable[..., Path]) -> None:
    training = {**LEARNING, "max_steps": 4, "save_steps": 2}
    run = train(recipe(quantization=NF4, training=training), log=silent)
    before = tiny.folder_bytes(run.folder)
    with pytest.raises(RequestError, match=r"begun with another recipe \(quantization\."):
        train(recipe(quantization=other, training=training), resume=True, log=silent)
    assert tiny.folder_bytes(run.folder) == before


def test_resumed_on_a_base_that_was_packed_meanwhile(
    recipe: Callable[..., Path], packed_folder: Path, tmp_path: Path
) -> None:
    """The same base by its fingerprint, but other numbers."""
    training = {**LEARNING, "max_steps": 4, "save_steps": 2}
    run = train(recipe(training=training), log=silent)
    before = tiny.folder_bytes(run.folder)
    with pytest.raises(RequestError, match=r"another base|in other bits"):
        train(recipe(base=packed_folder, training=training), resume=True, log=silent)
    assert tiny.folder_bytes(run.folder) == before


# PEFT on a base that bitsandbytes holds


def peft_model(base: Path, adapter: Path, **options: Any) -> PeftModel:
    model = PeftModel.from_pretrained(load_theirs(base, **options), str(adapter))
    for layer in their_layers(model).values():
        layer.train()
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_peft_reads_the_adapter_onto_bitsandbytes_base(
    kind: str, run_of: Callable[..., Path], wide: Path, tmp_path: Path
) -> None:
    options = {"nf4": PEFTS, "int8": INT8}[kind]
    run = run_of({"nf4": NF4, "int8": INT8}[kind])
    theirs = peft_model(wide, run / "adapter", **options)
    opened = open_run(run, log=silent)
    found, expected = our_logits(opened.base, ADAPTER_NAME), plain_logits(theirs)
    assert relative(found, our_logits(opened.base, None)) > 1e-2
    merge(run, tmp_path / "out", log=silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert furthest(found, expected) <= apart_by_rounding(merged, plain_logits)


def learned(sequences: list[Tensor], prompts: list[int], adapter: str) -> Batch:
    batch = batch_of(sequences, adapter)
    targets = torch.cat([torch.arange(a + p, b) for a, b, p in zip(batch.cu_seqlens, batch.cu_seqlens[1:], prompts)])
    return replace(batch, labels=Labels(targets - 1, batch.tokens[targets], torch.ones(len(targets))))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_ten_steps_are_pefts_ten_steps_and_its_adapter_loads_here(kind: str, wide: Path, tmp_path: Path) -> None:
    ours, theirs = ({"nf4": NF4, "int8": INT8}[kind], {"nf4": PEFTS, "int8": INT8}[kind])
    base = read(wide, **ours)
    adapters = Adapters(base.module)
    adapters.add("mine", AdapterConfig(r=4, lora_alpha=8), seed=5)
    write_adapter(tmp_path / "start", adapters, "mine", BaseId(base.name))
    peft = PeftModel.from_pretrained(load_theirs(wide, **theirs), tmp_path / "start", is_trainable=True).train()
    generator = torch.Generator().manual_seed(3)
    rows = [
        ([torch.randint(3, 300, (9 + (5 * step + 7 * row) % 30,), generator=generator) for row in range(4)], [3] * 4)
        for step in range(10)
    ]
    expected = train_padded(peft, [padded(*row) for row in rows], [1e-2] * 10, 0.5)
    parameters = adapters.parameters("mine")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    learner = Learner("mine", Sft(), list(parameters.values()), optimizer, 0.5)
    results = [train_step(base, [learner], [learned(*row, "mine")])[0] for row in rows]
    losses = [result.loss for result in results if isinstance(result, StepResult)]
    assert losses == pytest.approx(expected, rel=1e-5, abs=0)
    final = get_peft_model_state_dict(peft)
    for key, parameter in parameters.items():
        assert furthest(final[PREFIX + key], parameter) <= 1e-4, key

    peft.save_pretrained(str(tmp_path / "theirs"))
    fresh = read(wide, **ours)
    load_adapter(
        Adapters(fresh.module), "theirs", read_adapter(tmp_path / "theirs"), BaseId(fresh.name, fresh.fingerprint)
    )
    peft.eval()
    for layer in their_layers(peft).values():
        layer.train()
    logits = plain_logits(peft)
    torch.testing.assert_close(our_logits(fresh, "theirs"), logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


def test_a_peft_adapter_made_without_us_loads(wide: Path, tmp_path: Path) -> None:
    """Their own start and their own names, as prepare_model_for_kbit_training leaves them."""
    from peft import prepare_model_for_kbit_training

    theirs = load_theirs(wide, **PEFTS)
    model = get_peft_model(
        prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False),
        LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(tmp_path / "theirs"))
    for layer in their_layers(model).values():
        layer.train()
    base = read(wide, **NF4)
    load_adapter(
        Adapters(base.module), "theirs", read_adapter(tmp_path / "theirs"), BaseId(base.name, base.fingerprint)
    )
    expected = plain_logits(model)
    torch.testing.assert_close(our_logits(base, "theirs"), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_an_adapter_fits_every_reading_of_its_base(
    run_of: Callable[..., Path], wide: Path, packed_folder: Path, tmp_path: Path
) -> None:
    readings = [read(wide), read(wide, **NF4), read(wide, "bfloat16", **INT8), read(packed_folder)]
    assert len({base.fingerprint for base in readings}) == 1
    for run in (run_of({}), run_of(NF4), run_of({}, packed_folder)):
        saved = read_adapter(run / "adapter")
        assert saved.base.fingerprint == readings[0].fingerprint
        for base in readings:
            adapters = Adapters(base.module)
            assert load_adapter(adapters, "a", saved, BaseId(base.name, base.fingerprint)) is None
            adapters.remove("a")
    other = read(write_base(tmp_path / "other", "llama", intermediate_size=128, initializer_range=0.1), **NF4)
    with pytest.raises(AdapterError, match="their weights differ"):
        load_adapter(Adapters(other.module), "a", saved, BaseId(other.name, other.fingerprint))


# The commands on a finished run


@pytest.mark.parametrize("kind", ["nf4", "int8 with an int8 head", "a packed checkpoint"])
def test_the_commands_work_on_it(
    kind: str, topwork: Callable[..., Said], run_of: Callable[..., Path], packed_folder: Path, tmp_path: Path
) -> None:
    run = {
        "nf4": lambda: run_of(NF4), "int8 with an int8 head": lambda: run_of({**INT8, "head": "int8"}),
        "a packed checkpoint": lambda: run_of({}, packed_folder),
    }[kind]()  # fmt: skip
    scored = topwork("eval", run, "--max-rows", 2, "--json")
    assert scored.code == 0, scored.err
    before, after = (json.loads(scored.out)[arm]["loss"] for arm in ("before", "after"))
    assert 0.0 < after != before > 0.0
    said = topwork("chat", run, "Order 3: my lamp hums.", "--compare", "--max-new-tokens", 4)
    assert said.code == 0, said.err
    pytest.importorskip("matplotlib", reason="the report's curves need matplotlib")
    written = topwork("report", run)
    assert written.code == 0, written.err
    assert (run / "report" / "index.html").stat().st_size > 10_000


def test_count_says_the_true_totals(topwork: Callable[..., Said], recipe: Callable[..., Path], wide: Path,
                                    packed_folder: Path, run_of: Callable[..., Path]) -> None:  # fmt: skip
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(wide).parameters())
    for folder, quantization in ((wide, {}), (wide, NF4), (packed_folder, {})):
        counted = json.loads(topwork("count", recipe(base=folder, quantization=quantization), "--json").out)
        assert counted["total"] == counted["own"]["frozen"] == expected
        assert (
            counted["own"]["trainable"]
            == json.loads((run_of(NF4) / "result.json").read_text())["parameters"]["trainable"]
        )
    assert json.loads((run_of(NF4) / "result.json").read_text())["parameters"]["frozen"] == expected
    head = json.loads((run_of({**NF4, "head": "nf4"}) / "result.json").read_text())["parameters"]
    assert head["frozen"] == expected  # the tied embedding once


# Merging


@pytest.mark.parametrize(
    "quantization", [NF4, {**NF4, "bnb_4bit_quant_type": "fp4", "block_size": 32}, INT8], ids=["nf4", "fp4", "int8"]
)
def test_merged_onto_the_dequantized_weights_it_answers_as_the_run_does(
    quantization: dict[str, Any], run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of(quantization)
    told: list[str] = []
    verified = merge(run, tmp_path / "out", log=told.append)
    assert any("dequantized" in line for line in told)
    opened = open_run(run, log=silent)
    assert_plain(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = our_logits(opened.base, ADAPTER_NAME)
    assert furthest(plain_logits(merged), expected) <= apart_by_rounding(merged, plain_logits)
    checked = [torch.tensor(tokens) for tokens in merge_inputs(given_adapter(run), 100, None, silent).sequences]
    limit = apart_by_rounding(merged, lambda model: plain_logits(model, checked), draws=2)
    assert 0 < verified["largest_logit_difference"] <= limit


def assert_plain(folder: Path) -> None:
    """Nothing in it asks for bitsandbytes."""
    text = (folder / "config.json").read_text()
    assert "quant" not in text
    assert "bnb" not in text
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert tensor.is_floating_point(), key


def test_merged_onto_the_16_bit_base(run_of: Callable[..., Path], wide: Path, tmp_path: Path) -> None:
    run = run_of(NF4)
    merge(run, tmp_path / "out", base="16bit", log=silent)
    merge(run, tmp_path / "own", base="dequantized", log=silent)
    assert_plain(tmp_path / "out")
    tensors = read_adapter(run / "adapter").tensors
    original = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    merged, own = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("out", "own")
    )
    path = "model.layers.0.mlp.down_proj"
    delta = 2.0 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]  # alpha / r
    torch.testing.assert_close(merged.get_parameter(f"{path}.weight"), original.get_parameter(f"{path}.weight") + delta)
    assert relative(own.get_parameter(f"{path}.weight"), merged.get_parameter(f"{path}.weight")) > 1e-3


def test_merging_onto_nothing_that_is_there(topwork: Callable[..., Said], run_of: Callable[..., Path],
                                            packed_folder: Path, tmp_path: Path) -> None:  # fmt: skip
    said = topwork("merge", run_of(NF4), tmp_path / "out", "--base", "8bit")
    assert said.code == 2
    assert "--base 8bit: expected auto, 16bit or dequantized" in said.err
    said = topwork("merge", run_of({}, packed_folder), tmp_path / "out", "--base", "16bit")
    assert said.code == 2
    assert "is a quantized checkpoint" in said.err
    assert not (tmp_path / "out").exists()


def test_a_run_on_a_packed_checkpoint_is_merged(
    run_of: Callable[..., Path], packed_folder: Path, tmp_path: Path
) -> None:
    run = run_of({}, packed_folder)
    merge(run, tmp_path / "out", log=silent)
    assert_plain(tmp_path / "out")
    expected = our_logits(open_run(run, log=silent).base, ADAPTER_NAME)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert furthest(plain_logits(merged), expected) <= apart_by_rounding(merged, plain_logits)


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_a_quantized_tied_head_is_tied_again(head: str, run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of({**NF4, "head": head})
    merge(run, tmp_path / "out", log=silent)
    assert_plain(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = our_logits(open_run(run, log=silent).base, ADAPTER_NAME)
    assert furthest(plain_logits(merged), expected) <= apart_by_rounding(merged, plain_logits)


def test_an_adapted_quantized_head_is_untied(run_of: Callable[..., Path], tmp_path: Path) -> None:
    adapter = {**ALONE, "target_modules": ["v_proj", "lm_head"]}
    run = run_of({**NF4, "head": "int8"}, adapter=adapter)
    merge(run, tmp_path / "out", log=silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings
    expected = our_logits(open_run(run, log=silent).base, ADAPTER_NAME)
    assert furthest(plain_logits(merged), expected) <= apart_by_rounding(merged, plain_logits)


def test_a_conv1d_base_is_merged(run_of: Callable[..., Path], tmp_path: Path) -> None:
    base = write_base(tmp_path / "gpt2", "gpt2", n_inner=128, n_positions=tiny.CONTEXT)
    run = run_of(NF4, base)
    merge(run, tmp_path / "out", log=silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = our_logits(open_run(run, log=silent).base, ADAPTER_NAME)
    assert furthest(plain_logits(merged), expected) <= apart_by_rounding(merged, plain_logits)


@pytest.mark.parametrize(("trained", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_merged_in_another_type_the_weights_are_those_of_training(
    trained: str, asked: str, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Packed anew from another type, they would have other codes; rotary tables stay in fp32."""
    run = run_of(NF4, dtype=trained)
    opened = open_run(run, asked, log=silent)
    known = packed_modules(read(Path(opened.recipe.model.model_name_or_path), trained, **NF4).module)
    for path, module in packed_modules(opened.base.module).items():
        assert differing(module.packed, known[path.removesuffix(".base_layer")].packed) == []
    assert opened.base.module.dtype == getattr(torch, asked)
    assert opened.base.module.model.rotary_emb.inv_freq.dtype == torch.float32
    merge(run, tmp_path / "out", dtype=asked, log=silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == getattr(torch, asked)
    expected = our_logits(open_run(run, log=silent).base, ADAPTER_NAME)
    assert relative(plain_logits(merged), expected) < 3e-2
