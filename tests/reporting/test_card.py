"""Model cards: what the Hub reads of them, what they tell, and what they keep to themselves."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from topwork.common.errors import RequestError
from topwork.reporting import markdown
from topwork.reporting.card import card_of
from topwork.reporting.card_source import without_places

HOSTILE = "a | b `c` *d* [x](http://evil.example) <img src=x> & # --- ``` \n---\n# no\x00heading"
LORA = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "own/b",
}


def write(folder: Path, **files: Any) -> Path:
    """Files by their names without `.json`, or whole names with __ for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (name.replace("__", ".") if "__" in name else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return folder


def a_run(folder: Path, **changes: Any) -> Path:
    """A run as its files tell it, without weights."""
    provenance = {
        "base": {"id": "own/base", "fingerprint": "sha256:ab"},
        "data": {
            "train": {"name": "/home/ada/rows/train.jsonl", "rows": 1152, "sha256": "5e" * 32},
            "eval": {"name": None, "rows": 48},
        },
        "template_sha256": "77" * 32, "seed": 3, "tokens_per_pass": 2048, "hardware": "two cores",
        "versions": {"topwork": "0.1.0"},
    }  # fmt: skip
    recipe = {
        "model": {"model_name_or_path": "/home/ada/models/base", "dtype": "bfloat16"},
        "adapter": {"method": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train": "/home/ada/rows/train.jsonl", "train_on": "answers", "chat_template": None},
        "training": {"objective": "sft", "learning_rate": 2e-4, "seed": 3}, "output_dir": "/home/ada/runs/mine",
    }  # fmt: skip
    result = {
        "steps": 40, "planned_steps": 144, "tokens": 33693, "best_step": 20, "eval_loss_before": 2.7,
        "eval_loss_after": 0.19,
        "parameters": {"trainable": 4884480, "share": 0.035},
        "warnings": ["/home/ada/rows/train.jsonl: two rows stand twice"],
        "data": {"recognised": "read as messages", "train": "1,152 rows", "notes": []}, "system": 'Say "no".',
    }  # fmt: skip
    evaluation = {
        "rows": 300, "grader": "json", "data": "/home/ada/rows/test.jsonl",
        "before": {"exact_match": 0.5, "loss": 2.9, "fields": {"order": 0.1}},
        "after": {"exact_match": 0.25, "loss": 0.2, "fields": {"order": 0.9}},
        "samples": [{"prompt": f"{n}?", "reference": "r", "before": "b", "after": "```\nfence"} for n in range(5)],
    }  # fmt: skip
    files = {"provenance": provenance, "result": result, "evaluation": evaluation} | changes
    write(folder, recipe__yaml=yaml.safe_dump(changes.pop("recipe", recipe)), chat_template__jinja="{{ messages }}")
    write(folder, **{name: content for name, content in files.items() if name not in ("recipe", "adapter")})
    write(folder / "adapter", adapter_config=changes.get("adapter", LORA))
    return folder


def front_of(card: str) -> dict[str, Any]:
    data = ModelCard(card).data.to_dict()
    assert data == yaml.safe_load(card.split("---\n")[1])
    return data


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    card = card_of(a_run(tmp_path / "mine"), repo="ada/tickets")
    front = front_of(card)
    (tmp_path / "README.md").write_text(card, "utf-8")
    assert metadata_load(tmp_path / "README.md") == front
    assert front["base_model"] == "own/base"
    assert (front["library_name"], front["base_model_relation"], front["pipeline_tag"]) == (
        "peft",
        "adapter",
        "text-generation",
    )
    assert front["tags"] == ["lora", "sft", "topwork"]
    assert not {"license", "language", "datasets"} & front.keys(), "nobody has told them"
    (scored,) = ModelCard(card).data.eval_results[:1]  # type: ignore[index]
    assert (scored.dataset_name, scored.metric_type, scored.metric_value) == ("test.jsonl", "exact_match", 0.25)


def test_what_got_worse_stands_there_too(tmp_path: Path) -> None:
    card = card_of(a_run(tmp_path / "mine"))
    assert "| exact match | 50.0 % | 25.0 % | −25.0 | 20–30 % |" in card
    assert "| `order` | 10.0 % | 90.0 % | +80.0 |" in card
    assert "| validation loss | 2.700 | 0.190 |" in card
    assert "300 rows (test.jsonl), graded as json." in card


def test_it_tells_what_was_trained_and_how(tmp_path: Path) -> None:
    card = card_of(a_run(tmp_path / "mine"))
    for told in (
        f"| training | `train.jsonl` | 1,152 | `{'5e' * 32}` |",
        "| held out | rows of the same, drawn by the seed | 48 |",
        "the prompt is masked", f"`{'77' * 32}`", "| Rank, alpha | 16, 32 (alpha/r = 2) |", "4,884,480 (3.5 %)",
        "40 of 144, 33,693 tokens", "| Learning rate | 0.0002 |", "| Seed | 3 |", "topwork 0.1.0",
        "the adapter of step 20", "training.tokens_per_pass: 2048", "train.jsonl: two rows stand twice",
    ):  # fmt: skip
        assert told in card, told


def test_an_adapter_that_it_began_from_is_told_without_its_place(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    provenance = json.loads((run / "provenance.json").read_text("utf-8"))
    begun = {"path": "/home/ada/runs/first", "folder": "/home/ada/runs/first/adapter", "sha256": "c4" * 32}
    write(run, provenance=provenance | {"begun_from": begun})
    card = card_of(run)
    assert f"the adapter `first`, its tensors' file `{'c4' * 32}`" in card
    assert "validation loss (before: with the adapter that it began from)" in card
    assert "/home/ada" not in card


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    provenance = {"base": {"id": "/home/ada/models/base"}, "data": {}}
    made = {"base": "/home/ada/models/base", "sources": [{"name": "/home/ada/runs/one", "sha256": "ab"}]}
    cards = [
        card_of(a_run(tmp_path / "mine")),
        card_of(a_run(tmp_path / "local", provenance=provenance)),
        card_of(write(tmp_path / "merged", config={}, merge=made), run=a_run(tmp_path / "again")),
    ]
    for card in cards:
        assert "/home" not in card
        assert str(tmp_path) not in card
    assert "base_model" not in front_of(cards[1])
    assert "`BASE_MODEL` stands for the base model, `base`, which is not on the Hub." in cards[1]
    assert '"BASE_MODEL"' in cards[1]


def test_the_same_folder_gives_the_same_card(tmp_path: Path) -> None:
    one, two = (card_of(a_run(tmp_path / place / "mine")) for place in "ab")
    assert one == two


def test_names_and_texts_are_no_markup(tmp_path: Path) -> None:
    evaluation = {
        "rows": 3, "grader": HOSTILE, "data": HOSTILE, "after": {"exact_match": 1.0, "fields": {HOSTILE: 1.0}},
        "samples": [{"prompt": HOSTILE, "reference": "```\n# no\n````", "after": HOSTILE}],
    }  # fmt: skip
    card = card_of(a_run(tmp_path / "mine", evaluation=evaluation, adapter={**LORA, "target_modules": HOSTILE}))
    front_of(card)
    headings = [line for line in _outside_fences(card) if line.startswith("#")]
    assert {line for line in headings if "no" in line.split()} == set()
    outside = "\n".join(_outside_fences(card))
    assert not re.search(r"(?<![\\`])<img", re.sub(r"(`+) ?.*? ?\1", "", outside))
    assert not re.search(r"(?<!\\)\]\(http://evil", re.sub(r"(`+) ?.*? ?\1", "", outside))
    for table in re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    assert "\x00" not in card


def _outside_fences(card: str) -> list[str]:
    found, fence = [], ""
    for line in card.split("---\n", 2)[2].splitlines():
        opened = re.match(r"`{3,}", line)
        if fence:
            fence = "" if line == fence else fence
        elif opened:
            fence = opened.group()
        else:
            found.append(line)
    assert not fence
    return found


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0.001", "0.001"), ("1. one", r"1\. one"), ("- x", r"\- x"), ("a_b|c", r"a\_b\|c"), ("x\ny", "x y")],
)
def test_prose(value: str, expected: str) -> None:
    assert markdown.text(value) == expected


def test_code_spans_hold_their_backticks() -> None:
    assert markdown.code("a") == "`a`"
    assert markdown.code("`a`") == "`` `a` ``"
    assert markdown.fenced("a\n```\n````").startswith("`````text\n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ada/x.jsonl", "x.jsonl"), ("see ~/a/b/c.txt, ../d/e", "see c.txt, e"), (r"C:\Users\ada\x.txt", "x.txt"),
        ("and/or/both", "and/or/both"), ("https://a.b/c/d", "https://a.b/c/d"), ("own/base", "own/base"),
        ("</x/y>", "</x/y>"),
    ],
)  # fmt: skip
def test_paths_are_cut_wherever_they_stand(value: str, expected: str) -> None:
    assert without_places({"a": [value]}) == {"a": [expected]}


def test_a_name_that_yaml_would_take_for_something_else(tmp_path: Path) -> None:
    for name in ("yes", "1e3", "- a: b", "#x", "---"):
        assert front_of(card_of(a_run(tmp_path / name)))["model-index"][0]["name"] == name


def test_samples_are_as_many_as_asked_for(tmp_path: Path) -> None:
    run = a_run(tmp_path / "mine")
    assert [card_of(run, samples=count).count("**asked**") for count in (0, 2, 9)] == [0, 2, 5]
    assert "## Samples" not in card_of(run, samples=0)


def test_data_sets_of_the_hub_are_named(tmp_path: Path) -> None:
    recipe = {"data": {"train": ["own/rows:main:train", {"path": "rows/local"}], "eval": None}}
    train = {"name": "own/rows:main:train, rows/local", "rows": 2, "files": {"rows/local/a.jsonl": "aa"}}
    run = a_run(tmp_path / "mine", recipe=recipe, provenance={"base": {"id": "own/base"}, "data": {"train": train}})
    card = card_of(run)
    assert front_of(card)["datasets"] == ["own/rows"]
    assert "- own/rows:main:train\n  - path: local\n" in card
    assert "`a.jsonl`" in card


@pytest.mark.parametrize(
    ("adapter", "vllm", "llama_cpp"),
    [
        ({"r": 24}, "--max-lora-rank 32 --lora-modules mine=OWNER/NAME", "--format gguf-adapter"),
        ({"rank_pattern": {"k_proj": 100}}, "--max-lora-rank 128 --lora-modules mine=mine-vllm", "gguf-adapter"),
        ({"use_rslora": True}, "topwork export mine mine-vllm --format vllm", "--format gguf-adapter"),
        ({"lora_alpha": 2.5}, "an alpha that is no whole number", "--format gguf-adapter"),
        ({"target_modules": ["lm_head"]}, "which may be tied", "--format gguf-adapter"),
        ({"r": 600}, "over the largest that vLLM takes, 512", "--format gguf-adapter"),
        ({"use_dora": True}, "it reads no DoRA", "topwork export mine mine-gguf --format gguf --type q8_0"),
        ({"modules_to_save": ["lm_head"]}, r"trained whole (lm\_head)", "--format gguf --type"),
        ({"trainable_token_indices": [1]}, "no rows of single tokens", "--format gguf --type"),
        ({"peft_type": "IA3"}, "it reads LoRA alone, and this is IA3", "--format gguf --type"),
        ({"peft_type": "PREFIX_TUNING"}, "knows no learned tokens", "Not at all"),
    ],
)
def test_readers_are_told_what_is_right_for_this_adapter(
    tmp_path: Path, adapter: dict[str, Any], vllm: str, llama_cpp: str
) -> None:
    card = card_of(a_run(tmp_path / "mine", adapter={**LORA, **adapter}))
    sections = dict(re.findall(r"### (.*)\n\n((?:(?!\n##).*\n)+)", card))
    assert vllm in sections["vLLM"]
    assert llama_cpp in next(text for reader, text in sections.items() if reader.startswith("llama.cpp"))
    assert ("--enable-lora" in sections["vLLM"]) == (not sections["vLLM"].startswith("Not "))


def test_a_template_of_its_own_is_told_to_vllm(tmp_path: Path) -> None:
    run = a_run(
        tmp_path / "mine", recipe={"model": {}, "data": {"train": "x.jsonl", "chat_template": "/home/x/own.jinja"}}
    )
    card = card_of(run, repo="ada/tickets")
    assert "hf download ada/tickets chat_template.jinja --local-dir ." in card
    assert "--chat-template chat_template.jinja" in card
    assert "chat_template: chat_template.jinja" in card


def test_a_run_that_does_not_come_again_from_its_recipe_says_why(tmp_path: Path) -> None:
    run = a_run(tmp_path / "mine")
    first = json.loads((run / "provenance.json").read_text())
    surroundings = {name: first.get(name) for name in ("hardware", "versions")}
    assert "The same machine and versions give the same" in card_of(run)
    for more, told, row, same in (
        ({"resumed": [surroundings]}, "The same machine and versions", "| Resumed | once |", True),
        ({"resumed": [surroundings, {**surroundings, "hardware": "another"}]}, "resumed on another machine",
         "| Resumed | 2 times |", False),
        ({"trained_together": ["mine", "b", "c"]}, "in the same passes as others",
         "| Trained together with | 2 others |", False),
    ):  # fmt: skip
        (run / "provenance.json").write_text(json.dumps(first | more))
        card = card_of(run)
        assert told in card
        assert row in card
        assert ("give the same\nbytes" in card) == same


def test_a_base_in_4_bits_is_told_where_readers_have_it_in_16(tmp_path: Path) -> None:
    recipe = {"model": {}, "quantization": {"load_in_4bit": True}, "data": {"train": "x.jsonl"}}
    card = card_of(a_run(tmp_path / "mine", recipe=recipe))
    assert card.count("In training the base was held in 4 bits; here the adapter meets its 16-bit weights.") == 2


def test_a_quantized_base_is_loaded_as_training_held_it(tmp_path: Path) -> None:
    held = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "block_size": 64}
    recipe = {"model": {"dtype": "float16", "revision": "v1"}, "quantization": held, "data": {"train": "x.jsonl"}}
    card = card_of(a_run(tmp_path / "mine", recipe=recipe))
    assert 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False' in card
    assert 'dtype=torch.float16, revision="v1", quantization_config=bits' in card
    other = card_of(a_run(tmp_path / "other", recipe={**recipe, "quantization": {**held, "block_size": 128}}))
    assert "BitsAndBytesConfig" not in other, "bitsandbytes in transformers has blocks of 64 alone"


def test_a_combined_adapter_tells_its_sources_and_what_it_kept_of_each(tmp_path: Path) -> None:
    record = {
        "method": "ties", "settings": {"ties_weights": "mergekit"},
        "base": {"name": "own/b", "fingerprint": "sha256:ab"},
        "sources": [
            {"name": "/home/ada/one", "content": "sha256:aa", "method": "lora", "rank": 8, "weight": 1.0},
            {"name": "signer", "content": "sha256:bb", "method": "dora", "rank": 4, "weight": -1.0},
        ],
        "discarded_energy": {"overall": 0.0312, "modules": {f"m{n}": 0.1 for n in range(210)}},
        "evaluation": [
            {
                "data": "/home/ada/rows.jsonl", "rows": 50, "grader": "exact_match",
                "scores": {"result": {"exact_match": 0.5, "loss": 0.3}, "one": {"exact_match": 0.75, "loss": 0.2}},
            }
        ],
    }  # fmt: skip
    card = card_of(write(tmp_path / "combined", adapter_config=LORA, combine=record, chat_template__jinja="x"))
    for told in (
        "combined from several", "| `one` | lora, rank 8 | +1 | `aa` |", "| `signer` | dora, rank 4 | -1 | `bb` |",
        "| method | ties |", "ties\\_weights: mergekit", "overall: 0.0312; modules: 210 entries",
        "50 rows (rows.jsonl):", "| exact match | 50.0 % | 75.0 % |", "| loss | 0.300 | 0.200 |",
        'AutoTokenizer.from_pretrained("own/b")', 'hf_hub_download("OWNER/NAME", "chat_template.jinja")',
    ):  # fmt: skip
        assert told in card, told
    assert front_of(card)["tags"] == ["lora", "combine", "topwork"]
    assert "/home" not in card


def test_folders_that_commands_wrote(tmp_path: Path) -> None:
    merged = card_of(write(tmp_path / "merged", config={}, merge={"base": "own/b", "dtype": "bfloat16"}))
    assert (front_of(merged)["library_name"], front_of(merged)["base_model_relation"]) == ("transformers", "finetune")
    exported = {
        "format": "gguf", "figures": {"merge": {"base_model": "own/b"}}, "reader": "llama.cpp",
        "use": ["run /home/ada/x"],
        "read_back": [{"by": "llama.cpp", "prompts": 4, "largest": 0.72, "unit": "nats", "details": {"answers": 4}}],
        "findings": [{"feature": "rslora", "found": "2", "unseen": "scales by alpha / r", "action": "folded"}],
    }  # fmt: skip
    gguf = card_of(write(tmp_path / "gguf", x__gguf="", export=exported))
    assert "- rslora (2), which llama.cpp scales by alpha / r: folded." in gguf
    assert "- Read back by llama.cpp: log-probabilities 7.2e-01 nats apart at most, on 4 prompts." in gguf
    assert "GGUF files of [own/b](https://huggingface.co/own/b) with an adapter folded in, written" in gguf
    assert "run " not in gguf
    assert "llama-server -m b-gguf/x.gguf --jinja" in gguf
    exported = {"format": "ollama", "figures": {"file": "a.gguf", "model": "b.gguf"}, "base_model": "own/b"}
    ollama = card_of(write(tmp_path / "ollama", a__gguf="", b__gguf="", Modelfile="FROM", export=exported))
    assert front_of(ollama)["base_model_relation"] == "adapter"
    assert "llama-server -m b-ollama/b.gguf --lora b-ollama/a.gguf" in ollama
    assert "ollama create b-ollama -f b-ollama/Modelfile" in ollama
    assert front_of(gguf)["base_model_relation"] == "finetune"
    plain = card_of(write(tmp_path / "plain", x__gguf="", export={"format": "gguf", "base_model": "own/b"}))
    assert front_of(plain)["base_model_relation"] == "quantized"
    assert "llama-server -m b-gguf/x.gguf" in gguf
    with pytest.raises(RequestError, match="neither an adapter"):
        card_of(write(tmp_path / "nothing", notes={}))
