"""What a row becomes: messages with roles, or plain text. OpenAI's, ShareGPT's and ms-swift's ways of writing them,
read alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from topwork.common.errors import did_you_mean
from topwork.common.yaml_text import in_yaml
from topwork.data.meaning.content_parts import unfolded
from topwork.data.meaning.fields import first_called, plain, said_of
from topwork.data.meaning.marks import EXTRA_KEYS, mark_of, refuse_thought, weight_of
from topwork.data.meaning.values import RowProblem as RowProblem
from topwork.data.meaning.values import is_blank, kind, parsed, text_of, written

CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's and ms-swift's roles of an assistant turn that is a tool call
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), "tool"),
    **dict.fromkeys(CALL_ROLES, CALL_ROLES[0]),
}
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
CONTENT_KEYS = ("content", "value", "text", "utterance", "message", "parts")


@dataclass(frozen=True)
class Message:
    """One turn. `weight` multiplies the weight with which its tokens are learned; None is 1.

    `extra` holds what else the template may read: tool_calls, name, tool_call_id, reasoning_content.
    """

    role: str
    content: str
    weight: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """One row: messages that end with the assistant's (`chat`), or a document (`text`).

    group  what it shares with others that must not be held out apart from it (`data.hold_out_by`)
    notes  what of the row is not learned or was changed on the way, in a few words that are the same for rows of a
           kind: "a user turn at the end is cut"; they are counted and named
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None
    source: str
    kind: Literal["chat", "text"] = "chat"
    text: str | None = None
    group: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Spelling:
    """What a file calls a message's roles and keys, as theirs: ours (`data.roles`, `data.message_keys`)."""

    roles: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def role(self, given: object) -> str | None:
        """Ours, or None where it is not known; capital letters and white space do not matter."""
        if isinstance(given, str):
            named = self.roles.get(given) or ROLES.get(given) or said_of(given, self.roles) or plain(given)
            return ROLES.get(named)
        return ROLES.get(self.roles.get(str(given), ""))

    def renamed(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The message under our keys; what the file calls `unread` is left out."""
        ours = {key: said_of(key, self.keys) for key in item}
        named = {key: value for key, value in item.items() if ours[key] is None}
        theirs = {str(ours[key]): value for key, value in item.items() if ours[key] is not None and value is not None}
        return {key: value for key, value in {**named, **theirs}.items() if key != "unread"}


OURS = Spelling()


def read_messages(items: object, name: str, spelling: Spelling = OURS) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value}, or that as text. Raises RowProblem naming the message by its number,
    from 1.

    A call that is a message of its own (`function_call`, `tool_call`) belongs to the assistant's turn before it: had
    that ended, the model would learn to end it there.
    """
    given = parsed(items)
    if not isinstance(given, list) or not given:
        what = "empty" if is_blank(given) and given is not None else kind(given)
        raise RowProblem(f"{name} is {what}, expected a list of messages")
    found: list[Message] = []
    for number, folded in enumerate(given, 1):
        for item in unfolded(parsed(folded), f"message {number}", spelling.keys):
            role, message = _read_message(item, f"message {number}", spelling, given)
            if role in CALL_ROLES and found and found[-1].role == "assistant":
                found[-1] = _with_calls(found[-1], message, f"message {number}")
            else:
                found.append(message)
    return tuple(found)


def first_of(item: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that holds a value; else the first that is there; else one that differs from it in capital
    letters and white space alone; else None."""
    for key in keys:
        if item.get(key) is not None:
            return key
    return next((key for key in keys if key in item), None) or first_called(keys, item)


def _read_message(item: object, name: str, spelling: Spelling, among: list[Any]) -> tuple[str, Message]:
    """(the role as it is written, the message)."""
    if not isinstance(item, Mapping):
        raise RowProblem(f"{name} is {kind(item)}, expected an object with role and content")
    if spelling.keys:
        item = spelling.renamed(item)
    role_key, content_key = first_of(item, ROLE_KEYS), first_of(item, CONTENT_KEYS)
    given = item[role_key] if role_key else None
    role = spelling.role(given)
    if role is None:
        raise RowProblem(_unknown_role(given, role_key, name, item, spelling, among))
    content = item[content_key] if content_key else None
    marks: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in item.items():
        if value is None or key in (role_key, content_key, "tool_calls", "function_call"):
            continue
        (extra if mark_of(key) is None else marks)[key] = value
        if role == "assistant":
            refuse_thought(key, value, name, spelling.keys)
    called = "tool_calls" in item or "function_call" in item
    calls = content if role in CALL_ROLES else _first_calls(item) if called else None
    if calls:
        if ROLES[role] not in ("assistant", *CALL_ROLES):
            raise RowProblem(f"{name} has tool calls, and it is the {role}'s; only the assistant calls tools")
        extra["tool_calls"] = read_calls(calls, name)
        content = None if role in CALL_ROLES else content
    elif content_key is None:
        _check_content(item, extra, name, role, spelling.keys)
    weight = weight_of(marks, name, spelling.keys) if marks else None
    ours = "assistant" if calls else role
    return role, Message(ours, _content(content, ours, name), weight, extra)


def _content(content: object, role: str, name: str) -> str:
    """Empty where there is none; results of tools may be lists, which are JSON."""
    if content is None or content == []:
        return ""
    if isinstance(content, str):
        return text_of(content, f"the content of {name}")
    if role == "tool" and isinstance(content, list) and not any(isinstance(part, Mapping) for part in content):
        return written(content, f"the content of {name}")
    return text_of(content, f"the content of {name}")


def _check_content(
    item: Mapping[str, Any], extra: Mapping[str, Any], name: str, role: str, keys: Mapping[str, str]
) -> None:
    """Raises RowProblem for what may be said under a key that is not known, which must not become an empty turn, and
    for a user without a word."""
    for key, value in extra.items():
        if isinstance(value, str | list | Mapping) and not is_blank(value) and key not in EXTRA_KEYS:
            raise RowProblem(
                f"{name} has no content; its keys are {', '.join(map(str, item))}. If {key} is the content, set "
                f"data.message_keys: {in_yaml({**keys, key: 'content'})}"
            )
    if role == "user":
        raise RowProblem(f"{name} has no content; its keys are {', '.join(map(str, item))}")


def _unknown_role(
    given: object, key: str | None, name: str, item: Mapping[str, Any], spelling: Spelling, among: list[Any]
) -> str:
    if key is None:
        keys, example = ", ".join(map(str, item)), suggested_keys(item)
        how = (
            f", for example data.message_keys: {in_yaml({**spelling.keys, **example})}"
            if "role" in example.values()
            else ""
        )
        return f"{name} has no role; its keys are {keys}; data.message_keys says which is what{how}"
    near = did_you_mean(str(given), ROLES, 1)
    example = suggested_roles([among], spelling)
    how = (
        f"; data.roles says whose turns they are, for example data.roles: {in_yaml({**spelling.roles, **example})}"
        if example
        else ""
    )
    return f"{name} has the unknown role {given!r}{near}{how}"


def suggested_roles(conversations: list[list[Any]], spelling: Spelling) -> dict[str, str]:
    """A reading of roles that are not known, as theirs: ours: a near name's, else who is still missing, the user first.
    Empty where there are more than can be told from each other."""
    given = [_role_of(message, spelling) for messages in conversations for message in messages]
    known = {spelling.role(role) for role in given}
    unknown = [role for role in dict.fromkeys(given) if role is not None and spelling.role(role) is None]
    found: dict[str, str] = {}
    for role in unknown:
        near = did_you_mean(role, ROLES, 1)
        free = [ours for ours in ("user", "assistant") if ours not in known]
        if near:
            found[role] = ROLES[near.split("'")[1]]
        elif free:
            found[role] = free[0]
        else:
            return {}
        known.add(found[role])
    return found


def suggested_keys(message: Mapping[str, Any]) -> dict[str, str]:
    """Which of a message's keys may be its role and which its content, as theirs: ours: the shorter text and the
    longer, unless a name tells."""
    texts = sorted((key for key, value in message.items() if isinstance(value, str)), key=lambda key: len(message[key]))
    role, content = first_of(message, ROLE_KEYS), first_of(message, CONTENT_KEYS)
    left = [key for key in texts if key not in (role, content)]
    if role is None and left:
        named = (key for key in left if any(word in str(key).lower() for word in ("role", "speak", "who", "user")))
        role = next(named, left[0])
        left.remove(role)
    if content is None and left:
        content = left[-1]
    given = {role: "role", content: "content"}
    return {key: ours for key, ours in given.items() if key and key not in (*ROLE_KEYS, *CONTENT_KEYS)}


def _role_of(message: object, spelling: Spelling) -> str | None:
    if not isinstance(message, Mapping):
        return None
    item = spelling.renamed(message) if spelling.keys else message
    key = first_of(item, ROLE_KEYS)
    return str(item[key]) if key and isinstance(item[key], str | int) else None


# Calls and tools


def _first_calls(item: Mapping[str, Any]) -> object:
    """`tool_calls`, or OpenAI's older `function_call`; None for empty ones and for what Arrow pads."""
    calls = parsed(item.get("tool_calls"))
    if not is_blank(calls):
        return calls
    call = parsed(item.get("function_call"))
    return [call] if isinstance(call, Mapping) and call.get("name") is not None else None


def _with_calls(turn: Message, call: Message, name: str) -> Message:
    if turn.weight != call.weight:
        raise RowProblem(f"{name} is a call of the turn before it, and their weights are not the same")
    extra = {**turn.extra, **call.extra}
    extra["tool_calls"] = [*turn.extra.get("tool_calls", ()), *call.extra.get("tool_calls", ())]
    return replace(turn, extra=extra)


def read_calls(calls: object, name: str) -> list[dict[str, Any]]:
    """Tool calls as templates want them: {type: function, function: {name, arguments}}, arguments as an object.

    OpenAI writes arguments as a string of JSON; a template that applies `tojson` would quote that a second time.
    """
    calls = parsed(calls)
    found: list[dict[str, Any]] = []
    for given in calls if isinstance(calls, list) else [calls]:
        call = parsed(given)
        if isinstance(call, list):
            found += read_calls(call, name)
            continue
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowProblem(f"a tool call of {name} is not {{name, arguments}}: {str(given)[:60]!r}")
        inner = {"name": function["name"], "arguments": _arguments(function, name)}
        outer = {key: value for key, value in call.items() if key == "id" and value is not None}
        found.append({**outer, "type": "function", "function": inner})
    return found


def _arguments(function: Mapping[str, Any], name: str) -> Any:
    """A call's arguments, an object where they are one. Raises RowProblem where they may stand under an unknown key."""
    key = first_of(function, ARGUMENT_KEYS)
    if key is None:
        for other, value in function.items():
            if isinstance(value, Mapping) and value:
                raise RowProblem(
                    f"the tool call {function['name']} of {name} has no arguments; its keys are "
                    f"{', '.join(map(str, function))}; expected {' or '.join(ARGUMENT_KEYS)} in the place of {other}"
                )
    arguments = parsed(function[key]) if key else None
    return {} if is_blank(arguments) else arguments


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Tool definitions, one or a list, or that as text, as {type: function, function: {name, …}}; None for none."""
    tools = parsed(value)
    if is_blank(tools) or (isinstance(tools, str) and tools.strip() in ("None", "null", "nan")):
        return None
    tools = [parsed(tool) for tool in (tools if isinstance(tools, list) else [tools])]
    wrong = next((tool for tool in tools if not isinstance(tool, Mapping)), None)
    if wrong is not None:
        raise RowProblem(f"tools holds {wrong!r:.40}, expected tool definitions: objects with a name and parameters")
    return [_tool(one) for tool in tools for one in _declared(tool)]


def _declared(tool: Mapping[str, Any]) -> list[Any]:
    """Google has several definitions in one."""
    found = next((parsed(tool[key]) for key in ("functionDeclarations", "function_declarations") if key in tool), None)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else [tool]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """One definition, also as OpenAI's newer interface, Anthropic's and MCP have them: no object of their own, the
    schema under another name."""
    if "function" in tool:
        return dict(tool)
    own = {key: value for key, value in tool.items() if key != "type" or value not in ("function", "custom")}
    for key in ("input_schema", "inputSchema"):
        if key in own and "parameters" not in own:
            own = {("parameters" if name == key else name): value for name, value in own.items()}
    return {"type": "function", "function": own}
