"""What the server's tests share: a tiny base with a tokenizer, two adapters of it below a folder, a run, processes."""

from pathlib import Path

import pytest

from run.fixtures import commands, tickets, tiny_llama, trained
from serving.scripted import adapter_folder, tiny
from topwork.models.base import Base

__all__ = ["commands", "tickets", "tiny_llama", "trained"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Random, two layers, a context of 2048."""
    return tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one` and `two`."""
    folder = tmp_path_factory.mktemp("adapters")
    adapter_folder(base, folder / "one", 1)
    adapter_folder(base, folder / "two", 2)
    return folder
