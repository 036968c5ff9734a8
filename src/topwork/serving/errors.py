"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`, short, with no path."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError

LONGEST = 600
"""Characters of a message."""

TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error", 411: "invalid_request_error",
    413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error",
    500: "server_error", 503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(RequestError):
    """What a request is answered with instead of what it asked for.

    status       of the response: 400 where the request is wrong, never 422
    param        the field that is wrong
    code         for programs: model_not_found, context_length_exceeded, …
    retry_after  seconds after which it may be tried again (429, 503)
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: float | None = None, type: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.message = message if len(message) <= LONGEST else message[: LONGEST - 1] + "…"
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`retry-after`, where it may be tried again."""
        if self.retry_after is None:
            return {"x-should-retry": "false"} if self.status in (408, 409) or self.status >= 500 else {}
        return {"retry-after": str(max(1, -int(-self.retry_after // 1)))}


_PATH = re.compile(r"(?<![\w.:/-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:()]+[/\\])+[^\s/\\'\",;:()]*")
"""Absolute paths of two parts and more."""


def without_paths(text: str, *folders: Path) -> str:
    """The text without this machine's paths; of `folders`, which the request named, the last part is left."""
    for folder in folders:
        text = text.replace(str(folder), folder.name)
    return _PATH.sub("…", text)


@contextmanager
def refusal(param: str | None, status: int = 400, code: str | None = None, *folders: Path) -> Iterator[None]:
    """Turns what the parts below refuse (RequestError) into an ApiError."""
    try:
        yield
    except ApiError:
        raise
    except RequestError as error:
        raise ApiError(status, without_paths(str(error), *folders), param, code) from error
