"""`model.new_tokens`: trained, resumed, asked, merged, read by PEFT and transformers; and ids that have no row."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reference.families import alone, logits
from reference.measure import furthest, relative
from run import tiny
from run.fixtures import Said
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import load_adapter, read_adapter
from topwork.common.errors import AdapterError, DataError, RequestError, RunError
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.models.load import load_base
from topwork.ops.batch import batch_of
from topwork.plan.count import count_adapter
from topwork.recipe.recipe import load_recipe
from topwork.reporting.card_source import read_source
from topwork.reporting.card_use import uses
from topwork.run.compare import open_pair
from topwork.run.count import count
from topwork.run.evaluate import evaluate
from topwork.run.export import export
from topwork.run.given import given_adapter
from topwork.run.merge import merge
from topwork.run.opened import open_run
from topwork.run.plan import plan
from topwork.run.quantize import quantize
from topwork.run.train import train, train_together
from topwork.run.vocabulary import base_id, shared_base
from topwork.serving.config import ServeConfig
from topwork.serving.opening import open_service

NEW = ["<ticket>", "<urgent>", "<calm>"]
TIED = [False, True]


def silent(_: str) -> None:
    """Says nothing."""


def marked(count: int) -> list[dict[str, Any]]:
    """Tickets whose answers begin with new tokens."""
    rows = tiny.rows(count)
    for row in rows:
        answer = row["messages"][1]["content"]
        row["messages"][1]["content"] = f"<ticket>{'<urgent>' if 'true' in answer else '<calm>'}{answer}"
    return rows


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny base with head and embedding apart, and one with both tied."""
    place = tmp_path_factory.mktemp("new-tokens")
    return {tied: tiny.write_model(place / f"base-{tied}", tie_word_embeddings=tied) for tied in TIED}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows with new tokens in them."""
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "marked.jsonl", marked(40))


def values(base: Path, rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    training = {"learning_rate": 0.02, "max_steps": 4, "eval_steps": 2, **changes.pop("training", {})}
    model = {"new_tokens": NEW, "pad_to_multiple_of": 8, **changes.pop("model", {})}
    return tiny.recipe_values(base, rows, out, model=model, training=training, **changes)


@pytest.fixture(scope="module")
def runs(bases: dict[bool, Path], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A finished run over each base."""
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for tied, base in bases.items():
        recipe = tiny.write_recipe(place / f"{tied}.yaml", values(base, rows, place / f"run-{tied}"))
        made[tied] = train(recipe, log=silent).folder
    return made


def size_of(base: Path) -> int:
    return len(AutoTokenizer.from_pretrained(base))


def prompt(folder: Path) -> Tensor:
    return torch.tensor(AutoTokenizer.from_pretrained(folder)("<ticket><calm>Order 3: see you soon.")["input_ids"])


@pytest.mark.parametrize("tied", TIED)
def test_their_rows_are_trained_and_the_adapter_says_what_it_needs(
    tied: bool, bases: dict[bool, Path], runs: dict[bool, Path]
) -> None:
    adapter, rows = runs[tied] / "adapter", size_of(bases[tied])
    ids = [rows, rows + 1, rows + 2]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == (ids if tied else {"embed_tokens": ids, "lm_head": ids})
    own = json.loads((adapter / "topwork.json").read_text())
    assert own["new_tokens"] == NEW
    assert own["vocabulary_size"] == -(-(rows + 3) // 8) * 8
    bare = load_base(given_adapter(runs[tied]).recipe.model.model_copy(update={"new_tokens": []}), silent)  # type: ignore[union-attr]
    assert own["base_fingerprint"] == bare.fingerprint  # of the base as it is shipped
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = {key: tensor for key, tensor in tensors.items() if "trainable_tokens" in key}
    assert len(trained) == (1 if tied else 2)
    begun = bare.module.get_input_embeddings().weight.mean(0)
    for key, tensor in trained.items():
        assert tuple(tensor.shape) == (3, 32)
        if "embed_tokens" in key:
            assert (tensor - begun).abs().max() > 1e-3
    assert len(AutoTokenizer.from_pretrained(adapter)) == rows + 3
    assert json.loads((runs[tied] / "result.json").read_text())["eval_loss_after"] is not None


@pytest.mark.parametrize("tied", TIED)
def test_peft_and_transformers_read_it(tied: bool, bases: dict[bool, Path], runs: dict[bool, Path]) -> None:
    adapter = runs[tied] / "adapter"
    opened = open_run(runs[tied], log=silent)
    tokens = prompt(adapter)
    assert int(tokens.max()) >= size_of(bases[tied])
    ours = logits(opened.base, batch_of([tokens], "default"))[:, : size_of(bases[tied]) + 3]
    base = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    by_hand = PeftModel.from_pretrained(base, adapter).eval()
    by_itself = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()  # by its tokenizer
    for model in (by_hand, by_itself):
        with torch.no_grad():
            theirs = model(input_ids=tokens[None]).logits[0]
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("tied", "held"), [(False, {}), (True, {}), (True, {"load_in_4bit": True, "head": "nf4"})], ids=str
)
def test_merged_it_says_the_same(
    tied: bool, held: dict[str, Any], bases: dict[bool, Path], rows: Path, tmp_path: Path
) -> None:
    recipe = values(bases[tied], rows, tmp_path / "run", quantization=held, training={"max_steps": 2})
    run = train(tiny.write_recipe(tmp_path / "recipe.yaml", recipe), log=silent).folder
    found = merge(run, tmp_path / "out", log=silent, check=8)
    assert found["largest_relative_difference"] <= 1e-5
    assert found["base_fingerprint"] == read_adapter(run / "adapter").base.fingerprint
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == json.loads((run / "adapter" / "topwork.json").read_text())["vocabulary_size"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a<calm>b")[1] == "<calm>"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert theirs.config.tie_word_embeddings is tied
    tokens, opened = prompt(tmp_path / "out"), open_run(run, log=silent)
    with torch.no_grad():
        assert furthest(logits(opened.base, batch_of([tokens], "default")), alone(theirs, [tokens])) < 1e-4


def test_merged_by_its_folder_alone(bases: dict[bool, Path], runs: dict[bool, Path], tmp_path: Path) -> None:
    merge(runs[False], tmp_path / "run", check=0, log=silent)
    shutil.copytree(runs[False] / "adapter", tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "alone", model=str(bases[False]), check=4, log=silent)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_merged_it_is_quantized_and_exported(runs: dict[bool, Path], tmp_path: Path) -> None:
    merge(runs[True], tmp_path / "out", check=0, log=silent)
    model = given_adapter(runs[True]).model.model_copy(
        update={"model_name_or_path": str(tmp_path / "out"), "new_tokens": [], "pad_to_multiple_of": None}
    )
    quantize(model, tmp_path / "packed", log=silent)
    base = load_base(model.model_copy(update={"model_name_or_path": str(tmp_path / "packed")}), silent)
    assert base.tokenizer.convert_tokens_to_ids("<calm>") < base.vocabulary
    pytest.importorskip("gguf")
    done = export(runs[True], tmp_path / "gguf", "gguf", "f32", check=0, log=silent)
    assert (tmp_path / "gguf" / str(done.figures["file"])).is_file()


def test_its_card_grows_the_base_before_peft_reads_it(runs: dict[bool, Path]) -> None:
    block = uses(read_source(runs[False] / "adapter", runs[False], "owner/adapter", "owner/base"))[0].block
    grown = "base.resize_token_embeddings(len(AutoTokenizer.from_pretrained("
    assert block.index("base = ") < block.index(grown) < block.index("model = PeftModel")


def test_exported_for_peft(runs: dict[bool, Path], tmp_path: Path) -> None:
    for tied in TIED:
        done = export(runs[tied], tmp_path / str(tied), "peft", check=3, log=silent)
        assert {each.by.split()[0] for each in done.read_back} == {"Topwork", "PEFT"}
        assert read_adapter(tmp_path / str(tied)).base.new_tokens == tuple(NEW)


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    bases: dict[bool, Path], rows: Path, runs: dict[bool, Path], tmp_path: Path
) -> None:
    recipe = load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", values(bases[False], rows, tmp_path / "run")))
    train_together([recipe], log=silent, stop_at=2)
    train_together([recipe], resume=True, log=silent)
    assert tiny.folder_bytes(tmp_path / "run" / "adapter") == tiny.folder_bytes(runs[False] / "adapter")
    written = tmp_path / "run" / "recipe.yaml"
    assert load_recipe(written).model.new_tokens == NEW
    train(written, overwrite=True, log=silent)  # the recipe that names the ids already
    assert tiny.folder_bytes(tmp_path / "run" / "adapter") == tiny.folder_bytes(runs[False] / "adapter")


def test_it_is_asked_with_its_tokens(topwork: Callable[..., Said], runs: dict[bool, Path]) -> None:
    scores = evaluate(runs[True], log=silent)
    assert scores["after"]["loss"] < scores["before"]["loss"]
    said = topwork("chat", runs[False], "Order 3: my lamp leaks.", "--max-new-tokens", 3)
    assert said.code == 0, said.err


def test_two_adapters_over_one_grown_base(
    bases: dict[bool, Path], runs: dict[bool, Path], trained: Path, tiny_llama: Path
) -> None:
    """One that knows the new tokens beside one that does not, in one batch and in one generation."""
    opened = open_run(runs[False], log=silent)
    base, adapters = opened.base, opened.adapters
    plain = read_adapter(trained / "adapter")
    load_adapter(adapters, "plain", plain, base_id(base), force=True)
    tokens, rows = prompt(runs[False] / "adapter"), size_of(bases[False])
    batch = batch_of([tokens, tokens])
    segments = tuple(type(batch.segments[0])(s * len(tokens), (s + 1) * len(tokens), name)
                     for s, name in enumerate(("default", "plain")))  # fmt: skip
    together = logits(base, type(batch)(batch.tokens, batch.positions, batch.cu_seqlens, segments))
    for name, found in zip(("default", "plain"), together.split(len(tokens))):
        assert relative(found, logits(base, batch_of([tokens], name))) < 1e-5
    prompts = [tokens.tolist(), tokens.tolist(), [5, 9, 11]]
    names, few = ["default", "plain", None], Sampling(max_new_tokens=4)
    said = generate(base, prompts, names, frozenset(), few)
    assert [generate(base, [one], [name], frozenset(), few)[0] for one, name in zip(prompts, names)] == said
    ungrown = load_base(opened.recipe.model.model_copy(update={"new_tokens": [], "pad_to_multiple_of": None}), silent)
    text = tokens[tokens < rows]
    bare = logits(ungrown, batch_of([text]))
    assert relative(logits(base, batch_of([text]))[:, :rows], bare) < 1e-6


@pytest.mark.parametrize("tied", TIED)
def test_counts_and_plans_know_the_rows(
    tied: bool, bases: dict[bool, Path], rows: Path, runs: dict[bool, Path], tmp_path: Path
) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values(bases[tied], rows, tmp_path / "run"))
    result = json.loads((runs[tied] / "result.json").read_text())["parameters"]
    own = count(str(recipe)).own
    assert own is not None
    assert (own.trainable, own.frozen) == (result["trainable"], result["frozen"])
    found = plan(recipe)
    assert count_adapter(found.job.structure, found.job.recipes[0].adapter).trainable == result["trainable"]
    assert found.tokens is not None
    with_tokens = found.tokens.tokens
    less = plan(recipe, ["model.new_tokens=[]", "model.pad_to_multiple_of=null"])
    assert less.tokens is not None
    assert less.tokens.tokens > with_tokens  # each is one token, and not its letters


def test_planning_them_needs_no_torch(bases: dict[bool, Path], rows: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", values(bases[False], rows, tmp_path / "run"))
    asked = "import sys; from topwork.run import count, plan; plan.plan(sys.argv[1]); count.count(sys.argv[1])"
    program = f"{asked}; sys.exit(len({{'torch', 'transformers', 'datasets'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program, str(recipe)], check=False).returncode == 0


def test_an_adapter_begins_from_one_with_new_tokens(
    bases: dict[bool, Path], rows: Path, runs: dict[bool, Path], tmp_path: Path
) -> None:
    for place in (runs[False], runs[False] / "adapter"):
        base = {"model_name_or_path": str(bases[False]), "dtype": "float32", "device": "cpu"}
        out = tmp_path / place.name
        recipe = tiny.recipe_values(bases[False], rows, out, model=base, training={"max_steps": 1})
        recipe["adapter"] = {"init_from": str(place)}
        run = train(tiny.write_recipe(tmp_path / f"{place.name}.yaml", recipe), log=silent).folder
        assert read_adapter(run / "adapter").base.new_tokens == tuple(NEW)


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_beyond_the_embedding_are_told_before_training(
    streaming: bool, bases: dict[bool, Path], rows: Path, tmp_path: Path
) -> None:
    """A base whose tokenizer got tokens, and its weights did not."""
    base, size = tmp_path / "base", size_of(bases[False])
    shutil.copytree(bases[False], base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(base)
    recipe = values(base, rows, tmp_path / "run", model={"new_tokens": [], "pad_to_multiple_of": None})
    recipe["data"] |= {"streaming": streaming, "eval_fraction": 0.0, "max_length": 256}
    told = rf"has token {size} \('<ticket>'\), and .* has rows for {size:,} tokens, .* up to {size + 2}\. Give the base"
    with pytest.raises(RunError if streaming else DataError, match=told):
        train(tiny.write_recipe(tmp_path / "recipe.yaml", recipe), log=silent)
    if not streaming:
        assert not (tmp_path / "run").exists()
    recipe["model"]["new_tokens"], recipe["training"]["max_steps"] = NEW, 1
    run = train(tiny.write_recipe(tmp_path / "grown.yaml", recipe), log=silent, overwrite=streaming).folder
    assert read_adapter(run / "adapter").base.vocabulary_size == size + 3
    if streaming:
        return
    plain = tiny.write_rows(tmp_path / "plain.jsonl", tiny.rows(20))
    unused = values(base, plain, tmp_path / "unused", training={"max_steps": 1})
    unused["model"] |= {"new_tokens": [], "pad_to_multiple_of": None}
    train(tiny.write_recipe(tmp_path / "unused.yaml", unused), log=silent)  # a token that no row has needs no row


def test_methods_without_rows_are_refused_before_anything(bases: dict[bool, Path], rows: Path, tmp_path: Path) -> None:
    recipe = values(bases[False], rows, tmp_path / "run")
    recipe["adapter"] = {"method": "ia3"}
    with pytest.raises(RequestError, match=r"method ia3 trains no rows of model.embed_tokens and lm_head"):
        train(tiny.write_recipe(tmp_path / "recipe.yaml", recipe), log=silent)
    assert not (tmp_path / "run").exists()


def test_whole_modules_train_new_rows_too(bases: dict[bool, Path], rows: Path, tmp_path: Path) -> None:
    recipe = values(bases[False], rows, tmp_path / "run", training={"max_steps": 1})
    recipe["adapter"]["modules_to_save"] = ["embed_tokens", "lm_head"]
    run = train(tiny.write_recipe(tmp_path / "recipe.yaml", recipe), log=silent).folder
    assert read_adapter(run / "adapter").config.trainable_token_indices is None  # type: ignore[attr-defined]


GROWN: dict[str, dict[str, Any]] = {
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole modules, tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "nothing": {},
    "trained tokens": {"trainable_token_indices": [0, 1, 2]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [0, 1, 2], "lm_head": [0, 1, 2]}},
}


@pytest.mark.parametrize("case", GROWN)
@pytest.mark.parametrize("tied", TIED)
def test_what_peft_trained_on_a_grown_base(
    tied: bool, case: str, bases: dict[bool, Path], tmp_path: Path
) -> None:  # fmt: skip
    """resize_token_embeddings, and the tokenizer beside the adapter: the base grows by itself."""
    size = size_of(bases[tied])
    options: dict[str, Any] = dict(GROWN[case])
    if (indices := options.get("trainable_token_indices")) is not None:
        grown = [size + number for number in range(3)]
        options["trainable_token_indices"] = grown if isinstance(indices, list) else dict.fromkeys(indices, grown)
    theirs = AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)
    theirs.resize_token_embeddings(size + 3)
    model = get_peft_model(theirs, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)  # with the grown embedding and head, which nobody named
    tokenizer = AutoTokenizer.from_pretrained(bases[tied])
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(adapter)
    given = given_adapter(adapter, str(bases[tied]), log=silent)
    assert given.model.vocabulary_size == size + 3
    base = load_base(given.model, silent)
    adapters = Adapters(base.module)
    load_adapter(adapters, "a", given.saved, base_id(base))
    tokens = prompt(adapter)
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0]
    found = logits(base, batch_of([tokens], "a"))
    assert relative(found, expected) < 1e-5
    merge(adapter, tmp_path / "out", model=str(bases[tied]), check=0, log=silent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert relative(alone(merged, [tokens]).detach(), expected) < 1e-4


def test_on_a_base_that_did_not_grow_both_sizes_are_told(bases: dict[bool, Path], runs: dict[bool, Path]) -> None:
    model = given_adapter(runs[False]).recipe.model  # type: ignore[union-attr]
    base = load_base(model.model_copy(update={"new_tokens": [], "pad_to_multiple_of": None}), silent)
    rows = base.vocabulary
    with pytest.raises(AdapterError, match=rf"has \[{rows}, .*; the base has 0 to {rows - 1}.*size: {rows + 3}"):
        load_adapter(Adapters(base.module), "a", read_adapter(runs[False] / "adapter"), base_id(base))
    other = load_base(model.model_copy(update={"new_tokens": ["<other>"]}), silent)
    with pytest.raises(
        AdapterError, match=r"was trained with the new tokens '<ticket>', .*and this base has '<other>'"
    ):
        load_adapter(Adapters(other.module), "a", read_adapter(runs[False] / "adapter"), base_id(other))


def test_two_of_a_base_are_compared(runs: dict[bool, Path], tmp_path: Path) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(runs[True] / "adapter", copied)
    pair = open_pair((str(copied), "base"), model=given_adapter(runs[True]).model.model_name_or_path, log=silent)
    assert pair.base.new_tokens == tuple(NEW)


def test_new_tokens_of_several_adapters() -> None:
    def base(*tokens: str, **more: Any) -> Any:
        return given(new_tokens=list(tokens), **more)

    from topwork.models.config import ModelConfig

    def given(**options: Any) -> ModelConfig:
        return ModelConfig(model_name_or_path="x", **options)

    found = shared_base([base(), base("a", "b"), base("a", vocabulary_size=9)])
    assert (found.new_tokens, found.vocabulary_size) == (["a", "b"], 9)
    with pytest.raises(RequestError, match="has the new tokens 'a', another 'b'"):
        shared_base([base("a"), base("b")])


def test_a_server_grows_its_base_for_the_adapters_it_is_given(bases: dict[bool, Path], runs: dict[bool, Path]) -> None:
    config = ServeConfig.model_validate({
        "model": {"model_name_or_path": str(bases[True]), "dtype": "float32", "device": "cpu"},
        "adapters": {"tickets": str(runs[True])},
    })  # fmt: skip
    opened = open_service(config, silent)
    try:
        assert opened.service.backend.base.new_tokens == tuple(NEW)  # type: ignore[attr-defined]
    finally:
        opened.close()
