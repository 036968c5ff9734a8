"""What a server that stands before vLLM may be told, and the command line that starts it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, field_validator

from topwork.common.options import Options
from topwork.common.paths import plain_path


class VllmConfig(Options):
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+$")
    """A vLLM that runs already (http://10.0.0.5:8000), for more than one machine: started with --enable-lora and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, on the same base, and with work_folder under the same path. Left out, one is
    started here."""
    key_from: str | None = None
    """The environment variable that holds the key which that vLLM asks for."""
    command: list[str] = Field(default_factory=lambda: ["vllm", "serve"], min_length=1)
    """What starts a vLLM; the base and its options are put behind."""
    args: list[str] = Field(default_factory=list)
    """More of vLLM's own options, such as --tensor-parallel-size 2."""
    max_loras: int = Field(default=8, ge=1)
    """Adapters that one batch may mix."""
    max_cpu_loras: int | None = Field(default=None, ge=1)
    """Adapters that vLLM keeps in memory, the others it reads again; left out, 64 or `max_loras`."""
    max_lora_rank: int | None = Field(default=None, ge=1, le=512)
    """Room for adapters that are loaded while it runs; left out, the largest rank that it begins with, 16 at least."""
    work_folder: str | None = None
    """Where what vLLM reads is written: adapters, and a dequantized base. Left out, beside the server's state, or in a
    folder of its own that goes with the server."""
    start_seconds: float = Field(default=1800.0, gt=0)
    """How long vLLM may take to begin."""

    @field_validator("work_folder")
    @classmethod
    def _from_home(cls, value: str | None) -> str | None:
        return None if value is None else plain_path(value)


def vllm_command(
    config: VllmConfig,
    model: str,
    served: str,
    port: int,
    max_lora_rank: int,
    adapters: Mapping[str, Path],
    more: Sequence[str] = (),
) -> list[str]:
    """The command that serves `model` as `served` on this machine alone, with these adapters to begin with."""
    cpu = config.max_cpu_loras or max(64, config.max_loras)
    modules = ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())] if adapters else []
    return [
        *config.command, model, "--served-model-name", served, "--host", "127.0.0.1", "--port", str(port),
        "--enable-lora", "--max-lora-rank", str(max_lora_rank), "--max-loras", str(config.max_loras),
        "--max-cpu-loras", str(max(cpu, config.max_loras)), *more, *config.args, *modules,
    ]  # fmt: skip
