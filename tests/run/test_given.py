"""An adapter as it is named: a run's folder, a PEFT folder, or neither."""

import shutil
from pathlib import Path

import pytest

from topwork.common.errors import RequestError
from topwork.run.given import given_adapter, is_adapter


def test_a_folder_that_is_neither_is_told_what_was_expected(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    with pytest.raises(RequestError, match=r"neither a run's folder .* nor an adapter's"):
        given_adapter(tmp_path)


def test_adapters_in_folders_of_their_names_are_told(tmp_path: Path) -> None:
    for name in ("support", "terse"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"support, .*terse, as PEFT saves adapters that have names; give one of"):
        given_adapter(tmp_path)


def test_a_runs_adapter_folder_is_the_runs_adapter(trained: Path, tmp_path: Path) -> None:
    """Alone it would be read with the base's template, and on a base that is held otherwise than in training."""
    whole, named = given_adapter(trained), given_adapter(trained / "adapter")
    assert (named.place, named.recipe, named.template) == (whole.place, whole.recipe, whole.template)
    assert named.template is not None
    copied = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    assert given_adapter(copied).recipe is None
    assert given_adapter(trained / "adapter", str(tmp_path)).recipe is None
