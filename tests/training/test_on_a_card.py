"""What a step costs a GPU's host: launches, and waits; and where a validation and generation wait. Counted on a card
that only writes down what it is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reference.fake_card import build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("card")]

STEPS = Path(__file__).with_name("card_steps.py")
LAUNCHES = {
    "lora": 66, "six loras": 66, "qlora": 86, "lora with dropout": 78, "dora": 134, "ia3": 39, "prefix": 42,
    "prompt": 27,
}  # fmt: skip
"""The most that a layer may launch, forward and backward."""
OTHERS = (
    "checkpointed lora", "checkpointed prefix", "saved head", "head", "trained tokens", "full", "8-bit optimizer",
)  # fmt: skip
"""What is no other layer, or makes one twice."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    pytest.importorskip("triton", reason="triton is not installed (it has wheels for Linux)")
    library = build(tmp_path_factory.mktemp("card"))
    if library is None:
        pytest.skip("no C++ compiler, with which the device is made")
    done = subprocess.run([sys.executable, str(STEPS), str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", [*LAUNCHES, *OTHERS])
def test_the_host_waits_once_a_step(counted, kind: str) -> None:
    """For the losses and norms of all adapters, at its end, and in a validation for those losses. Whatever else asks a
    tensor of the card for its value raises; a copy that does not say `non_blocking` would show here too."""
    assert counted[kind]["waits"] == counted[kind]["validation"] == {"_to_copy to the host": 1}


@pytest.mark.parametrize("kind", [*LAUNCHES, *OTHERS])
def test_the_host_waits_once_a_token(counted, kind: str) -> None:
    """For the tokens of all sequences: not in every layer, nor for where an adapter's rows are."""
    assert counted[kind]["tokens"] == [{"_to_copy to the host": 1}] * 3


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches_of_a_layer(counted, kind: str) -> None:
    layer = counted[kind]["layer"]
    assert layer["_flash_attention_forward"] == layer["_flash_attention_backward"] == 1
    assert sum(layer.values()) <= LAUNCHES[kind], layer


def test_six_adapters_launch_what_one_does(counted) -> None:
    assert counted["six loras"]["layer"] == counted["lora"]["layer"]


def test_our_attention_is_three_launches_and_writes_gradients_in_place(counted) -> None:
    """Where PyTorch's makes three tensors that are then copied. (One is here, since on this card all memory stands at
    zero, and so each gradient seems to overwrite its queries.)"""
    by_torch, ours = dict(counted["lora"]["layer"]), dict(counted["lora with our attention"]["layer"])
    kernels = ("triton:attend", "triton:attend_backward_queries", "triton:attend_backward_keys")
    assert [ours.pop(name) for name in kernels] == [1, 1, 1]
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        del by_torch[name]
    by_torch["copy_"] -= 2
    assert ours == {name: count for name, count in by_torch.items() if count}
    assert counted["lora with our attention"]["waits"] == {"_to_copy to the host": 1}
