"""`topwork init`: from files as people have them to a recipe that trains as it stands, with a reason for every line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from data.learned_text import shown
from run import tiny
from run.fixtures import Said
from topwork.common.errors import DataError, ModelError, RecipeError, RequestError
from topwork.data.chat.template import Encoded
from topwork.data.examples import load_data
from topwork.recipe.recipe import all_keys, load_recipe
from topwork.run.advise import advise
from topwork.run.init import Begun, init
from topwork.run.initial.lines import INSTEAD
from topwork.run.train import train

Command = Callable[..., Said]
COUNT = 60
ASKED = [f"Order {number}: my {tiny.PRODUCTS[number % 6]} {tiny.TROUBLES[number % 4]}." for number in range(COUNT)]
ANSWERS = [f"We look after order {number}." for number in range(COUNT)]
LABELS = [("fault", "delivery", "billing")[number % 3] for number in range(COUNT)]
LONG = 8192


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """bases(family): a tiny base with that family's template, which reads 8,192 tokens; "bare" has no template."""
    folder, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def base(family: str) -> Path:
        if family not in made:
            own = {"family": "smollm2", "template": ""} if family == "bare" else {"family": family}
            path = made[family] = tiny.write_model(folder / family, **own)
            config = json.loads((path / "config.json").read_text("utf-8"))
            (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG}), "utf-8")
        return made[family]

    return base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny.write_rows(path, rows)


def messages(number: int, system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": ASKED[number]}, {"role": "assistant", "content": ANSWERS[number]}]


# Files as people have them


def csv_with_bom(folder: Path) -> Path:
    path = folder / "tickets.csv"
    lines = ["text;label", *(f'"{asked}";{label}' for asked, label in zip(ASKED, LABELS))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


def messages_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "chats.jsonl", [{"messages": messages(number)} for number in range(COUNT)])


def sharegpt_json(folder: Path) -> Path:
    talks = [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}] * 2}
        for asked, answer in zip(ASKED, ANSWERS)
    ]
    (folder / "talks.json").write_text(json.dumps(talks), "utf-8")
    return folder / "talks.json"


def alpaca_json(folder: Path) -> Path:
    rows = [{"instruction": "Answer.", "input": asked, "output": answer} for asked, answer in zip(ASKED, ANSWERS)]
    (folder / "alpaca.json").write_text(json.dumps(rows), "utf-8")
    return folder / "alpaca.json"


def prompt_completion(folder: Path) -> Path:
    return write_jsonl(folder / "pairs.jsonl", [{"prompt": a, "completion": b} for a, b in zip(ASKED, ANSWERS)])


def plain_text(folder: Path) -> Path:
    (folder / "book.txt").write_text("\n\n".join(f"{a} {b}" for a, b in zip(ASKED, ANSWERS)), "utf-8")
    return folder / "book.txt"


def parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"question": ASKED, "answer": ANSWERS}), folder / "rows.parquet")
    return folder / "rows.parquet"


def folder_of_splits(folder: Path) -> Path:
    for name, numbers in (("train", range(40)), ("valid", range(40, 50)), ("test", range(50, 60))):
        write_jsonl(folder / "splits" / f"{name}.jsonl", [{"messages": messages(number)} for number in numbers])
    return folder / "splits"


FILES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    # what it is called: how it is made, the task that is recognised, what is learned of its first row
    "csv": (csv_with_bom, "classification", "fault"),
    "messages": (messages_jsonl, "instruction", ANSWERS[0]),
    "sharegpt": (sharegpt_json, "chat-style", ANSWERS[0]),
    "alpaca": (alpaca_json, "instruction", ANSWERS[0]),
    "prompt_completion": (prompt_completion, "instruction", ANSWERS[0]),
    "text": (plain_text, "continued-pretraining", ""),
    "parquet": (parquet, "instruction", ANSWERS[0]),
    "folder": (folder_of_splits, "instruction", ANSWERS[0]),
}


@pytest.mark.parametrize("kind", FILES)
def test_it_trains_and_learns_what_was_meant(kind: str, bases: Callable[[str], Path], here: Path) -> None:
    make, task, answer = FILES[kind]
    begun = init(str(bases("smollm2")), str(make(here).relative_to(here)))
    assert any(line.startswith(f"task: {task} (") for line in begun.told), begun.told
    check_reasons(begun)
    recipe = load_recipe(begun.path)
    assert recipe == begun.recipe
    first = learned(begun, bases("smollm2"))[0]
    if answer:
        assert first[0] == f"{answer}<|im_end|>"
    else:
        assert first[-1].endswith(f"{ANSWERS[0]}<|im_end|>")
    run = train(begun.path, ["training.max_steps=2"], log=lambda _: None)
    assert run.result["steps"] == 2


def test_a_recipe_as_it_stands(bases: Callable[[str], Path], here: Path) -> None:
    write_jsonl(here / "rows.jsonl", [{"messages": messages(number)} for number in range(24)])
    begun = init(str(bases("smollm2")), "rows.jsonl")
    run = train(begun.path, log=lambda _: None)
    assert run.result["last_loss"] < run.result["first_loss"]


def check_reasons(begun: Begun) -> None:
    """Above every option stands why it is so, and the file says by what it was written."""
    lines = begun.text.splitlines()
    assert lines[0].startswith("# Written by `topwork init ")
    for before, line in zip(lines, lines[1:]):
        if re.match(r"  \w+: |output_dir: ", line):
            assert before.lstrip().startswith("# "), line
    assert all(len(line) <= 104 or "http" in line or str(Path.cwd().parent) in line for line in lines)


def learned(begun: Begun, base: Path) -> list[list[str]]:
    """What is learned of each sequence, in the order of the file."""
    config = begun.recipe.data.model_copy(update={"eval_fraction": 0.0, "eval": None})
    data = load_data(config, AutoTokenizer.from_pretrained(base), LONG, 0, lambda _: None)
    texts = [shown(data.template, Encoded(list(each.tokens), list(each.weights))) for each in data.train]
    return [[part.split("⟧")[0] for part in text.split("⟦")[1:]] for text in texts]


def test_splits_of_a_folder_are_used_as_they_are_named(bases: Callable[[str], Path], here: Path) -> None:
    begun = init(str(bases("smollm2")), str(folder_of_splits(here)))
    assert begun.recipe.evaluation.data == str(here / "splits")
    said = list[str]()
    train(begun.path, ["training.max_steps=1"], log=said.append)
    assert any("train: 40 rows" in line for line in said)
    assert any("eval: 10 rows" in line for line in said)


def test_files_called_after_validation_and_test_are_held_out(bases: Callable[[str], Path], here: Path) -> None:
    folder_of_splits(here)
    files = [str(here / "splits" / f"{name}.jsonl") for name in ("train", "valid", "test")]
    values = yaml.safe_load(init(str(bases("smollm2")), files).text)
    assert values["data"]["train"] == "splits/train.jsonl"
    assert values["data"]["eval"] == "splits/valid.jsonl"
    assert values["evaluation"]["data"] == "splits/test.jsonl"
    assert "eval_fraction" not in values["data"]
    assert values["output_dir"] == "runs/splits"
    alone = init(str(bases("smollm2")), files[0], "alone.yaml")
    assert sum(line.startswith("beside it and not read: ") for line in alone.told) == 2


# What a template does not take


TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "it"}}}]}


def with_calls(number: int) -> dict[str, Any]:
    asked, answer = messages(number)
    return {"tools": TOOLS, "messages": [asked, CALL, {"role": "tool", "content": "found"}, answer]}


def with_thinking(number: int) -> dict[str, Any]:
    asked, answer = messages(number)
    return {"messages": [asked, {**answer, "reasoning_content": "It is late."}]}


def with_two_questions(number: int) -> dict[str, Any]:
    asked, answer = messages(number)
    return {"messages": [asked, {"role": "user", "content": "Please."}, answer]}


def with_system(number: int) -> dict[str, Any]:
    return {"messages": messages(number, "Be brief.")}


@pytest.mark.parametrize(
    ("family", "make", "option", "value", "words"),
    [
        ("gemma", with_system, "fold_system", True, "takes no system message"),
        ("gemma", with_two_questions, "merge_turns", True, "in turns"),
        ("smollm2", with_calls, "chat_template", "chatml", "leaves out tools"),
        ("smollm2", with_thinking, "thinking", "inline", "no place for thinking"),
        ("bare", with_system, "chat_template", "chatml", "no chat template"),
        ("qwen2_5", with_calls, "chat_template", None, ""),
        ("qwen3", with_thinking, "thinking", "learn", ""),
    ],
)
def test_the_option_that_works_is_chosen(
    family: str, make: Callable[[int], Any], option: str, value: Any, words: str, bases: Callable[[str], Path],
    here: Path,
) -> None:  # fmt: skip
    write_jsonl(here / "rows.jsonl", [make(number) for number in range(COUNT)])
    begun = init(str(bases(family)), "rows.jsonl")
    assert getattr(begun.recipe.data, option) == value
    if words:
        assert words in " ".join(begun.text.replace("# ", "").split())
    parts = learned(begun, bases(family))[0]
    assert parts
    assert parts[-1].rstrip("\n").endswith(("<|im_end|>", "<end_of_turn>", "<eos>"))
    assert ANSWERS[0] in parts[-1]
    if family == "gemma":
        train(begun.path, ["training.max_steps=1"], log=lambda _: None)


def test_a_base_without_marks_gets_the_plain_template(tmp_path: Path, made_llama: Path, here: Path) -> None:
    prompt_completion(here)
    begun = init(str(made_llama), "pairs.jsonl")
    assert begun.recipe.data.chat_template == "plain"
    train(begun.path, ["training.max_steps=1", "data.too_long=truncate"], log=lambda _: None)


def test_few_bad_rows_are_left_out_and_many_stop_it(bases: Callable[[str], Path], here: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": a, "completion": b} for a, b in zip(ASKED, ANSWERS)]
    rows[7]["completion"] = ""
    write_jsonl(here / "rows.jsonl", rows)
    begun = init(str(bases("smollm2")), "rows.jsonl")
    assert begun.recipe.data.on_bad_row == "drop"
    assert any("1 of 60 rows cannot be used (rows.jsonl:8: no answer" in line for line in begun.told)
    for row in rows[:20]:
        row["completion"] = ""
    write_jsonl(here / "many.jsonl", rows)
    with pytest.raises(DataError, match="20 of 60 rows cannot be used"):
        init(str(bases("smollm2")), "many.jsonl", "many.yaml")


# Lengths and memory


def test_the_longest_row_decides_how_long_rows_may_be(bases: Callable[[str], Path], here: Path) -> None:
    write_jsonl(here / "rows.jsonl", [*({"messages": messages(n)} for n in range(COUNT - 1)), long_row(3000)])
    begun = init(str(bases("smollm2")), "rows.jsonl")
    assert 3000 < begun.recipe.data.max_length < 3300
    assert begun.recipe.data.max_length % 64 == 0
    assert re.search(r"the longest 3,\d\d\d", " ".join(begun.told))
    write_jsonl(here / "rows.jsonl", [*({"messages": messages(n)} for n in range(COUNT - 1)), long_row(9000)])
    longer = init(str(bases("smollm2")), "rows.jsonl", overwrite=True)
    assert longer.recipe.data.max_length == LONG
    assert "about 1 row is longer" in " ".join(longer.told)
    assert longer.recipe.data.too_long != "refuse"
    train(longer.path, ["training.max_steps=1"], log=lambda _: None)


def long_row(letters: int) -> dict[str, Any]:
    """A letter is about a token to these tokenizers."""
    return {"messages": [{"role": "user", "content": "x" * letters}, {"role": "assistant", "content": "Long."}]}


def test_rows_that_are_all_too_long_are_refused(made_llama: Path, here: Path) -> None:
    write_jsonl(here / "rows.jsonl", [{"prompt": "Why?", "completion": "x" * 2000} for _ in range(COUNT)])
    with pytest.raises(DataError, match=r"too long for data\.max_length: 512"):
        init(str(made_llama), "rows.jsonl")
    assert not (here / "recipe.yaml").exists()


def test_it_is_made_to_fit(here: Path) -> None:
    """From a shipped shape alone, whose tokenizer nobody has here."""
    prompt_completion(here)
    said = list[str]()
    small = init("Qwen/Qwen2.5-7B", "pairs.jsonl", memory="12GB", log=said.append)
    assert small.recipe.quantization.load_in_4bit
    assert any("lengths are estimated" in line for line in said)
    assert "# chat_template: chatml" in small.text
    large = init("qwen2.5-7b", "pairs.jsonl", "large.yaml", device="A100 80GB")
    assert large.recipe.model.model_name_or_path == "Qwen/Qwen2.5-7B"
    assert not large.recipe.quantization.active
    assert "#   load_in_4bit: true" in large.text
    with pytest.raises(RequestError, match=r"takes at least .* and there are .* of a card's memory"):
        init("llama-3.2-3b", "pairs.jsonl", "none.yaml", memory="2GB")
    with pytest.raises(RequestError, match=r"which --set says otherwise"):
        init("qwen2.5-7b", "pairs.jsonl", "none.yaml", memory="12GB", overrides=["quantization.load_in_4bit=false"])


def test_what_was_asked_for_stays(bases: Callable[[str], Path], here: Path) -> None:
    (here / "given.csv").write_text("mr,ref\n" + "".join(f'"{a}","{b}"\n' for a, b in zip(ASKED, ANSWERS)), "utf-8")
    begun = init(
        str(bases("smollm2")), "given.csv", task="summarization",
        overrides=["data.columns: {prompt: mr, completion: ref}", "adapter.r=3", "training.max_steps=4"],
    )  # fmt: skip
    assert begun.recipe.data.columns == {"prompt": "mr", "completion": "ref"}
    assert (begun.recipe.adapter.r, begun.recipe.training.max_steps) == (3, 4)  # type: ignore[attr-defined]
    assert "task: summarization" in begun.told
    assert "  # As asked for with --set." in begun.text
    guessed = init(str(bases("smollm2")), "given.csv", "guessed.yaml")
    assert guessed.recipe.data.columns == {"prompt": "mr", "completion": "ref"}
    assert any("A guess" in line for line in guessed.told)


# Wrong requests, and the command


def test_wrong_requests(topwork: Command, bases: Callable[[str], Path], here: Path) -> None:
    rows, base = str(prompt_completion(here).name), str(bases("smollm2"))
    (here / "numbers.csv").write_text("a,b,c\n1,2,3\n4,5,6\n", "utf-8")
    write_jsonl(here / "better.jsonl", [{"prompt": "Why?", "chosen": "So.", "rejected": "No!"} for _ in range(9)])
    wrong: list[tuple[list[str], str]] = [
        (["smollm2-13m", rows], "did you mean 'smollm2-135m'"),
        ([base, "pears.jsonl"], "did you mean 'pairs.jsonl'"),
        ([base, "numbers.csv"], "the data has the columns a, b, c"),
        ([base, "numbers.csv"], "--set 'data."),
        ([base, "better.jsonl"], "need a preference objective (DPO, ORPO), while training.objective is sft"),
        ([base, rows, "--task", "clasification"], "did you mean 'classification'"),
        ([base, rows, "--device", "RTX 4091"], "did you mean"),
        ([base, rows, "--memory", "much"], "expected a size such as 24GB"),
        ([base, rows, "--out", "recipe.txt"], "ends in .yaml"),
        ([base, rows, "--set", "adapter.rank=3"], "adapter.r"),
    ]
    for arguments, words in wrong:
        said = topwork("init", *arguments)
        assert said.code == 2, (arguments, said.out)
        assert words in said.err, (arguments, said.err)
    assert not list(here.glob("*.yaml"))


def test_the_command(topwork: Command, bases: Callable[[str], Path], here: Path) -> None:
    rows = prompt_completion(here).name
    said = topwork("init", bases("smollm2"), rows, "--out", "my rows.yaml")
    assert said.code == 0, said.err
    for word in ("topwork lint 'my rows.yaml'", "topwork plan 'my rows.yaml'", "topwork train 'my rows.yaml'"):
        assert word in said.out
    again = topwork("init", bases("smollm2"), rows, "--out", "my rows.yaml")
    assert again.code == 2
    assert "my rows.yaml is there already" in again.err
    found = json.loads(topwork("init", bases("smollm2"), rows, "--out", "my rows.yaml", "--overwrite", "--json").out)
    assert set(found) == {"path", "told", "recipe"}
    assert found["recipe"]["data"]["train"].endswith("pairs.jsonl")


def test_torch_is_not_imported(bases: Callable[[str], Path], here: Path) -> None:
    prompt_completion(here)
    code = (
        "import sys; from topwork.run.init import init; init(sys.argv[1], 'pairs.jsonl'); "
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, bases("smollm2")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_what_is_told_beside_options_is_of_options_that_there_are() -> None:
    assert set(INSTEAD) <= {*all_keys()}


def test_errors_are_of_their_kind(bases: Callable[[str], Path], here: Path) -> None:
    prompt_completion(here)
    with pytest.raises(ModelError):
        init("no/such-model-anywhere", "pairs.jsonl")
    with pytest.raises(RecipeError):
        init(str(bases("smollm2")), "pairs.jsonl", overrides=["training.lr=1"])


def test_advice_has_nothing_against_the_room_for_short_answers(bases: Callable[[str], Path], here: Path) -> None:
    begun = init(str(bases("smollm2")), csv_with_bom(here).name)
    assert begun.recipe.evaluation.max_new_tokens == 32
    assert "evaluation.max_new_tokens" not in [found.key for found in advise(begun.path).differences or ()]
