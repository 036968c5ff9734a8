"""Rows counted before a run: as training would count them where all are looked at, near it where some are."""

import json
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.family_tokenizers import FAMILIES, OTHERS, build_tokenizer
from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.examples import load_data
from topwork.models.light_tokenizer import LightTokenizer, tokenizer_folder
from topwork.plan import sampled_rows
from topwork.plan.tokens import Tokens, counted
from topwork.recipe.recipe import Recipe, make_recipe

TOPICS = ("card", "transfer", "top up", "exchange rate", "cash withdrawal", "refund")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_completion": ("train.jsonl", {"columns": {"prompt": "text", "completion": "category"}}),
    "messages": ("train.jsonl", {}),
    "text": ("train.txt", {"documents": "line"}),
    "split": ("train.txt", {"documents": "line", "too_long": "split", "max_length": 8}),
    "drop": ("train.jsonl", {"duplicates": "drop"}),
    "weighted": ("train.jsonl", {}),
}


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    texts = [f"My {TOPICS[n % 6]} failed {n} times since {'yesterday ' * (n % 5)}, why?" for n in range(count)]
    if kind == "prompt_completion":
        return [{"text": text, "category": TOPICS[n % 6].replace(" ", "_")} for n, text in enumerate(texts)]
    if kind == "text":
        return [{"text": text} for text in texts]
    talks = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"See {TOPICS[n % 6]}."}] * (1 + n % 3)
        for n, text in enumerate(texts)
    ]
    return [{"messages": talk} for talk in (talks + talks[:3])]


def write_rows(path: Path, kind: str, count: int) -> Path:
    rows = rows_of("text" if path.suffix == ".txt" else kind, count)
    lines = [row["text"] if path.suffix == ".txt" else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and nothing else of a base."""
    folder = tmp_path_factory.mktemp("base")
    build_tokenizer("smollm2").save_pretrained(folder)
    return folder


def recipe_of(base: Path | str, path: Path, options: dict[str, Any], **sections: Any) -> Recipe:
    model = {"model_name_or_path": str(base)}
    return make_recipe({"model": model, "data": {"train": str(path), **options}, **sections})


def trained_on(base: Path, recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return load_data(recipe.data, tokenizer, 8192, recipe.training.seed, lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_counted_are_what_training_reads(base: Path, tmp_path: Path, kind: str) -> None:
    name, options = KINDS[kind]
    path = write_rows(tmp_path / name, kind, 60)
    if kind == "weighted":
        other = write_rows(tmp_path / "other.jsonl", "messages", 20)
        options = {"train": [{"path": str(path), "weight": 0.5}, {"path": str(other), "weight": 2}]}
    recipe = recipe_of(base, path, options)
    found, data = counted(recipe, 8192), trained_on(base, recipe)
    assert found is not None
    assert found.counted == "all"
    train, held = data.summary.train, data.summary.eval
    told = (found.rows, found.sequences, found.tokens, found.learned_tokens, found.held_out_rows, found.held_out_tokens)
    assert told == (train.rows, train.sequences, train.tokens, train.learned_tokens, held.rows, held.tokens)
    assert found.longest == data.longest()
    lengths = sorted(len(example.tokens) for example in data.train)
    assert found.percentiles[50] == lengths[(len(lengths) + 1) // 2 - 1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_sample_is_near_what_training_reads_and_has_the_longest_row(
    base: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_rows, "SAMPLE_ROWS", 100)
    path = write_rows(tmp_path / "rows.jsonl", "prompt_completion", 900)
    if suffix == "csv":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[500]["text"] += " very long" * 40
        path = tmp_path / "rows.csv"
        path.write_text("text,category\n" + "".join(f'"{row["text"]}",{row["category"]}\n' for row in rows))
    else:  # too large to be read whole, as it were
        monkeypatch.setattr(sampled_rows, "WHOLE_BYTES", 1000)
    recipe = recipe_of(base, path, {"columns": {"prompt": "text", "completion": "category"}})
    found, data = counted(recipe, 8192), trained_on(base, recipe)
    assert found is not None
    assert found.counted == "sample"
    assert found.looked_at <= 100
    assert found.tokens == pytest.approx(data.summary.train.tokens, rel=0.05)
    assert found.learned_tokens == pytest.approx(data.summary.train.learned_tokens, rel=0.05)
    assert found.rows == pytest.approx(data.summary.train.rows, rel=0.05)
    if suffix == "csv":
        assert found.longest == data.longest()
    assert "100 rows" in found.how()


def test_without_a_tokenizer_letters_tell(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", "messages", 40)
    found = counted(recipe_of("llama-3-8b", path, {}), 8192)
    assert found is not None
    assert found.counted == "estimated"
    assert "estimated" in found.how()
    assert 0 < found.learned_tokens < found.tokens
    assert found.rows == 42  # 43 and the three copies, less two per cent that are held out


def test_a_hub_data_set_is_not_asked_for(base: Path, tmp_path: Path) -> None:
    assert counted(recipe_of(base, Path("nobody/nothing"), {}), 8192) is None


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "does not exist"), ("", "is empty"), ('{"colour": "red"}\n' * 3, "colour"), ('{"a": ', "line 1")],
)
def test_bad_data_are_told_as_training_tells_them(base: Path, tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_text(content)
    recipe = recipe_of(base, path, {})
    with pytest.raises(DataError, match=told) as planned:
        counted(recipe, 8192)
    with pytest.raises(DataError) as trained:
        trained_on(base, recipe)
    assert str(planned.value) == str(trained.value)


def test_rows_that_are_too_long_are_refused_as_training_refuses_them(base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", "messages", 20)
    with pytest.raises(DataError, match="longer than 10 tokens"):
        counted(recipe_of(base, path, {"max_length": 10}), 8192)


# The light tokenizer


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_the_light_tokenizer_is_the_real_one(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(family).save_pretrained(tmp_path)
    real, light = AutoTokenizer.from_pretrained(tmp_path), LightTokenizer(tmp_path)
    texts = ["Hello <|im_end|> </s> there.\n 12345 ça", ""]
    ours, theirs = (ChatTemplate(tokenizer).renderer.tokens for tokenizer in (light, real))
    assert (ours.special, ours.control) == (theirs.special, theirs.control)
    assert ours.ids(texts) == theirs.ids(texts)
    assert light("a")["input_ids"] == real("a")["input_ids"]
    assert (light.bos_token_id, light.eos_token_id) == (real.bos_token_id, real.eos_token_id)
    assert light.special_tokens_map == real.special_tokens_map
    assert light.chat_template == real.chat_template


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_light_templates_write_what_transformers_writes(family: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from topwork.models.light_template import compile_template

    tokenizer = build_tokenizer(family)
    talk = [{"role": "user", "content": "Hé <b>"}, {"role": "assistant", "content": "Yes."}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": [1, "é<"]}}}]
    for given in (None, tools):
        values = {"messages": talk, "tools": given, "documents": None, "add_generation_prompt": True}
        written = [
            make(tokenizer.chat_template).render(**values, **tokenizer.special_tokens_map)
            for make in (compile_template, _compile_jinja_template)
        ]
        assert written[0] == written[1]


def test_light_templates_are_as_closed_as_those_of_transformers() -> None:
    from jinja2.exceptions import TemplateError

    from topwork.models.light_template import compile_template

    for harmful in (
        "{{ ().__class__.__base__ }}", "{% set n = namespace(_x=1) %}", "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ messages.append(1) }}", "{{ raise_exception('no') }}", "{{ dict.__init__.__globals__ }}",
    ):  # fmt: skip
        try:
            written = compile_template(harmful).render(messages=[])
        except TemplateError:
            continue
        assert written == "", harmful  # what is not raised is at least nothing


def test_a_light_tokenizer_keeps_the_same_names_from_templates() -> None:
    from transformers import PreTrainedTokenizerBase

    real, light = (signature(each.apply_chat_template).parameters for each in (PreTrainedTokenizerBase, LightTokenizer))
    assert set(real) == set(light)


def test_what_marks_generation_is_found_in_a_light_template() -> None:
    tokenizer = build_tokenizer("generation")
    blocks: list[str] = []
    places: list[tuple[int, int]] = []
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    from topwork.models.light_template import compile_template

    template = compile_template(tokenizer.chat_template)
    with template.environment.activate_tracker(blocks, places):
        blocks += template.generate(messages=talk, **tokenizer.special_tokens_map)
    assert ["".join(blocks)[start:stop].strip() for start, stop in places] == ["b</s>"]


def test_no_tokenizer_is_looked_for_where_code_would_be_run_or_nothing_is(base: Path, tmp_path: Path) -> None:
    def of(name: str, **options: Any) -> Path | None:
        path = write_rows(tmp_path / "train.jsonl", "messages", 3)
        values = {"model": {"model_name_or_path": name, **options}, "data": {"train": str(path)}}
        return tokenizer_folder(make_recipe(values).model)

    assert of(str(base)) == base
    assert of(str(base), trust_remote_code=True) is None
    assert of(str(tmp_path)) is None
    assert of("nobody/nothing") is None
    assert of("no-such-model") is None


def test_a_damaged_tokenizer_is_as_none(base: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    path = write_rows(tmp_path / "train.jsonl", "messages", 9)
    found = counted(recipe_of(tmp_path, path, {}), 8192)
    assert found is not None
    assert found.counted == "estimated"


@pytest.mark.parametrize(("rows", "steps"), [(1, 50), (8, 144), (32, 1000)])
def test_the_fullest_step_is_near_the_largest_of_many_drawn(rows: int, steps: int) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.gamma(4.0, 25.0, 20_000).astype(int) + 1
    counts = Tokens(
        len(lengths), len(lengths), int(lengths.sum()), 0, int(lengths.max()), {},
        float((lengths**2).sum() / lengths.sum()), 0, 0, "all", len(lengths),
    )  # fmt: skip
    largest = [generator.choice(lengths, (steps, rows)).sum(1).max() for _ in range(40)]
    found = counts.fullest_step(rows, steps)
    assert found == pytest.approx(np.mean(largest), rel=0.12) or found == counts.longest
    assert counts.longest <= found <= rows * counts.longest
