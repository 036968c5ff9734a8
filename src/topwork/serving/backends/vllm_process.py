"""A vLLM that we started: its log, its end, and that it does not outlive us."""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from topwork.common.errors import RunError

TOLD_LINES = 20
"""Of its log, where it ends by itself."""
PR_SET_PDEATHSIG = 1


class VllmProcess:
    """One process and those that it starts, in a group of their own."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.command, self.log = list(command), log
        log.parent.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def ends_with_us() -> None:
            if libc is not None:  # else whoever kills us with SIGKILL has to end it as well
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        try:
            with open(log, "wb") as out:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env={**os.environ, **env}, start_new_session=True, preexec_fn=ends_with_us,
                )  # fmt: skip
        except OSError as error:
            raise RunError(
                f"{command[0]!r} cannot be started ({error.strerror}); install vLLM where it runs, or say "
                "vllm.command or vllm.url"
            ) from None

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def ended(self) -> str:
        """How it ended, and the last lines of its log, for whoever runs this."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()[-TOLD_LINES:]
        return "\n".join([f"vLLM ended with status {self._process.poll()}; the end of {self.log}:", *lines])

    async def stop(self, grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL to all of them after that time."""
        for sent, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, sent)
            try:
                await asyncio.to_thread(self._process.wait, max(seconds, 0.1))
            except subprocess.TimeoutExpired:
                continue
            if sent == signal.SIGTERM:
                continue  # what it had started may still be there
            return


def free_port() -> int:
    """One that nobody listens at on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
