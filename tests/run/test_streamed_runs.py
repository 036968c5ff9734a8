"""A run whose rows are streamed: the adapter of one that holds them, and the same bytes after a stop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from topwork.common.errors import RequestError, RunError
from topwork.run.merge import merge
from topwork.run.train import train, train_together

FITS: dict[str, Any] = {"max_length": 300}


@pytest.fixture
def streamed(make_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """streamed(name, streaming=True, data={}, training={}): a recipe."""

    def make(name: str, streaming: bool = True, data: Any = {}, training: Any = {}) -> Path:  # noqa: B006
        return make_recipe(name, data={**FITS, "streaming": streaming, **data}, training=training)

    return make


def recipes(*paths: Path) -> list[Any]:
    from topwork.recipe.recipe import load_recipe

    return [load_recipe(path, ()) for path in paths]


def test_its_adapter_is_the_one_of_a_run_that_holds_its_rows(streamed: Callable[..., Path]) -> None:
    said: list[str] = []
    one = train(streamed("streamed"), log=said.append)
    other = train(streamed("held", streaming=False), log=lambda _: None)
    assert tiny.folder_bytes(one.folder / "adapter") == tiny.folder_bytes(other.folder / "adapter")
    before, after = (json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, other))
    assert before["loss"] == after["loss"]
    assert any(line.startswith("train: 36 rows, streamed: an epoch reads 36, ") for line in said), said
    assert any(line.startswith("train, as far as it was streamed: 96 rows -> 96 sequences; ") for line in said), said
    assert len(merge(one.folder, one.folder.parent / "merged", log=lambda _: None)) > 0


def test_stopped_and_resumed_it_ends_with_the_same_bytes(streamed: Callable[..., Path]) -> None:
    unbroken = train(streamed("unbroken"), log=lambda _: None).folder
    path, said = streamed("broken"), list[str]()
    for stop in (6, 12, None):
        train_together(recipes(path), resume=stop != 6, log=said.append, stop_at=stop)
    run = path.parent / "broken"
    assert sum("going on from" in line for line in said) == 2
    assert tiny.folder_bytes(run / "adapter") == tiny.folder_bytes(unbroken / "adapter")
    last = "checkpoints/step-000024"
    assert tiny.folder_bytes(run / last) == tiny.folder_bytes(unbroken / last)
    told = json.loads((unbroken / "result.json").read_text("utf-8"))
    numbers = f"{told['tokens']:,} tokens, {told['learned_tokens']:,} learned; "
    assert said[-1].startswith(f"train, as far as it was streamed: 96 rows -> 96 sequences; {numbers}")


def test_other_rows_under_the_same_name_are_refused(
    streamed: Callable[..., Path], tmp_path: Path, tickets: Path
) -> None:
    rows = Path(shutil.copy(tickets, tmp_path / "rows.jsonl"))
    path = streamed("run", data={"train": str(rows)})
    train_together(recipes(path), log=lambda _: None, stop_at=3)
    rows.write_text(rows.read_text("utf-8").replace("Order 7:", "Order 8:"), "utf-8")
    with pytest.raises(RequestError, match="other training rows"):
        train_together(recipes(path), resume=True, log=lambda _: None)


def test_a_row_that_is_too_long_stops_it_and_it_goes_on_without(
    streamed: Callable[..., Path], tmp_path: Path, tickets: Path
) -> None:
    lines = tickets.read_text("utf-8").splitlines()
    for number in (5, 6):
        row = json.loads(lines[number])
        row["messages"][0]["content"] += " Please help." * 200
        lines[number] = json.dumps(row)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines), "utf-8")
    data = {"train": str(rows), "eval_fraction": 0}
    with pytest.raises(RunError, match=r"(?s)step \d+: .*rows\.jsonl:[67].*--resume"):
        train(streamed("run", data=data, training={"save_steps": 1}), log=lambda _: None)
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    said: list[str] = []
    changed = streamed("run", data=data | {"too_long": "drop"}, training={"save_steps": 1})
    train(changed, resume=True, log=said.append)
    assert any("going on from" in line for line in said)
    assert "rows: longer than 300 tokens, and dropped (rows.jsonl:" in said[-1]
    unbroken = train(
        streamed("other", data=data | {"too_long": "drop"}, training={"save_steps": 1}), log=lambda _: None
    )
    assert tiny.folder_bytes(tmp_path / "run" / "adapter") == tiny.folder_bytes(unbroken.folder / "adapter")
    with pytest.raises(RequestError, match=r"data\.too_long: 'drop' then, 'truncate' now"):
        train(streamed("run", data=data | {"too_long": "truncate"}, training={"save_steps": 1}), resume=True)
