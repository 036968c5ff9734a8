"""Rows in the columns of well-known public data sets, written for these tests, and what a reader of them would expect.

The text of a row is what `chatml` makes of it, learned stretches in ⟦ ⟧, or a document's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Turns = Sequence[tuple[str, str]]
BRAID = [{"role": "user", "content": "How do I braid rope?"}, {"role": "assistant", "content": "Over, under, over."}]
BRAIDED: Turns = (("user", "How do I braid rope?"), ("assistant", "Over, under, over."))
HUMAN = {"from": "human", "value": "How do I braid rope?", "weight": None}
GPT = {"from": "gpt", "value": "Over, under, over.", "weight": None}
TIDE = {
    "name": "tide_at", "description": "When the tide is high",
    "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
}  # fmt: skip
TIDE_CALL = {"name": "tide_at", "arguments": {"port": "Brask"}}
CALLED = f"<tool_call>\n{json.dumps(TIDE_CALL)}\n</tool_call>"
THOUGHT = (
    "<|begin_of_thought|>\n\nTwo strands.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nTwo.\n\n<|end_of_solution|>"
)


TIDE_TOOL = json.dumps({"type": "function", "function": TIDE})
TIDE_TOLD = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    f"<tools>\n{TIDE_TOOL}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
"""How `chatml` tells of the tool."""


def said(*turns: tuple[str, str]) -> str:
    """What `chatml` makes of these turns where every assistant's is learned."""
    text = ""
    for role, content in turns:
        text += f"<|im_start|>{role}\n" + ("⟦" if role == "assistant" else "")
        text += content + ("<|im_end|>⟧\n" if role == "assistant" else "<|im_end|>\n")
    return text.removesuffix("\n")


@dataclass(frozen=True)
class Shape:
    """A row and what is to come of it.

    read     its text where it is read without a word; "" where it is refused
    words    what stands in the refusal, or in what is told beside reading it (a regular expression)
    advice   the options that the refusal leads to, and `then` its text with these
    """

    row: dict[str, Any]
    read: str = ""
    words: str = ""
    advice: dict[str, Any] = field(default_factory=dict)
    then: str = ""


CHATS: dict[str, Shape] = {
    "openhermes": Shape(
        {
            "custom_instruction": None, "topic": None, "model_name": None, "skip_prompt_formatting": False,
            "category": "riddle", "conversations": [HUMAN, GPT], "views": None, "language": None, "id": "a1",
            "title": None, "idx": None, "hash": None, "system_prompt": None, "source": "airoboros2.2",
        },
        said(*BRAIDED),
    ),
    "ultrachat_200k": Shape(
        {"prompt": BRAID[0]["content"], "prompt_id": "f0e37e9f", "messages": BRAID}, said(*BRAIDED)
    ),
    "ultrachat_original": Shape({"id": "0", "data": [turn["content"] for turn in BRAID]}, words=r"data"),
    "toolace": Shape(
        {
            "system": "You compose functions.",
            "conversations": [
                {"from": "user", "value": "Tide at Brask?"},
                {"from": "assistant", "value": '[tide_at(port="Brask")]'},
                {"from": "tool", "value": '[{"name": "tide_at", "results": {"high": 7}}]'},
                {"from": "assistant", "value": "At seven."},
            ],
        },
        said(("system", "You compose functions."), ("user", "Tide at Brask?"), ("assistant", '[tide_at(port="Brask")]'))
        + "\n<|im_start|>user\n<tool_response>\n"
        + '[{"name": "tide_at", "results": {"high": 7}}]\n</tool_response><|im_end|>\n'
        + said(("assistant", "At seven.")),
    ),
    "capybara": Shape(
        {"source": "Airoboros", "conversation": [{"input": "Hi there", "output": "Hello!"}]},
        said(("user", "Hi there"), ("assistant", "Hello!")),
        r"read as messages: conversation \(input, output\) -> every assistant turn",
    ),
    "openthoughts": Shape(
        {
            "system": "Think first.",
            "conversations": [{"from": "user", "value": "Strands?"}, {"from": "assistant", "value": THOUGHT}],
        },
        said(("system", "Think first."), ("user", "Strands?"), ("assistant", THOUGHT)),
    ),
    "numina_math_cot": Shape(
        {"source": "orca_math", "problem": "How?", "solution": "So.", "messages": BRAID}, said(*BRAIDED)
    ),
    "wildchat": Shape(
        {
            "conversation_hash": "9f", "model": "gpt-4", "timestamp": "2023-04-09",
            "conversation": [
                {**turn, "country": "Norway", "hashed_ip": "ab", "language": "English", "redacted": False,
                 "header": {"accept-language": "no"}, "toxic": False, "turn_identifier": 1}
                for turn in BRAID
            ],
            "turn": 1, "language": "English", "openai_moderation": [{"flagged": False}], "toxic": False,
        },
        said(*BRAIDED),
    ),
    "lmsys_chat_1m": Shape(
        {
            "conversation_id": "33", "model": "vicuna-13b", "conversation": BRAID, "turn": 1, "language": "English",
            "openai_moderation": [{"categories": {"hate": False}}], "redacted": False,
        },
        said(*BRAIDED),
    ),
    "magpie": Shape(
        {
            "uuid": "d1", "model": "L3", "gen_input_configs": {"temperature": 1.0}, "instruction": HUMAN["value"],
            "response": GPT["value"], "conversations": [HUMAN, GPT], "task_category": "Advice", "difficulty": "easy",
        },
        said(*BRAIDED),
    ),
    "smoltalk": Shape({"messages": BRAID, "source": "smol-magpie-ultra"}, said(*BRAIDED)),
    "smoltalk2": Shape(
        {"messages": BRAID, "chat_template_kwargs": {"enable_thinking": False, "xml_tools": []}, "source": "s"},
        said(*BRAIDED),
        words=r"chat_template_kwargs",
    ),
    "tulu3": Shape({"id": "oasst1_1", "messages": BRAID, "source": "ai2-adapt-dev"}, said(*BRAIDED)),
    "no_robots": Shape(
        {"prompt": "x", "prompt_id": "b5", "messages": BRAID, "category": "Generation"}, said(*BRAIDED)
    ),
    "orca_agentinstruct": Shape({"messages": json.dumps(BRAID)}, said(*BRAIDED)),
    "hermes_function_calling": Shape(
        {
            "id": "e1",
            "conversations": [
                {"from": "system", "value": f"<tools> [{json.dumps(TIDE)}] </tools>"},
                {"from": "human", "value": "Tide at Brask?"},
                {"from": "gpt", "value": CALLED},
            ],
            "category": "Harbour", "subcategory": "Tides", "task": "Ask",
        },
        said(
            ("system", f"<tools> [{json.dumps(TIDE)}] </tools>"), ("user", "Tide at Brask?"),
            ("assistant", CALLED),
        ),
    ),
    "langchain": Shape(
        {
            "messages": [
                {"role": "user", "content": "Tide at Brask?"},
                {
                    "role": "assistant", "content": "",
                    "tool_calls": [{"name": "tide_at", "args": {"port": "Brask"}, "id": "c1", "type": "tool_call"}],
                },
            ]
        },
        said(("user", "Tide at Brask?"), ("assistant", CALLED)),
    ),
    "lima": Shape(
        {"conversations": [turn["content"] for turn in BRAID], "source": "wikihow"},
        words=r"conversations (is|has|holds) .*text",
    ),
    "bedrock": Shape(
        {
            "system": "Be brief.",
            "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in BRAID],
        },
        said(("system", "Be brief."), *BRAIDED),
    ),
    "gemini": Shape(
        {
            "contents": [
                {"role": "user", "parts": [{"text": "How do I braid rope?"}]},
                {"role": "model", "parts": [{"text": "Over, under, over."}]},
            ]
        },
        said(*BRAIDED),
    ),
    "cohere": Shape(
        {
            "messages": [
                {"role": "User", "content": "How do I braid rope?"},
                {"role": "Chatbot", "content": "Over, under, over."},
            ]
        },
        words=r"data\.roles",
        advice={"roles": {"User": "user", "Chatbot": "assistant"}},
        then=said(*BRAIDED),
    ),
    "dialogsum_speakers": Shape(
        {"dialog": [{"speaker": "client", "utterance": "Hi there"}, {"speaker": "agent", "utterance": "Hello!"}]},
        words=r"unknown role 'client'.*data\.roles: {client: user, agent: assistant}",
        advice={
            "columns": {"messages": "dialog"}, "message_keys": {"speaker": "role", "utterance": "content"},
            "roles": {"client": "user", "agent": "assistant"},
        },
        then=said(("user", "Hi there"), ("assistant", "Hello!")),
    ),
}  # fmt: skip
