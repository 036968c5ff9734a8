"""What a step costs a GPU's host: launches, and waits; and where a validation and generation wait. Counted on a card
that only writes down what it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reference.fake_card import build

STEPS = Path(__file__).with_name("card_steps.py")
LAUNCHES = {
    "lora": 66, "six loras": 66, "qlora": 86, "lora with dropout": 78, "dora": 134, "ia3": 39, "prefix": 42,
    "prompt": 27,
}  # fmt: skip
"""The most that a layer may launch, forward and backward."""
ONE_WAIT = {"_to_copy to the host": 1}


@pytest.mark.slow
def test_what_steps_launch_and_wait_for(triton, tmp_path: Path) -> None:
    """All in one, since counting takes a while, and workers do not share it.

    Whatever asks a tensor of the card for its value, but by a copy to the host, raises.
    """
    library = build(tmp_path)
    if library is None:
        pytest.skip("no C++ compiler, with which the device is made")
    done = subprocess.run([sys.executable, str(STEPS), str(library), *LAUNCHES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert len(found["waits"]) == 16
    for kind, waits in found["waits"].items():  # for losses and norms of all adapters; for losses; for all tokens
        assert waits == {"step": ONE_WAIT, "validation": ONE_WAIT, "tokens": [ONE_WAIT] * 3}, kind

    for kind, most in LAUNCHES.items():
        layer = found["layers"][kind]
        assert layer["_flash_attention_forward"] == layer["_flash_attention_backward"] == 1
        assert sum(layer.values()) <= most, (kind, layer)
    assert found["layers"]["six loras"] == found["layers"]["lora"]

    # PyTorch's attention makes three gradients that are then copied. Ours does one of them, since on this card all
    # memory stands at zero, and so each gradient seems to overwrite its queries
    by_torch, ours = found["layers"]["lora"], found["layers"]["our attention"]
    kernels = ("triton:attend", "triton:attend_backward_queries", "triton:attend_backward_keys")
    assert [ours.pop(name) for name in kernels] == [1, 1, 1]
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        del by_torch[name]
    by_torch["copy_"] -= 2
    assert ours == {name: count for name, count in by_torch.items() if count}


@pytest.fixture
def triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux)")
