"""A run goes on with what it began with, and what a verb writes takes nothing else's place."""

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from data.family_tokenizers import build_tokenizer
from run import tiny
from topwork.common.errors import ModelError, RequestError
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.recipe.recipe import load_recipe
from topwork.run.evaluate import evaluate
from topwork.run.merge import merge
from topwork.run.train import train

MakeRecipe = Callable[..., Path]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def stopped(make_recipe: MakeRecipe, tmp_path: Path) -> tuple[Path, Path]:
    """(recipe, run folder) of a short run, with rows and base of its own."""
    rows = tiny.write_rows(tmp_path / "own.jsonl", tiny.rows(20))
    recipe = make_recipe(data={"train": str(rows)}, training={"max_steps": 4, "eval_steps": 2})
    return recipe, train(recipe, log=quiet).folder


def test_other_rows_under_the_same_name_are_not_gone_on_with(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, folder = stopped
    kept = (folder / "provenance.json").read_bytes()
    tiny.write_rows(tmp_path / "own.jsonl", tiny.rows(20, first=1))
    with pytest.raises(RequestError, match="other training rows"):
        train(recipe, resume=True, log=quiet)
    assert (folder / "provenance.json").read_bytes() == kept


def test_another_base_under_the_same_name_is_not_gone_on_with(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    recipe = make_recipe(model={"model_name_or_path": str(base)}, training={"max_steps": 2, "eval_steps": 1})
    train(recipe, log=quiet)
    weights = {name: tensor + 0.25 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match="another base"):
        train(recipe, resume=True, log=quiet)


def test_a_resume_adds_to_the_provenance_and_changes_nothing_else_of_it(stopped: tuple[Path, Path]) -> None:
    recipe, folder = stopped
    before = json.loads((folder / "provenance.json").read_text("utf-8"))
    train(recipe, resume=True, log=quiet)
    after = json.loads((folder / "provenance.json").read_text("utf-8"))
    assert len(after.pop("resumed")) == 1
    assert after == before


def test_a_run_opens_from_another_directory(
    stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        **load_recipe(stopped[0]).model_dump(mode="json"),
        "output_dir": "run-by-name",
    }
    values["data"]["train"] = "own.jsonl"
    recipe = tiny.write_recipe(tmp_path / "beside.yaml", values)
    monkeypatch.chdir(tmp_path)
    train(Path("beside.yaml"), log=quiet)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate("../run-by-name", max_rows=1, log=quiet)["rows"] == 1
    assert recipe.exists()


def test_weights_that_are_missing_are_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    gone = next(name for name in sorted(weights) if "q_proj" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*q_proj"):
        load_base(ModelConfig(model_name_or_path=str(base)), quiet)
    (base / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ModelError, match="could not be read"):
        load_base(ModelConfig(model_name_or_path=str(base)), quiet)


def test_a_template_is_told_the_same_day_every_day() -> None:
    tokenizer = build_tokenizer(
        "smollm2", "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(tokenizer)
    text = tokenizer.decode(template.prompt_ids([Message("user", "x")]))
    assert text.startswith("26 Jul 2024")
    assert date.today().strftime("%d %b %Y") != "26 Jul 2024"


def test_plain_text_is_scored_by_its_loss(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The {product} stands on shelf {n}." for n, product in enumerate(tiny.PRODUCTS * 4)), "utf-8"
    )
    recipe = make_recipe(
        data={"train": str(text), "documents": "paragraph", "eval_fraction": 0.2},
        training={"max_steps": 4, "eval_steps": 2},
    )
    scores = evaluate(train(recipe, log=quiet).folder, log=quiet)
    assert scores["grader"] == "loss alone"
    assert scores["after"]["loss"] < scores["before"]["loss"]


def test_a_trial_does_not_take_the_whole_evaluations_place(stopped: tuple[Path, Path]) -> None:
    folder = stopped[1]
    evaluate(folder, log=quiet)
    whole = (folder / "evaluation.json").read_bytes()
    evaluate(folder, max_rows=1, log=quiet)
    assert (folder / "evaluation.json").read_bytes() == whole
    assert json.loads((folder / "evaluation-trial.json").read_text("utf-8"))["rows"] == 1


@pytest.mark.parametrize("place", ["", "merged", ".."])
def test_a_merge_never_replaces_a_run(stopped: tuple[Path, Path], place: str) -> None:
    folder = stopped[1]
    before = tiny.folder_bytes(folder)
    with pytest.raises(RequestError, match="own folder, lies in it or holds it"):
        merge(folder, folder / place, overwrite=True, log=quiet)
    assert tiny.folder_bytes(folder) == before


def test_overwrite_replaces_earlier_merges_alone(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years", "utf-8")
    with pytest.raises(RequestError, match="Topwork has not written"):
        merge(stopped[1], precious, overwrite=True, log=quiet)
    assert (precious / "thesis.tex").read_text("utf-8") == "years"


def test_a_merged_folder_stops_where_its_template_ends_a_turn(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Llama 3's turns end with a token that is not the tokenizer's EOS in every release."""
    base = tiny.write_model(tmp_path / "llama3", family="llama3")
    tokenizer = build_tokenizer("llama3")
    recipe = make_recipe(model={"model_name_or_path": str(base)}, training={"max_steps": 2, "eval_steps": 1})
    folder = train(recipe, log=quiet).folder
    merge(folder, tmp_path / "out", log=quiet)
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in ([ends] if isinstance(ends, int) else ends)


def test_a_recipe_may_hold_a_template_itself(make_recipe: MakeRecipe) -> None:
    jinja = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + "{# " + "x" * 300 + " #}"
    assert load_recipe(make_recipe(data={"chat_template": jinja})).data.chat_template == jinja
