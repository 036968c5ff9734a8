"""What all tests share: one thread, one seed, the models that may be absent, small bases that a seed makes."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proven import OPTION, PROVEN, ROOT, is_proven

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft asks the Hub for a base's config as it saves

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells begin what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

STORIES = Path(__file__).parents[1].parent / "shared" / "models" / "stories260k"
"""A llama of 260 thousand parameters that learned to tell stories, too large for the repository."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums come out in the same order wherever the tests run, and workers do not fight for cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stories260k is (five layers, a tied head, a tokenizer that puts a BOS in front), but a seed makes it."""
    from data.family_tokenizers import sentencepiece_tokenizer
    from run.tiny import write_model

    folder = tmp_path_factory.mktemp("made") / "llama"
    return write_model(folder, tokenizer=sentencepiece_tokenizer(), num_hidden_layers=5, tie_word_embeddings=True)


@pytest.fixture(scope="session", params=["made", *(["stories260k"] if STORIES.is_dir() else [])])
def small_llama(request: pytest.FixtureRequest, made_llama: Path) -> Path:
    """A small llama's folder: one that every checkout makes, and a real one where it stands beside a checkout."""
    return made_llama if request.param == "made" else STORIES


@pytest.fixture
def tiny_base() -> Callable[..., object]:
    """tiny_base(family, dtype=..., **config values) -> a random frozen Base of that family on flat batches."""
    from reference.families import tiny_base

    return tiny_base


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--again`."""
    parser.addoption(
        OPTION, action="store_true", help="also what passed on these very sources before (tests/proven.py)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker is left alone with one in the end; without those that are proven."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if config.getoption(OPTION):
        return
    spared = [item for item in items if item.get_closest_marker("slow") and is_proven(_file(item))]
    if spared:
        items[:] = [item for item in items if item not in spared]
        config.hook.pytest_deselected(items=spared)


def _file(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT).as_posix()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Which tests are left out, and why: workers that deselect some do not tell."""
    spared = [] if config.getoption(OPTION) else [file for file in PROVEN if is_proven(file)]
    if spared:
        told = "slow tests left out, since they passed on these very sources before (make proven runs them)"
        terminalreporter.write_line(f"{told}: {', '.join(spared)}")
