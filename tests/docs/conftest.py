from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """tool(name) -> a script of tools/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return import_module
