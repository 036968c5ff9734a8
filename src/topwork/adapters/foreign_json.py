"""JSON that a stranger may have written."""

import json
from typing import Any

from topwork.common.errors import AdapterError, quoted


def json_object(data: bytes, called: str) -> dict[str, Any]:
    """A JSON object. Raises AdapterError for anything else: keys that stand twice, nesting that no reader follows, NaN
    and infinity, bytes that are no UTF-8."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise AdapterError(f"{called} is nested too deep") from None
    except UnicodeDecodeError as error:
        raise AdapterError(f"{called} is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise AdapterError(f"{called} is not JSON ({error.msg}, line {error.lineno})") from None
    except _WrongError as error:
        raise AdapterError(f"{called} {error}") from None
    except ValueError:  # Python reads no numbers of thousands of digits
        raise AdapterError(f"{called} has a number that is too long") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{called} holds no JSON object")
    return value


class _WrongError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _WrongError(f"has the key {quoted(key)} twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise _WrongError(f"holds {text}, which JSON has not")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _WrongError(f"holds {quoted(text)}, which is no finite number")
    return value
