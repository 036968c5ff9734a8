"""`topwork init` on real data sets, as they were published: a recipe that trains as it stands, or what is amiss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from run import tiny
from topwork.common.errors import DataError
from topwork.run.init import init
from topwork.run.train import train

DATA = Path(__file__).parents[2].parent / "shared" / "data"
"""Beside a checkout, for who has them; too large for the repository."""
TRAINS = {
    # path: (the task that is recognised, an option that is chosen)
    "banking77": ("classification", ("columns", {"prompt": "text", "completion": "category"})),
    "e2e_nlg/devset.csv": ("instruction", ("columns", {"prompt": "mr", "completion": "ref"})),
    "fastchat/dummy_conversation.json": ("chat-style", ("too_long", "oldest_turns")),
    "foundry_formats/stock_toolcall_training.jsonl": ("tool-calls", ("chat_template", "chatml")),
    "gsm8k/test.jsonl": ("instruction", ("too_long", "middle")),
    "llamafactory_demo/identity.json": ("instruction", ("on_bad_row", "refuse")),
    "mlx_wikisql": ("continued-pretraining", ("too_long", "split")),
    "rasbt_instruct/instruction-data.json": ("instruction", ("chat_template", None)),
    "torchtune_tiny/alpaca_tiny.json": ("instruction", ("chat_template", None)),
    "wikitext2/valid.txt": ("continued-pretraining", ("documents", "paragraph")),
}
REFUSED = {
    "foundry_formats/orca_dpo_pairs.validation.jsonl": "need a preference objective",
    "hh_rlhf/helpful-base.test.jsonl": "need a preference objective",
    "llamafactory_demo/kto_en_demo.json": "need a preference objective",
    "foundry_formats/countdown_train_100.jsonl": "no answer: the last message is the user's",
    "llamafactory_demo": "files of one source hold rows of one kind",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with SmolLM2's template, which reads 16,384 tokens: its tokens are letters."""
    folder = tiny.write_model(tmp_path_factory.mktemp("base") / "tiny")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}), "utf-8")
    return folder


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """found(name): a data set's path; the test is skipped where it is not there. The test's folder is the current."""
    monkeypatch.chdir(tmp_path)

    def path(name: str) -> str:
        if not (DATA / name).exists():
            pytest.skip(f"{DATA / name} is not on this machine")
        return str(DATA / name)

    return path


@pytest.mark.parametrize("name", TRAINS)
def test_it_trains(name: str, base: Path, found: Callable[[str], str]) -> None:
    task, (option, value) = TRAINS[name]
    begun = init(str(base), found(name))
    assert any(line.startswith(f"task: {task} (") for line in begun.told), begun.told
    assert getattr(begun.recipe.data, option) == value
    run = train(begun.path, ["training.max_steps=1", "data.max_rows=48"], log=lambda _: None)
    assert run.result["steps"] == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_amiss_is_said(name: str, base: Path, found: Callable[[str], str]) -> None:
    with pytest.raises(DataError, match=REFUSED[name]):
        init(str(base), found(name))
    assert not list(Path().glob("*.yaml"))
