from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_tokenizers import build_tokenizer
from made_files import write_made

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(family, template=None): the family's special tokens and template; pad is EOS, as in SmolLM2."""
    return build_tokenizer


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, where the project stands beside one."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are too large for the repository; made rows in their columns stand for them")
    return folder


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the same names with two made rows in each file."""
    return write_made(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session", params=["made", "real"])
def data_sets(request: pytest.FixtureRequest) -> Path:
    """Both, one after the other."""
    return request.getfixturevalue(f"{request.param}_data")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """write(name, content): a file in a folder of its own, and its path."""

    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return to
