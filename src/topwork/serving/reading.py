"""The body of a request: bytes to a JSON object, and that to what an endpoint takes; all that is wrong is a 400.

What a JSON reader lets through and the code behind it dies of is refused here: objects nested without end, numbers of
thousands of digits, NaN and infinity, half a surrogate pair.
"""

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from topwork.common.errors import did_you_mean, quoted
from topwork.serving.errors import ApiError

_OFF_THE_LOOP = 2**16
"""Bytes from which a body is read in another thread, so that others' answers go on meanwhile."""
_MAY_OVERFLOW = re.compile(rb"[0-9.]{300}|[eE]\+?0*[1-9][0-9]{2}")
"""What a number that is no float may look like: many digits, or an exponent of three."""

Fields = TypeVar("Fields", bound=BaseModel)
Read = TypeVar("Read")


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError: 415 where it is said to be something else, 400 where it is no JSON
    object, 408 and 413 by the guard (`guards.py`)."""
    return await _read(request, parsed)


async def read_fields(
    request: Request, kind: type[Fields], unsupported: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], Fields]:  # fmt: skip
    """The same, and what `checked` makes of it."""

    def read(body: bytes) -> tuple[dict[str, Any], Fields]:
        values = parsed(body)
        return values, checked(kind, values, unsupported)

    return await _read(request, read)


async def _read(request: Request, read: Callable[[bytes], Read]) -> Read:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the content-type is {quoted(kind)}; send JSON with content-type: application/json")
    body = await request.body()
    return await asyncio.to_thread(read, body) if len(body) > _OFF_THE_LOOP else read(body)


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are. Raises ApiError."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:120]}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_kind(value)}; send a JSON object", code="invalid_json")
    if _MAY_OVERFLOW.search(body) and _has_infinity(value):
        raise ApiError(400, "the body has a number that is too large for a float", code="invalid_json")
    return value


def checked(kind: type[Fields], values: Mapping[str, Any], unsupported: Mapping[str, str] | None = None) -> Fields:
    """The body as what an endpoint takes.

    unsupported: fields that are known and may only say what changes nothing -> what to do instead.
    Raises ApiError (400) that names the first field that is wrong; one that is not known counts where it is not null.
    """
    given = {key: value for key, value in values.items() if value is not None or key in kind.model_fields}
    for key in given:
        if key not in kind.model_fields:
            near = did_you_mean(key[:64], kind.model_fields)
            raise ApiError(400, f"{quoted(key)} is not a field of this request{near}", key[:64], "unknown_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error, given, unsupported or {}) from error


def _explained(error: ValidationError, values: Mapping[str, Any], unsupported: Mapping[str, str]) -> ApiError:
    """The deepest of what is wrong: in a value that may be of several kinds, that of the kind which fits furthest."""
    entries = error.errors(include_url=False)
    places = [_place(entry["loc"], values, entry["type"] == "missing") for entry in entries]
    deepest = max(places, key=lambda place: (len(place), place[-1] if place and isinstance(place[-1], int) else 0))
    field = _named(deepest)
    if deepest and str(deepest[0]) in unsupported:
        return ApiError(400, f"{deepest[0]} is not supported: {unsupported[str(deepest[0])]}", field)
    here = [entry for entry, place in zip(entries, places) if place == deepest]
    if here[0]["type"] == "union_tag_invalid":
        kind, known = here[0]["ctx"]["tag"], here[0]["ctx"]["expected_tags"].replace("'", "")
        return ApiError(400, f"{field} is of type {quoted(kind)}; this server takes {known}", field)
    told = " or ".join(dict.fromkeys(_sentence(entry["msg"]) for entry in here))
    if here[0]["type"] == "missing":
        return ApiError(400, f"{field} is missing; it is required", field, "missing_required_parameter")
    return ApiError(400, f"{field} is {_shown(here[0]['input'])}; {told}", field)


def _place(loc: Sequence[int | str], value: Any, missing: bool) -> list[int | str]:
    """Where in the body an error is, without what pydantic puts between: the kinds of a value that may be several."""
    place: list[int | str] = []
    for number, part in enumerate(loc, 1):
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in inside:
            value = value[part]
            place.append(part)
        elif missing and number == len(loc):
            place.append(part)
    return place


def _named(place: Sequence[int | str]) -> str:
    """messages[0].content"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}"[:64] for part in place)
    return text.removeprefix(".")[:128] or "body"


def _sentence(told: str) -> str:
    """pydantic's, as ours go on."""
    told = re.sub(r" or instance of \w+| using 'type'", "", told.removeprefix("Value error, "))
    told = told.replace("valid dictionary", "valid object").replace("Input should be", "expected")
    return told[:1].lower() + told[1:]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)[:32]
    return quoted(value) if isinstance(value, str) else _kind(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _has_infinity(value: Any) -> bool:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, float) and math.isinf(one):
            return True
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False
