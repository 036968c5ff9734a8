"""PEFT's own tables of methods and options on our models (`reference/peft_rows.py`): equal, or refused by name."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from reference.peft_rows import rows
from reference.peft_tables import outcome, outcomes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from peft_tables import PAGE, page  # noqa: E402

EQUAL = 150
"""Rows that are to be equal, at least."""
SOME = (
    "AdaLoRA on llama", "BOFT on opt", "GraLoRA, hybrid on qwen2", "HiRA on gpt2", "p-tuning on llama", "RoAd on opt",
    "SHiRA on llama", "VB-LoRA on gpt2", "WaveFT on llama", "MLP 6 LoHa on opt", "MLP 8 LoKr on opt",
    "MLP 9 OFT on opt",
)  # fmt: skip
REFUSED = {
    "aLoRA on llama": "alora_invocation_tokens",
    "TinyLoRA on llama": "TINYLORA",
    "MLP KaSA on opt": "kasa_config",
}


@pytest.mark.slow
def test_no_row_is_wrong_and_the_page_says_what_is() -> None:
    found = list(outcomes(rows()))
    wrong = [(tried.row.name, tried.told, tried.apart) for tried in found if tried.kind == "wrong"]
    assert not wrong
    assert sum(tried.kind == "equal" for tried in found) >= EQUAL
    assert PAGE.read_text("utf-8") == page(found), "python tools/peft_tables.py writes the page anew"


def test_every_row_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(row.name for row in rows()).items() if count > 1] == []


@pytest.mark.parametrize("name", SOME)
def test_folders_of_methods_that_are_read(name: str) -> None:
    (row,) = (row for row in rows() if row.name == name)
    tried = outcome(row)
    assert tried.kind == "equal", tried


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named(name: str) -> None:
    (row,) = (row for row in rows() if row.name == name)
    tried = outcome(row)
    assert (tried.kind, REFUSED[name] in tried.told) == ("refused", True), tried
