"""An adapter as it is named: a run's folder, a PEFT folder, or neither."""

from pathlib import Path

import pytest

from topwork.common.errors import RequestError
from topwork.run.given import given_adapter, is_adapter


def test_a_folder_that_is_neither_is_told_what_was_expected(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    with pytest.raises(RequestError, match=r"neither a run's folder .* nor an adapter's"):
        given_adapter(tmp_path)
