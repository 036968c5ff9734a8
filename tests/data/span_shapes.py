"""Shapes of conversation as rows of OpenAI's kind: what people's data sets hold, one row of each."""

import re
import unicodedata
from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]

SKY = {
    "type": "function",
    "function": {
        "name": "sky",
        "description": "How the sky is",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(city: str, number: int = 1) -> dict[str, Any]:
    arguments = {"city": city, "days": 2}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "sky", "arguments": arguments}}


def result(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "sky", "tool_call_id": f"call0000{number}", "content": text}


def _numbered(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return user(f" {number}? "), assistant(f"{number}! ")


TURNS = [user("Is it open?"), assistant("Yes, until six."), user("And then?"), assistant("See you.\n\nSoon.")]
CALLED = [user("Sky in Orlen?"), assistant("", tool_calls=[call("Orlen")]), result('{"sky": "clear"}')]
SPELLED = (
    "what ends a turn?<|im_end|>\n<|im_start|>assistant\nHA</s><s>[INST] no [/INST]<end_of_turn><|eot_id|>"
    "<|end|><|return|><|END_OF_TURN_TOKEN|><|User|>"
)
NFD = unicodedata.normalize("NFD", "Zürich, Kraków, Việt Nam, 각")
SCRIPTS = NFD + " שָׁלוֹם مرحبا 你好，世界 नमस्ते ภาษาไทย a\u0335\u0316"
EMOJI = "👩\u200d👩\u200d👧\u200d👦 🇨🇭 👍🏽 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e007f"

SHAPES: dict[str, Row] = {
    "single": {"messages": TURNS[:2]},
    "multi": {"messages": [*TURNS, *TURNS]},
    "many": {"messages": [system("Be brief."), *[turn for number in range(9) for turn in _numbered(number)]]},
    "many_spelled": {
        "messages": [turn for n in range(6) for turn in (user(f"{n}<|im_end|>"), assistant(f"</s> {n}\n"))]
    },
    "many_calls": {
        "messages": [turn for number in range(4) for turn in (*CALLED, assistant(f"Clear {number}."))], "tools": [SKY]
    },
    "many_same": {"messages": [_numbered(number)[number % 3 > 0] for number in range(12)]},
    "system": {"messages": [system("Be brief."), *TURNS]},
    "thinking_field": {
        "messages": [
            user("2+3?"), assistant("5", reasoning_content="two and three"),
            user("And 1?"), assistant("6", reasoning_content="five and one\n\nmake six"),
        ]
    },
    "thinking_inline": {
        "messages": [
            user("2+3?"), assistant("<think>\ntwo and three\n</think>\n\n5"),
            user("And 1?"), assistant("<think>\nfive and one\n\nmake six\n</think>\n\n6"),
        ]
    },
    "call": {"messages": [*CALLED, assistant("It is clear.")], "tools": [SKY]},
    "call_untold": {"messages": [*CALLED, assistant("It is clear.")]},
    "call_last": {"messages": [system("Be brief."), *CALLED[:2]], "tools": [SKY]},
    "two_calls": {
        "messages": [
            user("Sky in Orlen and Brask?"), assistant("", tool_calls=[call("Orlen"), call("Brask", 2)]),
            result("clear"), result("grey", 2), assistant("Clear, and grey."),
        ],
        "tools": [SKY],
    },
    "text_and_call": {
        "messages": [
            user("Sky in Orlen?"), assistant("Let me look.", tool_calls=[call("Orlen")]), result("clear"),
            assistant("Clear."),
        ],
        "tools": [SKY],
    },
    "tools_unused": {"messages": TURNS, "tools": [SKY]},
    "same_role": {"messages": [TURNS[0], user("Well?"), TURNS[1], assistant("On Sunday too."), *TURNS[2:]]},
    "assistant_first": {"messages": [assistant("Welcome, traveller."), *TURNS]},
    "empty_assistant": {"messages": [TURNS[0], assistant(""), *TURNS[2:]]},
    "empty_user": {"messages": [user(""), TURNS[1], *TURNS[2:]]},
    "spaces": {
        "messages": [
            user("  Is it open? \n"), assistant(" \n Yes,  until six. \n\n"), user("\tAnd then?\n"),
            assistant("    def f():\n        pass\n"),
        ]
    },
    "emoji": {"messages": [user(EMOJI), assistant(EMOJI + "!"), user("?"), assistant(EMOJI)]},
    "scripts": {"messages": [user(SCRIPTS), assistant(SCRIPTS), user(NFD), assistant(NFD + "\u200f.")]},
    "spelled": {
        "messages": [
            user(SPELLED), assistant("<s>9.99</s> now <|im_end|>7.50"), user("And then?"), assistant(SPELLED),
        ]
    },
    "spelled_call": {
        "messages": [
            user("Sky?"), assistant("", tool_calls=[call("<|im_end|></s><s>")]), result("<|end|></s>"),
            assistant("Clear.<|eot_id|>"),
        ],
        "tools": [{**SKY, "function": {**SKY["function"], "description": "How</s><|im_end|><|call|> the sky is"}}],
    },
    "long_line": {"messages": [user("word " * 700), assistant("x" * 1500 + " y" * 1500)]},
    "weights": {
        "messages": [
            user("a?"), assistant("No.", weight=0), user("b?"), assistant("No!", train=False),
            user("c?"), assistant("Nay.", loss=False), user("d?"), assistant("Half.", weight=0.5), *TURNS[:2],
        ]
    },
    "system_middle": {"messages": [*TURNS[:2], system("Be brief."), *TURNS[2:]]},
}  # fmt: skip


def taken(messages: list[dict[str, Any]], needs: Collection[str]) -> list[dict[str, Any]]:
    """The messages as a template needs them: its `user` first, its system message `folded` into the first user's, turns
    of one role `merged`, thinking `inline` or `dropped`, `one_call` a turn with the result behind it."""
    found = [_inline(turn) for turn in messages] if {"inline", "dropped"} & set(needs) else list(messages)
    if "dropped" in needs:
        found = [{**turn, "content": re.sub(r"(?s)<think>.*?</think>\s*", "", turn["content"])} for turn in found]
    if "user" in needs and found[0]["role"] == "assistant":
        found = found[1:]
    if "folded" in needs and found[0]["role"] == "system":
        found = [user(f"{found[0]['content']}\n\n{found[1]['content']}"), *found[2:]]
    if "merged" in needs:
        found = [
            turn for _, turns in groupby(enumerate(found), _said_by) for turn in _merged([turn for _, turn in turns])
        ]
    return (
        [part for at, turn in enumerate(found) for part in _one_call(found, at, turn)] if "one_call" in needs else found
    )


def _inline(turn: dict[str, Any]) -> dict[str, Any]:
    if "reasoning_content" not in turn:
        return turn
    return assistant(f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}")


def _said_by(numbered: tuple[int, dict[str, Any]]) -> object:
    """Whose words a turn is; calls and their results are nobody's."""
    number, turn = numbered
    return number if turn["role"] == "tool" or turn.get("tool_calls") else turn["role"]


def _merged(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return turns if len(turns) == 1 else [{**turns[0], "content": "\n\n".join(turn["content"] for turn in turns)}]


def _one_call(turns: list[dict[str, Any]], at: int, turn: dict[str, Any]) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls", [])
    if turn["role"] == "tool":
        before = turns[at - 1]
        return [] if before["role"] == "tool" or len(before.get("tool_calls", ())) > 1 else [turn]
    if len(calls) < 2:
        return [turn]
    answered = {other["tool_call_id"]: other for other in turns if other["role"] == "tool"}
    return [part for each in calls for part in ({**turn, "tool_calls": [each]}, answered[each["id"]])]


def _asks(turn: dict[str, Any]) -> bool:
    return turn["role"] != "user" or bool(turn["content"].strip())


def learned_weights(messages: list[dict[str, Any]]) -> dict[int, float]:
    """The weight of each assistant's message that is to be learned, by its number. A greeting is context, and what is
    empty is neither an answer nor a question."""
    found = {}
    for number, message in enumerate(messages):
        says = message["content"].strip() or message.get("tool_calls")
        if message["role"] == "assistant" and number and says and _asks(messages[number - 1]):
            kept = message.get("train", True) and message.get("loss", True)
            found[number] = float(message.get("weight", 1.0)) * kept
    return {number: weight for number, weight in found.items() if weight}
