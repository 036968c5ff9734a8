"""A row of every shape in which people keep preferences, and what it says."""

from typing import Any

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = {"role": "user", "content": "Two and two?"}
GOOD = {"role": "assistant", "content": "Four."}
POOR = {"role": "assistant", "content": "Five!"}
FROM_ASKED = {"from": "human", "value": "Two and two?"}
FROM_GOOD = {"from": "gpt", "value": "Four."}
FROM_POOR = {"from": "gpt", "value": "Five!"}
BEFORE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def parts(turn: dict[str, Any], weight: float) -> dict[str, Any]:
    """LLaMA-Factory's v1 way of writing it."""
    return {"role": turn["role"], "content": [{"type": "text", "value": turn["content"]}], "loss_weight": weight}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{who}: {said}" for who, said in zip(("Human", "Assistant") * 9, turns))


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five!"},
    "orca": {"question": "Two and two?", "chosen": "Four.", "rejected": "Five!", "id": 7},
    "argilla": {"instruction": "Two and two?", "chosen_response": "Four.", "rejected_response": "Five!"},
    "axolotl_icr": {"input": "Two and two?", "chosen": "Four.", "rejected": "Five!"},
    "alpaca": {"instruction": "Two and two?", "input": "", "output": "4", "chosen": "Four.", "rejected": "Five!"},
    "stack_exchange": {"question": "Two and two?", "response_j": "Four.", "response_k": "Five!"},
    "messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [POOR]},
    "whole_talks": {"chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]},
    "ultrafeedback": {
        "prompt": "Two and two?", "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR], "messages": [ASKED, GOOD],
    },
    "torchtune": {"chosen_conversations": [ASKED, GOOD], "rejected_conversations": [ASKED, POOR]},
    "whole_sharegpt": {"chosen": [FROM_ASKED, FROM_GOOD], "rejected": [FROM_ASKED, FROM_POOR]},
    "hh": {"chosen": hh("Two and two?", "Four."), "rejected": hh("Two and two?", "Five!")},
    "factory": {"conversations": [FROM_ASKED], "chosen": FROM_GOOD, "rejected": FROM_POOR},
    "factory_v1": {
        "chosen_messages": [parts(ASKED, 0.0), parts(GOOD, 1.0)],
        "rejected_messages": [parts(ASKED, 0.0), parts(POOR, 1.0)],
    },
    "swift": {"messages": [ASKED, GOOD], "rejected_response": "Five!"},
    "swift_talks": {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, POOR]},
    "swift_sharegpt": {"conversations": [FROM_ASKED, FROM_GOOD], "rejected_response": "Five!"},
    "openai": {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [POOR]},
    "nectar": {
        "prompt": "\n\nHuman: Two and two?\n\nAssistant: ", "turns": 1,
        "answers": [
            {"answer": "Maybe six.", "model": "b", "rank": 2.0}, {"answer": "Five!", "model": "c", "rank": 7.0},
            {"answer": "Four.", "model": "a", "rank": 1.0},
        ],
    },
}  # fmt: skip
"""All of them ask for two and two and prefer "Four." to "Five!"."""

JUDGED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": "Two and two?", "completion": "Four.", "label": True},
    "trl_messages": {"prompt": [ASKED], "completion": [GOOD], "label": True},
    "axolotl": {"question": "Two and two?", "response": "Four.", "label": 1},
    "alpaca": {"instruction": "Two and two?", "input": "", "output": "Four.", "kto_tag": "true"},
    "factory": {"messages": [ASKED, GOOD], "label": True},
    "factory_sharegpt": {"conversations": [FROM_ASKED, FROM_GOOD], "kto_tag": True},
    "talk_as_completion": {"completion": [ASKED, GOOD], "label": "👍"},
}
"""All of them find "Four." a good answer to two and two."""

PROMPTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trl": ({"prompt": "Two and two?", "solution": 4}, {"solution": 4}),
    "messages": ({"messages": [ASKED], "target": 4}, {"target": 4}),
    "verl": (
        {
            "data_source": "sums", "prompt": [ASKED], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0},
        },
        {
            "data_source": "sums", "ability": "math", "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0},
        },
    ),
    "verifiers": ({"question": "Two and two?", "answer": "4", "info": {"a": 2}}, {"answer": "4", "info": {"a": 2}}),
}  # fmt: skip
"""All of them ask for two and two; beside each what is kept for the reward."""
