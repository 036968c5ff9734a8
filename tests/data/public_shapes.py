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


SHAPES: dict[str, Shape] = {
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
    "xlam": Shape(
        {"id": 0, "query": "Tide at Brask?", "answers": json.dumps([TIDE_CALL]), "tools": json.dumps([TIDE])},
        words=r"data\.columns",
        advice={"columns": {"prompt": "query", "completion": "answers"}},
        then=TIDE_TOLD + said(("user", "Tide at Brask?"), ("assistant", json.dumps([TIDE_CALL]))),
    ),
    "glaive_v2": Shape(
        {
            "system": "SYSTEM: You may call functions.",
            "chat": "USER: Hi there\n\n\nASSISTANT: Hello! <|endoftext|>\n\n\nUSER: Bye\n\n\nASSISTANT: See you.",
        },
        words=r"data\.columns",
        advice={"columns": {"text": "chat"}, "response_part": "ASSISTANT:", "instruction_part": "USER:"},
        then="USER: Hi there\n\n\nASSISTANT:⟦ Hello! <|endoftext|>\n\n\n⟧USER: Bye\n\n\n"
        "ASSISTANT:⟦ See you.<|im_end|>⟧",
    ),
    "capybara": Shape(
        {"source": "Airoboros", "conversation": [{"input": "Hi there", "output": "Hello!"}]}, words=r"conversation"
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
    "squad": Shape(
        {
            "id": "5733", "title": "Mills", "context": "The mill opened in 1830.", "question": "When?",
            "answers": {"text": ["1830"], "answer_start": [19]},
        },
        words=r"data\.columns",
        advice={"columns": {"prompt": "{context}\n\n{question}", "completion": "{answers.text}"}},
        then=said(("user", "The mill opened in 1830.\n\nWhen?"), ("assistant", "1830")),
    ),
    "sciq": Shape(
        {
            "question": "What falls?", "distractor3": "a cat", "distractor1": "a hill", "distractor2": "a mill",
            "correct_answer": "rain", "support": "Rain falls.",
        },
        words=r"data\.columns",
        advice={"columns": {"prompt": "{support}\n{question}", "completion": "correct_answer"}},
        then=said(("user", "Rain falls.\nWhat falls?"), ("assistant", "rain")),
    ),
    "metamath": Shape(
        {"type": "GSM_Rephrased", "query": "2+3?", "original_question": "3+2?", "response": "5"},
        words=r"original_question looks like a part.*data\.columns: {prompt: query, completion: response}",
        advice={"columns": {"prompt": "query", "completion": "response"}},
        then=said(("user", "2+3?"), ("assistant", "5")),
    ),
    "code_alpaca": Shape(
        {"instruction": "Sort it.", "input": "[3, 1]", "output": "[1, 3]"},
        said(("user", "Sort it.\n\n[3, 1]"), ("assistant", "[1, 3]")),
    ),
    "alpaca": Shape(
        {"instruction": "Sort it.", "input": "", "output": "[1, 3]", "text": "Below is an instruction. Sort it."},
        said(("user", "Sort it."), ("assistant", "[1, 3]")),
    ),
    "oasst_guanaco": Shape(
        {"text": "### Human: Hi there### Assistant: Hello!"},
        advice={"response_part": "### Assistant:", "instruction_part": "### Human:"},
        read="#⟦## Human: Hi there### Assistant: Hello!<|im_end|>⟧",
        then="### Human: Hi there### Assistant:⟦ Hello!<|im_end|>⟧",
    ),
    "oasst_messages": Shape(
        {"message_id": "6ab2", "parent_id": None, "text": "Hi there", "role": "prompter", "lang": "en", "rank": None},
        "Hi⟦ there<|im_end|>⟧",
        words=r"read as text: every token of text.*not read: message_id, role, lang",
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
    "bitext": Shape(
        {
            "flags": "B", "instruction": "cancel order {{Order Number}}", "category": "ORDER",
            "intent": "cancel_order", "response": "Order {{Order Number}} is cancelled.",
        },
        said(("user", "cancel order {{Order Number}}"), ("assistant", "Order {{Order Number}} is cancelled.")),
    ),
    "cnn_dailymail": Shape(
        {"article": "The mill burned.\nAll are well.", "highlights": "Mill burns .", "id": "42c0"},
        words=r"data\.columns",
        advice={"columns": {"prompt": "article", "completion": "highlights"}},
        then=said(("user", "The mill burned.\nAll are well."), ("assistant", "Mill burns .")),
    ),
    "samsum": Shape(
        {"id": "138", "dialogue": "Ann: Bread?\r\nBo: Yes!", "summary": "Bo wants bread."},
        words=r"data\.columns",
        advice={"columns": {"prompt": "Sum up:\n{dialogue}", "completion": "{summary}"}},
        then=said(("user", "Sum up:\nAnn: Bread?\r\nBo: Yes!"), ("assistant", "Bo wants bread.")),
    ),
    "wmt": Shape(
        {"translation": {"en": "The cat sleeps.", "de": "Die Katze schläft."}},
        words=r"translation.*data\.columns",
        advice={"columns": {"prompt": "{translation.en}", "completion": "{translation.de}"}},
        then=said(("user", "The cat sleeps."), ("assistant", "Die Katze schläft.")),
    ),
    "sst2": Shape(
        {"sentence": "a hollow tale", "label": 0, "idx": 7},
        words=r"data\.columns",
        advice={"columns": {"prompt": "sentence", "completion": "label"}},
        then=said(("user", "a hollow tale"), ("assistant", "0")),
    ),
    "stsb": Shape(
        {"sentence1": "A cat.", "sentence2": "A dog.", "label": 2.5, "idx": 1},
        words=r"data\.columns",
        advice={"columns": {"prompt": "{sentence1} | {sentence2}", "completion": "{label}"}},
        then=said(("user", "A cat. | A dog."), ("assistant", "2.5")),
    ),
    "ag_news": Shape(
        {"text": "The mill burned.", "label": 2},
        words=r"prompt: text, completion: label",
        advice={"columns": {"prompt": "text", "completion": "label"}},
        then=said(("user", "The mill burned."), ("assistant", "2")),
    ),
    "helpsteer2": Shape(
        {"prompt": "Hi there", "response": "Hello!", "helpfulness": 4, "correctness": 4, "verbosity": 1},
        said(("user", "Hi there"), ("assistant", "Hello!")),
    ),
    "no_robots": Shape(
        {"prompt": "x", "prompt_id": "b5", "messages": BRAID, "category": "Generation"}, said(*BRAIDED)
    ),
    "aya": Shape(
        {"inputs": "Habari?", "targets": "Nzuri.", "language": "Swahili", "user_id": "f"},
        words=r"data\.columns",
        advice={"columns": {"prompt": "inputs", "completion": "targets"}},
        then=said(("user", "Habari?"), ("assistant", "Nzuri.")),
    ),
    "orca_agentinstruct": Shape({"messages": json.dumps(BRAID)}, said(*BRAIDED)),
    "hermes_function_calling": Shape(
        {
            "id": "e1",
            "conversations": [
                {"from": "system", "value": f"<tools> [{json.dumps(TIDE)}] </tools>"},
                {"from": "human", "value": "Tide at Brask?"},
                {"from": "gpt", "value": f"<tool_call>\n{json.dumps(TIDE_CALL)}\n</tool_call>"},
            ],
            "category": "Harbour", "subcategory": "Tides", "task": "Ask",
        },
        said(
            ("system", f"<tools> [{json.dumps(TIDE)}] </tools>"), ("user", "Tide at Brask?"),
            ("assistant", f"<tool_call>\n{json.dumps(TIDE_CALL)}\n</tool_call>"),
        ),
    ),
    "lima": Shape({"conversations": [turn["content"] for turn in BRAID], "source": "wikihow"}, words=r"convers"),
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
        words=r"contents",
        advice={"columns": {"messages": "contents"}, "message_keys": {"parts": "content"}},
        then=said(*BRAIDED),
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
    "belle": Shape({"instruction": "2+3?", "input": None, "output": 5}, said(("user", "2+3?"), ("assistant", "5"))),
    "s1k": Shape(
        {
            "question": "2+3?", "solution": "5", "cot_type": "math", "attempt": "5",
            "thinking_trajectories": ["Two and three."], "source_type": "x",
        },
        said(("user", "2+3?"), ("assistant", "5")),
        words=r"question -> solution.*not read: .*thinking_trajectories",
        advice={
            "columns": {"prompt": "question", "completion": "<think>\n{thinking_trajectories}\n</think>\n\n{attempt}"}
        },
        then=said(("user", "2+3?"), ("assistant", "<think>\nTwo and three.\n</think>\n\n5")),
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
