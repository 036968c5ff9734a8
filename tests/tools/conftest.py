"""Paths of the scripts under test: tools/ and benchmarks/ are no packages."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes what tools/gpu_check.py imports importable; the repository's root."""
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return ROOT
