"""Two made rows in the columns of each data set that many people train on: their files cannot be shipped.

The first learned or prompting text of each begins with "First".
"""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURNS = [{"role": "user", "content": "First of all, hi."}, {"role": "assistant", "content": "Hello."}]
SAID = [{"from": "human", "value": "First of all, hi."}, {"from": "gpt", "value": "Hello."}]
CALL = {"name": "price", "arguments": {"of": "tea"}}
TOOL = {"name": "price", "description": "Of what", "parameters": {"type": "object"}}


def parts(role: str, text: str, weight: float) -> dict[str, Any]:
    """A message of LLaMA-Factory's version 1."""
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}


PARTS = [parts("user", "First of all, hi.", 0.0), parts("assistant", "Hello.", 1.0)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "banking77/test.csv": [{"text": "First, where is my card?", "category": "card_arrival"}],
    "e2e_nlg/devset.csv": [{"mr": "First[Alimentum], area[city centre]", "ref": 'In the city, "Alimentum".'}],
    "gsm8k/test.jsonl": [{"question": "First 2 eggs’ day, then 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "mlx_wikisql/train.jsonl": [{"text": "First: 1-10\ncolumns: Notes\nQ: Which notes? \nA: SELECT Notes FROM 1-10"}],
    "rasbt_instruct/instruction-data.json": [{"instruction": "First spell it.", "input": "freind", "output": "friend"}],
    "llamafactory_demo/identity.json": [{"instruction": "First, hi", "input": "", "output": "I am {{name}}."}],
    "llamafactory_demo/v1_sft_demo.jsonl": [{"messages": PARTS}],
    "llamafactory_demo/glaive_toolcall_en_demo.json": [
        {
            "conversations": [
                *SAID,
                {"from": "human", "value": "What does tea cost?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": '{"price": 3}'},
                {"from": "gpt", "value": "Three."},
            ],
            "tools": json.dumps([TOOL]),
        }
    ],
    "foundry_formats/gsm8k_chat_train.jsonl": [
        {"messages": [{"role": "system", "content": "First be right."}, *TURNS]},
    ],
    "foundry_formats/stock_toolcall_training.jsonl": [
        {
            "messages": [
                TURNS[0],
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "call_1", "type": "function",
                            "function": {"name": "price", "arguments": json.dumps(CALL["arguments"])},
                        },
                    ],
                },
            ],
            "tools": [{"type": "function", "function": TOOL}],
        }
    ],
    "fastchat/dummy_conversation.json": [{"id": "identity_0", "conversations": SAID}],
    "torchtune_tiny/alpaca_tiny.json": [
        {"instruction": "First tip?", "input": "", "output": "Sleep.", "text": "Below is an instruction. First tip?"}
    ],
    "torchtune_tiny/chat_tiny.json": [{"conversations": [{"from": "system", "value": "First be kind."}, *SAID]}],
    "torchtune_tiny/instruct_tiny.json": [{"instruction": "First, what time is it?", "response": "10:00 AM"}],
    "rasbt_instruct/instruction-data-with-preference.json": [
        {"instruction": "Spell it.", "input": "freind", "output": "friend", "rejected": "frend", "chosen": "friend"}
    ],
    "hh_rlhf/helpful-base.test.jsonl": [
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}
    ],
    "llamafactory_demo/dpo_en_demo.json": [
        {"conversations": SAID[:1], "chosen": SAID[1], "rejected": {"from": "gpt", "value": "Go."}}
    ],
    "llamafactory_demo/v1_dpo_demo.jsonl": [{"chosen_messages": PARTS, "rejected_messages": PARTS}],
    "llamafactory_demo/kto_en_demo.json": [{"messages": TURNS, "label": True}],
    "foundry_formats/orca_dpo_pairs.validation.jsonl": [
        {"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": TURNS[1:]}
    ],
    "torchtune_tiny/hh_rlhf_tiny.json": [{"chosen": TURNS, "rejected": TURNS}],
    "torchtune_tiny/stack_exchange_paired_tiny.json": [
        {"question": "How?", "response_j": "So.", "response_k": "I do not know."}
    ],
    "foundry_formats/countdown_train_100.jsonl": [{"messages": TURNS[:1], "target": 5, "nums": [2, 3]}],
}  # fmt: skip
TEXTS = {"wikitext2/valid.txt": " \n = First of all = \n \n A paragraph of <unk> words . \n"}


def _csv(rows: list[dict[str, Any]]) -> str:
    written = io.StringIO()
    table = csv.DictWriter(written, rows[0])
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


AS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    ".csv": _csv,
    ".json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False),
    ".jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
}


def write_made(folder: Path) -> Path:
    """All of them below a folder, under the names of the real ones."""
    texts = {name: AS[Path(name).suffix](rows * 2) for name, rows in ROWS.items()}
    for name, text in (texts | TEXTS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder
