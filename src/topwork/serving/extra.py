"""What serving needs beyond Topwork's own packages: the extra `serve`. Imports none of it."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.common.errors import RequestError
from topwork.common.os_errors import explained

if TYPE_CHECKING:
    from topwork.serving.config import ServeConfig

EXTRA = ("fastapi", "uvicorn", "llguidance", "jsonschema", "prometheus_client")


def check_extra() -> None:
    """Raises RequestError for what is not installed, before anything is loaded."""
    lacking = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if lacking:
        raise RequestError(
            f"serving needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed; "
            "pip install 'topwork[serve]'"
        )


@explained()
def serve(config: "ServeConfig | Mapping[str, Any] | Path | str", say: Callable[[str], None] = print) -> None:
    """Load what the configuration (or its file) names, and serve until SIGTERM or Ctrl+C.

        topwork.serve({"model": "smollm2-135m", "adapters": {"support": "runs/support"}, "port": 8001})
        topwork.serve("serve.yaml")

    Raises RequestError where something is wrong before the first request: a package that is not installed, a port that
    is taken, an adapter of another base, a route to an adapter that is not there.
    """
    check_extra()
    from topwork.serving.launch import serve as run

    run(config, say)
