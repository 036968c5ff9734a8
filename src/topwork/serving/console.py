"""What a server says: a greeting on the terminal, and lines of a log."""

import json
import logging
import sys
from typing import Any

import topwork
from topwork.serving.service import Service


def greeting(service: Service, host: str, port: int) -> str:
    """Where it is, what may be asked for, and how."""
    address = f"http://{_reachable(host)}:{port}"
    cards = service.backend.cards()
    base, adapters = cards[0].id, [card.id for card in cards[1:]]
    routes = list(service.parts.router.names())
    model = (routes or adapters or [base])[0]
    ask = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    key = " -H 'authorization: Bearer KEY'" if service.config.tenants else ""
    lines = [
        f"topwork {topwork.__version__} answers at {address}",
        f"  base      {base}",
        f"  adapters  {_listed(adapters)}",
        *([f"  routes    {_listed(routes)}"] if routes else []),
        f"  try       curl {address}/v1/chat/completions -H 'content-type: application/json'{key} -d '{ask}'",
        f'  openai    OpenAI(base_url="{address}/v1", api_key="{"KEY" if key else "none"}")',
        f"  page      {address}/   figures {address}/metrics   Ctrl+C ends it",
    ]
    return "\n".join(lines)


def set_up_log(as_json: bool, access: bool) -> None:
    """Lines to standard error: the server's own, and one a request where `access`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (
        ("topwork", logging.INFO), ("topwork.access", logging.INFO if access else logging.WARNING),
        ("uvicorn.error", logging.ERROR),
    ):  # fmt: skip
        logging.getLogger(name).setLevel(level)
    for name in ("topwork", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


class _Json(logging.Formatter):
    """A line is an object."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage(),
        }  # fmt: skip
        told |= {key: value for key in ("request_id", "status", "seconds") if (value := getattr(record, key, None))}
        if record.exc_info:
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _reachable(host: str) -> str:
    """A name to ask by; what listens everywhere is asked here."""
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _listed(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
