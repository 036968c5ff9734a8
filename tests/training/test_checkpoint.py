"""A resumed run is the unbroken run, bit for bit; a checkpoint that is not whole is passed over."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.tiny_disk import printed_on_a_tiny_disk
from topwork.common.errors import CheckpointError, RunError
from topwork.common.files import verify_folder
from topwork.training.checkpoint import (
    TrainState,
    Validation,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    save_checkpoint,
)

NAMES = ["inner.weight", "inner.bias", "idle.weight"]
FUSED = {"fused": True}
VARIANTS = [{}, FUSED, {"foreach": True}, {"amsgrad": True}, {"capturable": False, "weight_decay": 0.1}]


class Net(torch.nn.Module):
    """One trained layer behind dropout, and one parameter that never gets a gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 4, dtype=dtype)
        self.idle = torch.nn.Linear(2, 2, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.nn.functional.dropout(x, 0.3))


def fresh(options: dict[str, object] | None = None, dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    random.seed(seed)
    net = Net(dtype)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, **(options or {}))


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.arange(16.0).reshape(2, 8).to(net.inner.weight.dtype) * (step + 1) / 10
        loss = net(x).square().sum() * random.random()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapter_writer(net: Net) -> Callable[[Path], None]:
    return lambda path: save_file(net.state_dict(), path / "weights.safetensors")


def save(folder: Path, net: Net, optimizer, step: int, keep: int = 2, protect: int | None = None) -> Path:
    state = TrainState(step=step, tokens_seen=100 * step)
    return save_checkpoint(folder, step, adapter_writer(net), optimizer, NAMES, state, keep, protect)


def content(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    tensors = dict(net.state_dict())
    for name, parameter in zip(NAMES, net.parameters()):
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return {name: bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_resume_is_bit_exact(tmp_path: Path, options: dict[str, object], dtype: torch.dtype) -> None:
    net, optimizer = fresh(options, dtype)
    train(net, optimizer, range(6))
    unbroken = content(net, optimizer)

    net, optimizer = fresh(options, dtype)
    train(net, optimizer, range(3))
    halfway = content(net, optimizer)
    path = save(tmp_path, net, optimizer, 3)
    assert content(net, optimizer) == halfway

    net, optimizer = fresh(options, dtype, seed=1)
    train(net, optimizer, range(1))  # what stands in the optimizer before must go
    net.load_state_dict(load_file(path / "adapter" / "weights.safetensors"))
    state = load_checkpoint(path, optimizer, NAMES)
    assert state == TrainState(step=3, tokens_seen=300)
    assert content(net, optimizer) == halfway
    train(net, optimizer, range(3, 6))
    assert content(net, optimizer) == unbroken


def test_without_loading_the_resume_would_differ(tmp_path: Path) -> None:
    """The test above can fail: moments, dropout and Python's random numbers each decide the result."""
    results = []
    for forget in ("nothing", "moments", "torch", "python"):
        net, optimizer = fresh()
        train(net, optimizer, range(3))
        if forget == "moments":
            optimizer.state.clear()
        if forget == "torch":
            torch.manual_seed(1)
        if forget == "python":
            random.seed(1)
        train(net, optimizer, range(3, 6))
        results.append(content(net, optimizer)["inner.weight"])
    assert len(set(results)) == 4


def test_dtypes_are_kept_and_not_the_parameters(tmp_path: Path) -> None:
    """float32 moments of a bfloat16 parameter, which load_state_dict would round."""
    net, optimizer = fresh(dtype=torch.bfloat16)
    train(net, optimizer, range(2))
    for held in optimizer.state.values():
        held["exp_avg"] = held["exp_avg"].float() + 1e-5
    before = content(net, optimizer)
    path = save(tmp_path, net, optimizer, 2)
    net, optimizer = fresh(dtype=torch.bfloat16)
    net.load_state_dict(load_file(path / "adapter" / "weights.safetensors"))
    load_checkpoint(path, optimizer, NAMES)
    assert optimizer.state[net.inner.weight]["exp_avg"].dtype == torch.float32
    assert content(net, optimizer) == before


def test_moments_in_one_flat_buffer_can_be_saved(tmp_path: Path) -> None:
    net, optimizer = fresh()
    train(net, optimizer, range(2))
    flat = torch.cat([optimizer.state[p]["exp_avg"].view(-1) for p in (net.inner.weight, net.inner.bias)])
    optimizer.state[net.inner.weight]["exp_avg"] = flat[:32].view(4, 8)
    optimizer.state[net.inner.bias]["exp_avg"] = flat[32:]
    before = content(net, optimizer)
    path = save(tmp_path, net, optimizer, 2)
    load_checkpoint(path, optimizer, NAMES)
    assert content(net, optimizer) == before


def test_a_checkpoint_holds_these_files_and_is_reproducible(tmp_path: Path) -> None:
    paths = []
    for run in ("a", "b"):
        net, optimizer = fresh()
        train(net, optimizer, range(2))
        paths.append(save(tmp_path / run / "checkpoints", net, optimizer, 2))
    assert paths[0].name == "step-000002"
    contents = [{p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*.*")} for path in paths]
    assert set(contents[0]) == {
        "adapter/weights.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
    }
    assert contents[0] == contents[1]
    assert set(load_file(paths[0] / "optimizer.safetensors")) == {
        f"inner.{name}.{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_state_comes_back_exactly() -> None:
    history = (Validation(10, None, 0.1 + 0.2), Validation(20, 1e-310, 2.0))
    state = TrainState(20, 0.1 + 0.2, 10, 1, 10**15, history)

    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize(
    ("state", "where"),
    [
        (TrainState(1, best_loss=float("inf")), "best_loss is inf"),
        (TrainState(1, history=(Validation(1, float("nan"), 1.0),)), r"history\[0\]\.train_loss is nan"),
    ],
)
def test_state_that_is_not_finite_is_refused(state: TrainState, where: str) -> None:
    with pytest.raises(CheckpointError, match=where):
        state.to_json()


def test_state_of_another_version_is_refused() -> None:
    value = TrainState(1).to_json()
    with pytest.raises(CheckpointError, match="another version"):
        TrainState.from_json({**value, "more": 1})
    with pytest.raises(CheckpointError, match="history cannot be read"):
        TrainState.from_json({**value, "history": [{"step": 1}]})


def steps(folder: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(folder)]


def test_keep_and_protect(tmp_path: Path) -> None:
    net, optimizer = fresh()
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 6)):
        save(tmp_path, net, optimizer, step, keep=2, protect=best)
        expected = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [4, 5, 6], 7: [5, 6, 7]}
        assert steps(tmp_path) == expected[step]
    save(tmp_path, net, optimizer, 8, keep=1, protect=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000008"]


def test_steps_beyond_a_million_sort_as_numbers(tmp_path: Path) -> None:
    net, optimizer = fresh()
    for step in (999_999, 1_000_000):
        save(tmp_path, net, optimizer, step)
    assert steps(tmp_path) == [999_999, 1_000_000]
    newest = newest_whole_checkpoint(tmp_path, pytest.fail)
    assert newest == tmp_path / "step-1000000"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (lambda path: os.truncate(path / "optimizer.safetensors", 50), "optimizer.safetensors is truncated"),
    (lambda path: (path / "adapter" / "weights.safetensors").unlink(), "adapter/weights.safetensors is missing"),
    (lambda path: flip(path / "random.safetensors"), "random.safetensors was altered"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_torn_newest_is_passed_over(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    net, optimizer = fresh()
    for step in (1, 2):
        train(net, optimizer, range(step - 1, step))
        save(tmp_path, net, optimizer, step)
    (tmp_path / ".topwork-new-step-000003-0a1b2c3d").mkdir()
    (tmp_path / "step-000009.txt").write_text("not ours")
    damage(tmp_path / "step-000002")
    warnings: list[str] = []
    found = newest_whole_checkpoint(tmp_path, warnings.append)
    assert found == tmp_path / "step-000001"
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    assert message in warnings[0]
    load_checkpoint(found, optimizer, NAMES)
    save(tmp_path, net, optimizer, 2)  # the same step again takes the torn one's place
    assert newest_whole_checkpoint(tmp_path, pytest.fail) == tmp_path / "step-000002"
    assert not list(tmp_path.glob(".topwork*"))


def test_steps_that_a_resume_passed_over_go_with_the_next_save(tmp_path: Path) -> None:
    net, optimizer = fresh()
    for step in (2, 9):
        save(tmp_path, net, optimizer, step)
    save(tmp_path, net, optimizer, 4, keep=2)
    assert steps(tmp_path) == [2, 4]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "absent", pytest.fail) is None
    (tmp_path / "step-000001").mkdir()
    warnings: list[str] = []
    assert newest_whole_checkpoint(tmp_path, warnings.append) is None
    assert len(warnings) == 1


def test_a_replacement_cut_short_is_recovered(tmp_path: Path) -> None:
    net, optimizer = fresh()
    path = save(tmp_path, net, optimizer, 1)
    path.rename(tmp_path / ".topwork-old-step-000001")
    assert newest_whole_checkpoint(tmp_path, pytest.fail) == path


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    net, optimizer = fresh()
    save(tmp_path, net, optimizer, 1, keep=1)

    def full(path: Path) -> None:
        (path / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError, match=r"disk is full: .*step-000002.*MiB are free"):
        save_checkpoint(tmp_path, 2, full, optimizer, NAMES, TrainState(2), keep=1, protect=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    verify_folder(tmp_path / "step-000001")


ON_A_TINY_DISK = """
import sys
from pathlib import Path
import torch
from topwork.common.errors import RunError
from topwork.training.checkpoint import TrainState, newest_whole_checkpoint, save_checkpoint

disk = Path(sys.argv[1])
def save(step, size):
    layer = torch.nn.Linear(size, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(size)).sum().backward()
    optimizer.step()
    save_checkpoint(disk, step, lambda path: None, optimizer, ["weight"], TrainState(step), 1, None)
save(1, 8)
try:
    save(2, 1_000_000)
except RunError as error:
    assert "disk is full" in str(error), error
    print("refused")
assert [path.name for path in disk.iterdir()] == ["step-000001"], list(disk.iterdir())
assert newest_whole_checkpoint(disk, sys.exit) == disk / "step-000001"
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    assert printed_on_a_tiny_disk(ON_A_TINY_DISK, tmp_path) == ["refused"]


def unchanged_after(path: Path, optimizer: torch.optim.Optimizer, net: Net, names: list[str], message: str) -> None:
    before, random_before = content(net, optimizer), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, optimizer, names)
    assert content(net, optimizer) == before
    assert torch.equal(torch.get_rng_state(), random_before)


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    net, optimizer = fresh()
    train(net, optimizer, range(1))
    path = save(tmp_path, net, optimizer, 1)
    torch.manual_seed(5)
    renamed = ["inner.weight", "inner.bias", "other.weight"]
    unchanged_after(path, optimizer, net, renamed, "idle.weight is only in .*other.weight is not in the checkpoint")
    unchanged_after(path, optimizer, net, NAMES[:2], "3 parameters are in the optimizer, but 2 different names of 2")
    unchanged_after(path, optimizer, net, [*NAMES[:2], "inner.bias"], "2 different names of 3")
    net.inner = torch.nn.Linear(8, 5)
    other = torch.optim.AdamW(net.parameters())
    unchanged_after(path, other, net, NAMES, r"inner.bias is \[4\] in the checkpoint and \[5\] here")


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    net, optimizer = fresh()
    path = save(tmp_path, net, optimizer, 1)
    sgd = torch.optim.SGD(net.parameters(), momentum=0.9)
    unchanged_after(path, sgd, net, NAMES, "saved with AdamW, not with SGD")


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random.safetensors", "state.json"])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    net, optimizer = fresh()
    path = save(tmp_path, net, optimizer, 1)
    (path / name).write_bytes(b"{")
    unchanged_after(path, optimizer, net, NAMES, "cannot be read")
    (path / name).unlink()
    unchanged_after(path, optimizer, net, NAMES, "cannot be read")


def test_a_name_that_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="expected a folder named like step-000123"):
        checkpoint_step(Path("runs/adapter"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, FUSED, {"capturable": True}], ids=str)
def test_resume_is_bit_exact_on_cuda(tmp_path: Path, options: dict[str, object]) -> None:
    def moved(seed: int):
        net = fresh(seed=seed)[0].cuda()
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2, **options)

    def run(net: Net, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            net(torch.ones(2, 8, device="cuda")).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = moved(0)
    run(net, optimizer, 6)
    unbroken = content(net, optimizer)
    net, optimizer = moved(0)
    run(net, optimizer, 3)
    path = save(tmp_path, net, optimizer, 3)
    net, optimizer = moved(1)
    net.load_state_dict(load_file(path / "adapter" / "weights.safetensors"))
    load_checkpoint(path, optimizer, NAMES)
    run(net, optimizer, 3)
    assert content(net, optimizer) == unbroken
