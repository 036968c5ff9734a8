"""Who speaks when."""

from collections.abc import Iterator, Sequence

from topwork.data.conversations import Message
from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding, Severity, graded, of_rows

_REMEDIES = {
    "twice": "merge them (data.merge_turns: true), or look for the turn that is missing between them",
    "system": "put the system message first, or make it a user's",
    "assistant first": "nothing where it is a greeting, which is context and not learned; else look for the question "
    "that is missing",
    "tool": "let the assistant's turn before it carry the call (tool_calls)",
    "no user": "look for the question that is missing: what is learned would answer nothing",
}
_TOLD = {
    "twice": "have two turns of one role in a row (user, user or assistant, assistant)",
    "system": "have a system message that is not the first",
    "assistant first": "begin with the assistant",
    "tool": "have a tool's result without a call before it",
    "no user": "have an answer and no user's turn at all",
}


def role_order(examined: Examined) -> Iterator[Finding]:
    """Turns in an order that models are not used to. Rows that cannot be read for it are told as unusable."""
    found: dict[str, list[str]] = {}
    for side in examined.sides:
        for row in side.conversations:
            if row.kind == "chat":
                for fault in faults(row.messages):
                    found.setdefault(fault, []).append(row.source)
    for fault, told in _TOLD.items():
        rows = found.get(fault, [])
        if rows:
            severity: Severity = "notice" if fault == "assistant first" else graded(len(rows), examined.total)
            yield of_rows("role-order", severity, rows, examined.total, told, _REMEDIES[fault])


def faults(messages: Sequence[Message]) -> set[str]:
    """Keys of `_TOLD`."""
    roles = [message.role for message in messages]
    spoken = [role for role in roles if role != "system"]
    found = set()
    if any(role == "system" for role in roles[1:]):
        found.add("system")
    if spoken[:1] == ["assistant"]:
        found.add("assistant first")
    if "assistant" in spoken and "user" not in spoken and "tool" not in spoken:
        found = (found - {"assistant first"}) | {"no user"}
    for before, after in zip(messages, messages[1:]):
        called = bool(before.extra.get("tool_calls"))
        if before.role == after.role and after.role in ("user", "assistant") and not called:
            found.add("twice")
        if after.role == "tool" and before.role != "tool" and before.role != "assistant":
            found.add("tool")
    return found
