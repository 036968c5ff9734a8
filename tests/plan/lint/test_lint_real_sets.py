"""Data sets that many train on are clean: what lint has to say of them are notices."""

from pathlib import Path
from typing import Any

import pytest

from data.family_tokenizers import build_tokenizer
from plan.lint.linted import Linted
from topwork.plan.lint.examine import examine
from topwork.recipe.recipe import make_recipe

DATA = Path(__file__).parents[3].parent / "shared" / "data"
LENGTH = 1_000_000
"""The small tokenizer needs many tokens for a text, and length is not what is looked at here."""

SETS: dict[str, dict[str, Any]] = {
    # training file: options of data; `test` is evaluation.data, `eval` data.eval
    "banking77/train.csv": {"columns": {"prompt": "text", "completion": "category"}, "test": "banking77/test.csv"},
    "gsm8k/train.jsonl": {"test": "gsm8k/test.jsonl"},
    "e2e_nlg/devset.csv": {"columns": {"prompt": "mr", "completion": "ref"}, "test": "e2e_nlg/testset_w_refs.csv"},
    "mlx_wikisql/train.jsonl": {"eval": "mlx_wikisql/valid.jsonl", "test": "mlx_wikisql/test.jsonl"},
    "rasbt_instruct/instruction-data.json": {},
    "llamafactory_demo/identity.json": {},
    "llamafactory_demo/v1_sft_demo.jsonl": {},
    "llamafactory_demo/glaive_toolcall_en_demo.json": {"chat_template": "chatml"},
    "fastchat/dummy_conversation.json": {},
    "torchtune_tiny/alpaca_tiny.json": {},
    "torchtune_tiny/chat_tiny.json": {},
    "torchtune_tiny/instruct_tiny.json": {},
    "foundry_formats/gsm8k_chat_train.jsonl": {"eval": "foundry_formats/gsm8k_chat_validation.jsonl"},
    "foundry_formats/stock_toolcall_training.jsonl": {"chat_template": "chatml"},
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets stand beside a checkout, too large for the repository")
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_real_set_gives_no_error_and_no_warning(name: str) -> None:
    options = dict(SETS[name])
    test, evaluation = options.pop("test", None), options.pop("eval", None)
    data = {"train": str(DATA / name), "max_length": LENGTH, **options}
    values: dict[str, Any] = {"model": {"model_name_or_path": "none"}, "data": data}
    if evaluation:
        data["eval"] = str(DATA / evaluation)
    if test:
        values["evaluation"] = {"data": str(DATA / test)}
    found = Linted(examine(make_recipe(values), build_tokenizer("smollm2"), LENGTH, 5_000_000))
    assert found.grave == []
    assert len(found.examined.train.sequences) >= found.examined.train.rows


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets stand beside a checkout, too large for the repository")
@pytest.mark.slow
def test_rows_that_banking77_has_in_both_files_are_found() -> None:
    values = {
        "model": {"model_name_or_path": "none"},
        "data": {
            "train": str(DATA / "banking77/train.csv"), "columns": {"prompt": "text", "completion": "category"},
            "max_length": LENGTH,
        },
        "evaluation": {"data": str(DATA / "banking77/test.csv")},
    }  # fmt: skip
    found = Linted(examine(make_recipe(values), build_tokenizer("smollm2"), LENGTH, None))
    leaked = found.of("test-rows-in-training")
    assert leaked.severity == "notice"
    assert len(leaked.rows) >= 6
