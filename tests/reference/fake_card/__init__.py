"""A card that only writes down what it is told: tensors without values on a device of its own.

It shows what no run on a CPU does and what a run on a card hides: how many kernels a step launches, and where the host
waits for the card. Its tensors are torch's fake ones, so whatever asks one of them for its value raises; transfers are
seen by the dispatcher, Triton's launches are written down in place of being made. What is on the CPU is real.

The device is torch's PrivateUse1, for which a few lines of C++ are compiled; a process has it or not, so it is made in
one of its own.
"""

import contextlib
import shutil
import subprocess
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SOURCE = Path(__file__).with_name("device.cpp")
NO_LAUNCH = {"device", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
"""What moves nothing on a card, beside views."""


def build(folder: Path) -> Path | None:
    """The device's library; None where there is no C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    made, torch_at = folder / "device.so", Path(torch.__file__).parent
    include = torch_at / "include"
    subprocess.run(
        [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}",
         f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", str(made), f"-L{torch_at / 'lib'}", "-lc10",
         "-ltorch_cpu"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return made


def register(library: Path) -> torch.device:
    """The device, for this process."""
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    _foreach_supported_types.append(FakeTensor)  # as of tensors on a real card
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend("card")
    there = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "manual_seed_all": lambda _: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
    }
    torch._register_device_module("card", types.SimpleNamespace(**there, _is_in_bad_fork=lambda: False))
    return torch.device("card", 0)


@dataclass
class Log:
    """launches   kernels by name: torch's operations, and Triton's behind a `triton:`
    waits      what the host waited for"""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.launches.values())


class FakeCard(TorchDispatchMode):
    """While it is active, tensors that are made on the card or sent there are fake, and `log` grows."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.log = device, Log()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wanted = kwargs.get("device")
        to_card = wanted is not None and torch.device(wanted).type == self.device.type
        if not to_card and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        if func is torch.ops.aten.is_set_to.default:  # of which fake tensors know nothing
            return _place(args[0]) == _place(args[1])
        self._note(func, tensors, to_card, kwargs)
        if kwargs.get("device") is not None and not to_card:  # what arrives on the host is made up
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
            return func(*args, **kwargs)

    def _faked(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def _note(self, func: Any, tensors: Sequence[Tensor], to_card: bool, kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        on_card = [isinstance(x, FakeTensor) for x in tensors]
        if name == "_local_scalar_dense":
            self.log.waits["a value"] += 1
        elif name == "index_put_" and tensors[-1].dim() == 0 and tensors[1].dtype != torch.bool:  # x[rows] = 0
            self.log.waits["a number to the card"] += 1  # on CUDA it comes from the host
        elif to_card and tensors and not all(on_card):  # from the host
            self.log.launches["copy to the card"] += 1
            if not kwargs.get("non_blocking"):
                self.log.waits[f"{name} to the card"] += 1
        elif "device" in kwargs and kwargs["device"] is not None and not to_card:
            self.log.waits[f"{name} to the host"] += 1
        elif not func.is_view and name not in NO_LAUNCH:
            self.log.launches[name] += 1

    @contextlib.contextmanager
    def launches_written_down(self) -> Iterator[None]:
        """Triton's launches, and what asks for CUDA itself."""
        from triton.runtime.jit import JITFunction

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            assert all(isinstance(x, FakeTensor) for x in args if isinstance(x, Tensor)), "a pointer to the host"
            self.log.launches[f"triton:{kernel.fn.__name__.strip('_')}"] += 1

        before = JITFunction.run, torch.cuda.device_of
        JITFunction.run, torch.cuda.device_of = run, lambda _: contextlib.nullcontext()
        try:
            with self:
                yield
        finally:
            JITFunction.run, torch.cuda.device_of = before


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()
