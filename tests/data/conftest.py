from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_tokenizers import build_tokenizer

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
        pytest.skip("the folder of real data sets is not beside the project")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """write(name, content): a file in a folder of its own, and its path."""

    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return to
