"""Tools, and a conversation in which one was called."""

from typing import Any

from topwork.data.conversations import Message

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}},
]
ASKED = Message("user", "Hi there")
_FUNCTION = {"name": "get_weather", "arguments": {"city": "Bern"}}
_CALL = {"id": "call_0123456789abcdef", "type": "function", "function": _FUNCTION}
CALLED = [
    ASKED,
    Message("assistant", "", None, {"tool_calls": [_CALL]}),
    Message("tool", '{"sun": true}', None, {"tool_call_id": "call_0123456789abcdef"}),
]
"""A question, a call, its result."""
