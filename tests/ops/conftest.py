"""What tests of a layer's element-wise kernels share."""

import pytest

from topwork.ops.native import layer


@pytest.fixture(params=["native", "truth"])
def layer_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test that takes this runs on the C kernels, where there are any, and on plain torch."""
    if request.param == "truth":
        monkeypatch.setattr(layer, "kernels", lambda: None)
    elif layer.kernels() is None:
        pytest.skip("no C compiler")
