"""What is installed and what the environment says, for `topwork doctor`. Free of torch."""

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import topwork

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
OTHERS = ("datasets", "numpy", "peft", "bitsandbytes", "triton", "flash_attn", "gguf", "vllm")
"""Told where they are there."""
READ = (
    "TOPWORK_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_",
    "NVIDIA_", "HIP_", "ROCR_", "HSA_", "NCCL_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_",
    "TOKENIZERS_", "SAFETENSORS_", "BNB_", "MALLOC_", "SLURM_CPUS", "SLURM_MEM",
)  # fmt: skip
"""How the variables begin that Topwork reads, or what it stands on."""
READ_TOO = (
    "CC", "LD_PRELOAD", "LD_LIBRARY_PATH", "TMPDIR", "XDG_CACHE_HOME", "RANK", "WORLD_SIZE", "LOCAL_RANK",
)  # fmt: skip
PROXY = "_proxy"
"""How names of proxies end, in capitals too."""
OURS = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What the command line sets itself where nobody else did."""
SET = "set"
"""In the place of what is nobody's business."""

_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|AUTH|CREDENTIAL|COOKIE", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)\S+(?=@)|(?<!\S)[^\s/:@]+:(?!//)\S+(?=@)")
"""User and password, behind a scheme or as `user:password@host`. A password may have an @ or a slash of its own, so all
up to the last @ is one."""
_IN_PROXY = re.compile(r"^(\s*[a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
"""The same of a proxy, where whatever stands before the host is nobody's business."""


def versions() -> dict[str, str | None]:
    """Of Topwork, Python and packages; None for one that is needed and not there."""
    found: dict[str, str | None] = {"topwork": topwork.__version__, "python": platform.python_version()}
    found |= {name: _installed(name) for name in NEEDED}
    return found | {name: there for name in OTHERS if (there := _installed(name)) is not None}


def system() -> dict[str, str]:
    """The operating system, its kernel, and the C library."""
    name = platform.system()
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    except OSError:
        name = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else f"{name} {platform.release()}"
    libc = " ".join(platform.libc_ver()).strip()
    kernel = f"{platform.system()} {platform.release()}"
    return {"name": name, "kernel": kernel, "machine": platform.machine(), **({"libc": libc} if libc else {})}


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that are set and read, in order; of secrets that they are set, of addresses no user and password."""
    given = os.environ if given is None else given
    return {
        name: SET if _SECRET.search(name) else _without_users(name, value)
        for name, value in sorted(given.items())
        if (name.startswith(READ) or name in READ_TOO or _of_proxy(name)) and OURS.get(name) != value
    }


def _of_proxy(name: str) -> bool:
    return name.lower().endswith(PROXY)


def _without_users(name: str, value: str) -> str:
    return _IN_PROXY.sub(r"\1…@", value) if _of_proxy(name) else _IN_URL.sub("…", value)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
