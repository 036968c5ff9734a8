"""How a run's end is told: whether it is better than its base, on how much, and what to do next."""

from pathlib import Path
from typing import Any

import pytest

from topwork.cli.train import trained_lines

RESULT: dict[str, Any] = {
    "eval_loss_before": 2.5, "eval_loss_after": 1.25, "best_eval_loss": 1.25, "best_step": 30, "steps": 40,
    "first_loss": 2.0, "last_loss": 1.0, "tokens": 12_000, "seconds": 60.0, "tokens_per_second": 200.0,
    "peak_memory_bytes": 2**30, "plan": {"held_out_rows": 48},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {},
            "1.2500, the lower the better: better than the base on 48 held-out rows; the adapter is step 30's",
        ),
        ({"eval_loss_after": 2.6, "best_eval_loss": 2.6}, "NOT better than the base without this training on 48"),
        ({"eval_loss_after": 2.5, "best_eval_loss": 2.5}, "NOT better than the base without this training on 48"),
        ({"eval_loss_after": 1.5}, "the adapter is step 40's"),
        ({"plan": {"held_out_rows": 3}}, "on 3 held-out rows, which are few to go by;"),
        ({"plan": {"held_out_rows": 1}}, "on 1 held-out row, which is little to go by;"),
        ({"eval_loss_before": None, "plan": {"held_out_rows": 0}}, "no validation loss"),
    ],
)
def test_the_validation_loss_in_words(change: dict[str, Any], words: str) -> None:
    assert words in trained_lines(Path("run"), RESULT | change)[0]


def test_a_run_whose_metrics_were_lost_ends_without_a_traceback() -> None:
    lost = RESULT | {"first_loss": None, "last_loss": None, "tokens_per_second": None, "seconds": 0}
    assert trained_lines(Path("run"), lost)[1] == "40 steps, of which metrics.jsonl has no loss any more"


def test_commands_that_are_copied_find_the_run() -> None:
    lines = trained_lines(Path("my runs/a"), RESULT)
    assert "adapter: my runs/a/adapter" in lines
    assert [line.split("topwork ")[1].split("    ")[0] for line in lines if "topwork " in line] == [
        "eval 'my runs/a'", "chat 'my runs/a'", "report 'my runs/a'", "merge 'my runs/a' OUT",
    ]  # fmt: skip
    none = trained_lines(Path("a"), RESULT | {"plan": {"held_out_rows": 0}})
    assert any("topwork eval a --data ROWS  " in line for line in none), "without them it has nothing to ask"
