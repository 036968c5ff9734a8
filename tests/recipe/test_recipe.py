"""Recipes: strict, typed, documented, read without torch; and each error names what was meant."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from topwork.adapters.config import CONFIGS, AdapterConfig, Ia3Config, LoraConfig
from topwork.common.errors import AdapterError, RecipeError
from topwork.recipe.recipe import (
    PEERS_NAMES,
    Recipe,
    all_keys,
    load_recipe,
    make_recipe,
    options_at,
    recipe_yaml,
)

MINIMAL = "model:\n  model_name_or_path: some/model\ndata:\n  train: rows.jsonl\n"


@pytest.fixture
def written(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_recipe_is_read_and_written_back(written) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(written(MINIMAL + "adapter:\n  r: 8\n  target_modules: [q_proj, v_proj]\n"))
    assert (recipe.adapter.r, recipe.adapter.target_modules) == (8, ["q_proj", "v_proj"])
    assert recipe.training.learning_rate == 2e-4
    assert make_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        ("adapter", "lora_alhpa", "unknown key 'adapter.lora_alhpa'; did you mean 'lora_alpha'?"),
        ("training", "learning_rat", "did you mean 'learning_rate'?"),
        ("training", "train_on", "it belongs at 'data.train_on'"),
        ("adapter", "learning_rate", "it belongs at 'training.learning_rate'"),
        ("data", "r", "it belongs at 'adapter.r'"),
        ("adapter", "lora_r", "here it is adapter.r"),
        ("training", "lr", "here it is training.learning_rate"),
        ("data", "packing", "a batch never has padding here"),
        ("training", "zzzzzz", "known here: activation_checkpointing, adam_beta1, "),
    ],
)
def test_an_unknown_key_is_told_where_it_is_known(written, section: str, key: str, told: str) -> None:  # type: ignore[no-untyped-def]
    values = yaml.safe_load(MINIMAL)
    values.setdefault(section, {})[key] = 1
    assert told in refusal(written(yaml.safe_dump(values)))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("adaptor", "did you mean 'adapter'?"),
        ("lora_alpha", "'adapter.lora_alpha'"),
        ("base_model", "here it is model."),
    ],
)
def test_an_unknown_section_too(written, key: str, told: str) -> None:  # type: ignore[no-untyped-def]
    assert told in refusal(written(f"{MINIMAL}{key}: 1\n"))


def test_every_name_of_a_peer_leads_to_a_key_that_exists() -> None:
    known = {*all_keys(), "nothing", "nothing yet", "the command line's --resume"}
    for name, here in PEERS_NAMES.items():
        assert here.split(":")[0].split(" (")[0] in known, name
        assert name not in {path.rpartition(".")[2] for path in all_keys()}, f"{name} is a name here, too"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MINIMAL + "training:\n  batch_size: eight\n", "'training.batch_size': input should be a valid integer"),
        (MINIMAL + "training:\n  batch_size: eight\n", "given 'eight'"),
        (MINIMAL + "training:\n  learning_rate: -1\n", "'training.learning_rate': input should be greater than 0"),
        (MINIMAL + "adapter:\n  target_modules: 5\n", "'adapter.target_modules"),
        (MINIMAL + "training:\n  lr_scheduler_type: cosin\n", "'cosine', 'linear' or 'constant'"),
        (MINIMAL + "training: fast\n", "'training': "),
        ("data:\n  train: rows.jsonl\n", "'model' is needed and missing"),
        ("model:\n  model_name_or_path: a/b\ndata: {}\n", "'data.train' is needed and missing"),
        (MINIMAL + "data:\n  train: other.jsonl\n", "'data' is given twice"),
        (MINIMAL + "adapter:\n  r: 1\n  r: 2\n", "'r' is given twice"),
        (MINIMAL + "adapter: {r: 1\n", "is not YAML"),
        ("- model\n- data\n", "holds list, expected sections"),
        ("", "expected sections such as model:, data:, training:"),
    ],
)
def test_what_is_wrong_is_named(written, text: str, told: str) -> None:  # type: ignore[no-untyped-def]
    path = written(text)
    message = refusal(path)
    assert told in message
    assert str(path) in message


def test_all_that_is_wrong_is_named_at_once(written) -> None:  # type: ignore[no-untyped-def]
    message = refusal(written(MINIMAL + "adapter:\n  r: 0\n  lora_alhpa: 3\ntraining:\n  seed: x\n"))
    assert all(name in message for name in ("adapter.r", "adapter.lora_alhpa", "training.seed"))


def test_a_section_left_empty_has_its_defaults(written) -> None:  # type: ignore[no-untyped-def]
    assert load_recipe(written(MINIMAL + "adapter:\n  # r: 8\n")).adapter.r == 16
    assert "unknown key 'modell'" in refusal(written(MINIMAL + "modell:\n"))
    assert "'model' is needed and missing" in refusal(written("model:\ndata:\n  train: rows.jsonl\n"))


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: Käse".encode("latin-1"))
    assert "cannot be read" in refusal(tmp_path / "latin.yaml")


def test_options_are_set_one_by_one(written) -> None:  # type: ignore[no-untyped-def]
    path = written(MINIMAL)
    changed = load_recipe(
        path,
        [
            "adapter.r=8", "training.learning_rate=1e-4", "adapter.target_modules=[q_proj, v_proj]", "data.eval=null",
            "adapter.rank_pattern.q_proj=4", 'data.columns={"prompt": "text"}', "output_dir=runs/a=b", "adapter.r=9",
        ],
    )  # fmt: skip
    assert changed.adapter.r == 9
    assert changed.training.learning_rate == 1e-4
    assert changed.adapter.target_modules == ["q_proj", "v_proj"]
    assert changed.adapter.rank_pattern == {"q_proj": 4}
    assert changed.data.columns == {"prompt": "text"}
    assert changed.output_dir == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adapter.r", "expected a.b=value"),
        ("=8", "expected a.b=value"),
        ("adapter.rr=8", "unknown key 'adapter.rr'"),
        ("model.model_name_or_path.x=1", "model_name_or_path is a value, not a section"),
        ("adapter.target_modules=[q_proj", "the value is not YAML"),
        ("training.seed=many", "'training.seed': input should be a valid integer"),
    ],
)
def test_an_override_that_is_wrong(written, override: str, told: str) -> None:  # type: ignore[no-untyped-def]
    assert told in refusal(written(MINIMAL), override)


def test_an_override_reaches_a_section_that_was_left_empty(written) -> None:  # type: ignore[no-untyped-def]
    assert load_recipe(written(MINIMAL + "adapter:\n"), ["adapter.r=3"]).adapter.r == 3


def test_an_override_reaches_a_section_that_is_given_by_its_name(written) -> None:  # type: ignore[no-untyped-def]
    """As a run's own recipe has its objective."""
    recipe = load_recipe(written(MINIMAL + "training:\n  objective: sft\n"), ["training.objective.name=sft"])
    assert recipe.training.objective.name == "sft"
    told = refusal(written(MINIMAL + "training:\n  objective: sft\n"), "training.objective.beta=0.1")
    assert "beta" in told
    assert "a value, not a section" not in told


@pytest.mark.parametrize(
    ("given", "sequences"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, 32),
        ({"gradient_accumulation_steps": 8}, 8),
    ],
)
def test_the_names_that_people_know_are_translated(given: dict[str, int], sequences: int) -> None:
    values = {**yaml.safe_load(MINIMAL), "training": given}
    assert make_recipe(values).training.batch_size == sequences
    with pytest.raises(RecipeError, match="not both"):
        make_recipe({**values, "training": {**given, "batch_size": 2}})
    for wrong in (0, -2, "many", [3]):
        with pytest.raises(RecipeError, match="gradient_accumulation_steps: expected a count"):
            make_recipe({**values, "training": {"gradient_accumulation_steps": wrong}})


def test_files_are_found_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    (beside / "base").mkdir(parents=True)
    here.mkdir()
    for name in ("rows.jsonl", "asked.jsonl", "template.jinja"):
        (beside / name).touch()
    (here / "eval.jsonl").touch()
    path = beside / "recipe.yaml"
    path.write_text(
        "model: {model_name_or_path: base}\nevaluation: {data: asked.jsonl}\n"
        "data: {train: rows.jsonl, eval: eval.jsonl, chat_template: template.jinja}\n"
    )
    monkeypatch.chdir(here)
    recipe = load_recipe(path)
    assert recipe.data.train == str(beside / "rows.jsonl")
    assert recipe.data.chat_template == str(beside / "template.jinja")
    assert recipe.data.eval == str(here / "eval.jsonl")
    assert recipe.evaluation.data == str(beside / "asked.jsonl")
    assert recipe.model.model_name_or_path == str(beside / "base")
    assert recipe.output_dir == "runs/run"


OLD_ADAPTER: dict[str, Any] = {
    "method": "lora", "r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "target_modules": "all-linear",
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
    "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "modules_to_save": None,
    "trainable_token_indices": None, "init_lora_weights": True, "feedforward_modules": None, "num_virtual_tokens": 20,
    "prompt_tuning_init": "random", "prompt_tuning_init_text": None,
}  # fmt: skip
"""As recipe.yaml had it when all methods' options were one section."""


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "use_dora": True},
        {"method": "ia3", "target_modules": ["q_proj"], "feedforward_modules": []},
        {"method": "prefix", "num_virtual_tokens": 3},
        {"method": "prompt", "prompt_tuning_init": "text", "prompt_tuning_init_text": "Tickets:"},
        {"method": "bitfit", "layers_to_transform": 1},
        {"method": "full", "exclude_modules": "lm_head"},
    ],
    ids=str,
)
def test_a_recipe_with_all_methods_options_is_the_same(own: dict[str, Any]) -> None:
    values = yaml.safe_load(MINIMAL)
    old, new = make_recipe({**values, "adapter": OLD_ADAPTER | own}), make_recipe({**values, "adapter": own})
    assert old == new
    assert old.model_dump(mode="json") == new.model_dump(mode="json")
    assert make_recipe(yaml.safe_load(recipe_yaml(old))) == old
    assert old.adapter == AdapterConfig(**own)


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("{method: ia3, r: 4}", "adapter: r says nothing to method ia3, which knows exclude_modules, feedforward_"),
        ("{method: prompt, prompt_tuning: text, r: 4}", "adapter: r says nothing to method prompt, which knows num_"),
        ("{use_dora: true, num_virtual_tokens: 3, prompt_tuning_init: text}", "init say nothing to method lora"),
        ("{method: ia3, lora_alhpa: 4}", "unknown key 'adapter.lora_alhpa'; did you mean 'lora_alpha'?"),
        ("{method: dora, r: 0}", "'adapter.r': input should be greater than or equal to 1, given 0"),
        ("{method: prompt, prompt_tuning_init: text}", "adapter: prompt_tuning_init: text and prompt_tuning_init_text"),
        ("{method: lroa}", "adapter: there is no method 'lroa'; there are lora, dora, ia3, vera, "),
        ("{method: lroa}", "did you mean 'lora'"),
        ("{method: [lora]}", "there is no method ['lora']"),
    ],
)
def test_a_methods_options_are_its_own(written, adapter: str, told: str) -> None:  # type: ignore[no-untyped-def]
    assert told in refusal(written(f"{MINIMAL}adapter: {adapter}\n"))


def test_an_adapter_config_is_its_methods() -> None:
    assert AdapterConfig(r=4) == LoraConfig(r=4) == AdapterConfig.model_validate({"r": 4})
    assert isinstance(AdapterConfig(r=4), LoraConfig)
    assert AdapterConfig(method="dora") == LoraConfig(use_dora=True)
    assert AdapterConfig(method="ia3", lora_dropout=0) == Ia3Config()
    with pytest.raises(AdapterError, match=r"there is no method 'ai3'; .*did you mean 'ia3'"):
        AdapterConfig(method="ai3")


def test_the_schema_tells_methods_apart() -> None:
    schema = Recipe.model_json_schema()
    kinds = {method: place.rpartition("/")[2] for method, place in
             schema["properties"]["adapter"]["discriminator"]["mapping"].items()}  # fmt: skip
    assert kinds == {method: kind.__name__ for method, kind in CONFIGS.items()}
    for kind in set(kinds.values()):
        described = schema["$defs"][kind]
        assert described["additionalProperties"] is False
        assert ("method" in described.get("required", [])) == (kind != "LoraConfig")


def sections() -> list[type[BaseModel]]:
    kinds = [kind for field in Recipe.model_fields.values() for kind in (field.annotation, *get_args(field.annotation))]
    return [Recipe, *(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_option_is_documented_and_strict(section: type[BaseModel]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not (field.description or "").strip()]
    assert undocumented == [], f"write a docstring under these fields of {section.__name__}"
    assert section.model_config["extra"] == "forbid"
    assert "title" in section.model_json_schema()
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    assert any(isinstance(node, ast.ClassDef) and node.name == section.__name__ for node in tree.body)


def test_reading_a_recipe_imports_no_torch(written) -> None:  # type: ignore[no-untyped-def]
    path = written(MINIMAL)
    code = (
        "import sys; from pathlib import Path; from topwork.recipe.recipe import load_recipe; "
        f"load_recipe(Path({str(path)!r})); "
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_at_and_all_keys_agree() -> None:
    assert "adapter.r" in all_keys()
    assert "output_dir" in all_keys()
    assert options_at(["adapter", "r"]) == {}
    assert set(options_at([])) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"path": "a.jsonl", "wieght": 2}, "unknown key 'data.train.wieght'; did you mean 'weight'?"),
        (
            ["a.jsonl", {"path": "b.jsonl", "weight": 0}],
            "'data.train.1.weight': input should be greater than 0, given 0",
        ),
        (["a.jsonl", {"weight": 1}], "'data.train.1.path' is needed and missing"),
        (["a.jsonl", 4], "'data.train.1': input should be a valid string, given 4"),
        ([], "'data.train': list should have at least 1 item"),
    ],
)
def test_a_source_that_is_wrong_is_told_by_its_place_alone(train: Any, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"model": {"model_name_or_path": "some/model"}, "data": {"train": train}})
    first, *others = str(caught.value).splitlines()[1:]
    assert told in first
    assert not others, "one mistake, one line"


def test_sources_are_written_back_as_they_were_given() -> None:
    train = ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}]
    recipe = make_recipe({"model": {"model_name_or_path": "some/model"}, "data": {"train": train}})
    assert make_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe
    first, second = recipe.data.sources(recipe.data.train)
    assert (first.path, first.weight, second.path, second.weight) == ("a.jsonl", 1.0, "b.jsonl", 2.0)


def test_a_data_file_that_is_nowhere_is_missed_beside_the_recipe(written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "rows.jsonl").write_text("{}")
    path = written(MINIMAL)

    def train(name: str) -> object:
        return load_recipe(path, [f"data.train={name}"]).data.train

    assert train("row.jsonl") == str(tmp_path / "row.jsonl"), "its error then tells of rows.jsonl"
    assert train("b*.jsonl") == str(tmp_path / "b*.jsonl"), "its error then tells what is there"
    assert train("tickets.csv") == "tickets.csv"
    assert train("owner/name") == "owner/name"
