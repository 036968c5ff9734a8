from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_tokenizers import build_tokenizer
from made_files import write_made

DATA = Path(__file__).parents[2].parent / "shared" / "data"
"""Real data sets, too large for the repository."""


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(family, template=None): the family's special tokens and template; pad is EOS, as in SmolLM2."""
    return build_tokenizer


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files named as those of well-known data sets, with two made rows in their columns."""
    return write_made(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session", params=["made", *(["real"] if DATA.is_dir() else [])])
def data_sets(request: pytest.FixtureRequest, made_data: Path) -> Path:
    """The made files, and the real ones where they stand beside a checkout."""
    return made_data if request.param == "made" else DATA


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """write(name, content): a file in a folder of its own, and its path."""

    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return to


@pytest.fixture
def open_case(small_llama: Path, tmp_path: Path) -> Callable[[str], Any]:
    """open_case(number) -> a Case (`case_folders`); its tokenizer is of llama 2's kind and has no template."""
    from transformers import AutoTokenizer

    from data.case_folders import Case

    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    return lambda number: Case(number, tmp_path, small_llama, tokenizer)
