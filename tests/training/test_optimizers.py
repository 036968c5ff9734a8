"""8-bit AdamW against bitsandbytes' own, paged against unpaged, and every optimizer through a checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from reference.tiny_disk import printed_on_a_tiny_disk
from topwork.common.errors import CheckpointError, RunError
from topwork.training import optimizers
from topwork.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from topwork.training.config import TrainingConfig
from topwork.training.memory_held import state_bytes
from topwork.training.optimizers import AdamW8bit, PagedAdamW8bit, make_optimizer
from topwork.training.pages import FileStore

SHAPES = [(64, 64), (3, 5), (4095,), (4096,), (16, 576), (4097,), (70, 71), (1,), (300, 100), (16, 16)]
"""On both sides of 4,096 values; multiples of a block of 256 and others."""
OPTIMS = ["adamw", "adamw_8bit", "paged_adamw_8bit"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where threads split a tensor decides which of torch's loops, with another rounding, does its last values."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks in many windows, though the tensors are tiny."""
    monkeypatch.setattr(optimizers, "WINDOW", 8192)
    monkeypatch.setitem(optimizers._CHUNK, "cpu", 2048)


def fresh_parameters(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape) / 8).to(dtype)) for shape in shapes]


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    """Of very different sizes, with zeros, and now and then none at all."""
    torch.manual_seed(1000 + step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape) ** 3 * 10.0 ** -(step % 4)
        gradient[torch.rand(parameter.shape) < 0.1] = 0
        parameter.grad = None if (index + step) % 7 == 0 else gradient.to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def content(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    states = [value.clone() for p in parameters for _, value in sorted(optimizer.state[p].items())]
    return [p.detach().clone() for p in parameters] + states


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert [t.dtype for t in left] == [t.dtype for t in right]
    assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_bitsandbytes(weight_decay: float, dtype: torch.dtype) -> None:
    reference = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test").optim
    ours, theirs = fresh_parameters(dtype), fresh_parameters(dtype)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": weight_decay}
    optimizer, other = AdamW8bit(ours, **options), reference.AdamW8bit(theirs, **options)
    for step in range(24):
        train(optimizer, ours, range(step, step + 1))
        train(other, theirs, range(step, step + 1))
        for one, two in zip(ours, theirs):
            torch.testing.assert_close(one, two, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)
            state = other.state[two]
            if not state:
                continue
            mine = optimizer.state[one]
            assert mine["exp_avg"].dtype == state["state1"].dtype
            assert torch.equal(mine["exp_avg"], state["state1"])
            assert torch.equal(mine["exp_avg_sq"], state["state2"])
            if "absmax1" in state:
                torch.testing.assert_close(mine["exp_avg_absmax"], state["absmax1"], rtol=1e-6, atol=0)
                torch.testing.assert_close(mine["exp_avg_sq_absmax"], state["absmax2"], rtol=1e-6, atol=0)


def test_it_follows_adamw_in_32_bits() -> None:
    """Where nothing is quantized, it is AdamW itself."""
    small = [(60, 60), (17,)]
    ours, theirs = fresh_parameters(shapes=small), fresh_parameters(shapes=small)
    train(AdamW8bit(ours, weight_decay=0.1), ours, range(20))
    train(torch.optim.AdamW(theirs, weight_decay=0.1), theirs, range(20))
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_it_learns_about_as_adamw_does() -> None:
    torch.manual_seed(0)
    inputs, wanted = torch.randn(256, 64), torch.randn(64, 64)
    losses = {}
    for name in OPTIMS:
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = make_optimizer(TrainingConfig.model_validate({"optim": name, "learning_rate": 0.05}), [weight])
        for _ in range(150):
            optimizer.zero_grad()
            loss = (inputs @ (weight - wanted)).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["adamw"] < 0.01
    assert losses["adamw_8bit"] < 0.1
    assert losses["paged_adamw_8bit"] == losses["adamw_8bit"]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_is_unpaged(tmp_path: Path, dtype: torch.dtype) -> None:
    ours, theirs = fresh_parameters(dtype), fresh_parameters(dtype)
    paged, unpaged = PagedAdamW8bit(ours, folder=tmp_path), AdamW8bit(theirs)
    train(paged, ours, range(20))
    train(unpaged, theirs, range(20))
    assert_same(content(paged, ours), content(unpaged, theirs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [8192, 1 << 24])
def test_paged_is_unpaged_on_a_gpu(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(optimizers, "WINDOW", window)
    monkeypatch.setitem(optimizers._CHUNK, "cuda", 2048)
    ours, theirs = ([torch.nn.Parameter(p.detach().cuda()) for p in fresh_parameters()] for _ in range(2))
    paged, unpaged = PagedAdamW8bit(ours), AdamW8bit(theirs)
    for step in range(20):
        for optimizer, parameters in ((paged, ours), (unpaged, theirs)):
            on_host = [torch.nn.Parameter(p.detach().cpu()) for p in parameters]
            give_gradients(on_host, step)
            for parameter, source in zip(parameters, on_host):
                parameter.grad = None if source.grad is None else source.grad.cuda()
            optimizer.step()
    assert all(paged.state[p]["exp_avg"].is_pinned() for p in ours)
    assert_same([t.cpu() for t in content(paged, ours)], [t.cpu() for t in content(unpaged, theirs)])


def test_how_parameters_are_cut_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = fresh_parameters(), fresh_parameters()
    optimizer = AdamW8bit(whole)
    train(optimizer, whole, range(10))
    monkeypatch.setattr(optimizers, "WINDOW", 8192)
    monkeypatch.setitem(optimizers._CHUNK, "cpu", 2048)
    other = AdamW8bit(cut)
    train(other, cut, range(10))
    for one, two in zip(content(optimizer, whole), content(other, cut)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("optim", OPTIMS)
def test_resume_is_bit_exact(tmp_path: Path, optim: str) -> None:
    config = TrainingConfig.model_validate({"optim": optim, "weight_decay": 0.1})
    names = [f"parameter_{index}.weight" for index in range(len(SHAPES))]
    parameters = fresh_parameters()
    optimizer = make_optimizer(config, parameters, tmp_path)
    train(optimizer, parameters, range(6))
    saved = [p.detach().clone() for p in parameters]
    path = save_checkpoint(tmp_path / "c", 6, lambda _: None, optimizer, names, TrainState(step=6), 2, None)
    train(optimizer, parameters, range(6, 12))

    again = [torch.nn.Parameter(p) for p in saved]
    resumed = make_optimizer(config, again, tmp_path)
    homes = [{key: value.data_ptr() for key, value in resumed.state[p].items()} for p in again]
    assert load_checkpoint(path, resumed, names).step == 6
    for parameter, home in zip(again, homes):
        assert all(resumed.state[parameter][key].data_ptr() == at for key, at in home.items())
    train(resumed, again, range(6, 12))
    assert_same(content(optimizer, parameters), content(resumed, again))


@pytest.mark.parametrize("begun", OPTIMS)
@pytest.mark.parametrize("resumed", OPTIMS)
def test_another_optimizer_does_not_resume(tmp_path: Path, begun: str, resumed: str) -> None:
    if begun == resumed:
        return
    parameters = fresh_parameters(shapes=[(64, 64)])
    first, second = (make_optimizer(TrainingConfig.model_validate({"optim": o}), parameters) for o in (begun, resumed))
    path = save_checkpoint(tmp_path, 1, lambda _: None, first, ["w"], TrainState(step=1), 2, None)
    with pytest.raises(CheckpointError, match=f"saved with {type(first).__name__}, not with {type(second).__name__}"):
        load_checkpoint(path, second, ["w"])


def test_a_state_dict_comes_back_into_its_place() -> None:
    parameters, others = fresh_parameters(), fresh_parameters()
    optimizer, other = AdamW8bit(parameters), AdamW8bit(others, lr=1.0)
    train(optimizer, parameters, range(3))
    with torch.no_grad():
        for target, source in zip(others, parameters):
            target.copy_(source)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, parameters, range(3, 6))
    train(other, others, range(3, 6))
    assert_same(content(optimizer, parameters), content(other, others))


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_bytes_told_are_the_bytes_kept(optim: str) -> None:
    parameters = fresh_parameters()
    optimizer = make_optimizer(TrainingConfig.model_validate({"optim": optim}), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in content_views(optimizer)}
    assert sum(storage.nbytes() for storage in storages.values()) == state_bytes(optim, [p.numel() for p in parameters])


def content_views(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def test_a_fourth_of_the_bytes() -> None:
    """SmolLM2-135M's adapter of r 16 on all linear layers, as the docstring tells it."""
    layers = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    sizes = [16 * width for layer in layers for width in layer] * 30
    assert sum(sizes) == 4_884_480
    assert state_bytes("adamw", sizes) == 39_077_520
    assert state_bytes("adamw_8bit", sizes) == 11_023_440
    assert state_bytes("paged_adamw_8bit", sizes) == 11_023_440


def test_the_pages_leave_nothing_behind(tmp_path: Path) -> None:
    parameters = fresh_parameters()
    optimizer = PagedAdamW8bit(parameters, folder=tmp_path)
    train(optimizer, parameters, range(2))
    assert list(tmp_path.iterdir()) == []
    with open("/proc/self/maps") as maps:
        assert any(str(tmp_path) in line and "deleted" in line for line in maps)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"needs 0\.1 MiB more in a file in .*missing.*adamw_8bit"):
        PagedAdamW8bit(fresh_parameters(), folder=tmp_path / "missing")


def test_a_full_disk_is_said_before_it_kills(tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from topwork.common.errors import RunError
from topwork.training.optimizers import PagedAdamW8bit
try:
    PagedAdamW8bit([torch.nn.Parameter(torch.zeros(1 << 20))], folder=Path(sys.argv[1]))
except RunError as error:
    print(str(error).replace(" ", "_"))
"""
    (said,) = printed_on_a_tiny_disk(program, tmp_path)
    assert "No_space_left" in said
    assert "adamw_8bit" in said


def test_what_was_visited_stays_in_the_file(tmp_path: Path) -> None:
    home = FileStore(tmp_path)
    state = home.reserve(100_000, torch.float32)
    windows = [[state[:25_000], state[75_000:]], [state[25_000:50_000]], [state[50_000:75_000]]]
    for number, parts in enumerate(home.visit(windows)):
        for part in parts:
            part.fill_(number + 1)
    assert state.view(4, -1).unique(dim=1).flatten().tolist() == [1, 2, 3, 1]
    assert home.reserve(0, torch.uint8).numel() == 0


@pytest.mark.parametrize(
    "spoil", [lambda p: p.t(), lambda p: p.to(torch.int32), lambda p: p.to("meta")], ids=["strided", "integer", "away"]
)
def test_parameters_it_cannot_update_are_refused(spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    good, bad = torch.zeros(8, 8), spoil(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="AdamW8bit takes contiguous floats, all on one device"):
        AdamW8bit([good, bad])


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_32bit", "adamw_torch"])
def test_other_names_are_refused_with_ours(name: str) -> None:
    with pytest.raises(ValidationError, match="'adamw', 'adamw_8bit' or 'paged_adamw_8bit'"):
        TrainingConfig.model_validate({"optim": name})
