"""Rows in the columns of well-known public data sets that are no conversations; made like those of `public_shapes`."""

import json

from data.public_shapes import BRAID, BRAIDED, CALLED, TIDE, TIDE_CALL, TIDE_TOLD, Shape, said

COLUMNS: dict[str, Shape] = {
    "xlam": Shape(
        {"id": 0, "query": "Tide at Brask?", "answers": json.dumps([TIDE_CALL]), "tools": json.dumps([TIDE])},
        words=r"data\.columns: {prompt: query, tool_calls: answers}",
        advice={"columns": {"prompt": "query", "tool_calls": "answers"}},
        then=TIDE_TOLD + said(("user", "Tide at Brask?"), ("assistant", CALLED)),
    ),
    "squad": Shape(
        {
            "id": "5733", "title": "Mills", "context": "The mill opened in 1830.", "question": "When?",
            "answers": {"text": ["1830"], "answer_start": [19]},
        },
        words=r"data\.columns: {prompt: \"{context}.*{question}\", completion: \"{answers\.text\[0\]}\"}",
        advice={"columns": {"prompt": "{context}\n\n{question}", "completion": "{answers.text}"}},
        then=said(("user", "The mill opened in 1830.\n\nWhen?"), ("assistant", "1830")),
    ),
    "sciq": Shape(
        {
            "question": "What falls?", "distractor3": "a cat", "distractor1": "a hill", "distractor2": "a mill",
            "correct_answer": "rain", "support": "Rain falls.",
        },
        words=r"data\.columns: {prompt: question, completion: correct_answer}",
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
        words=r"prompt: \"translation\.en\", completion: \"translation\.de\"",
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
    "aya": Shape(
        {"inputs": "Habari?", "targets": "Nzuri.", "language": "Swahili", "user_id": "f"},
        words=r"data\.columns: {prompt: inputs, completion: targets}",
        advice={"columns": {"prompt": "inputs", "completion": "targets"}},
        then=said(("user", "Habari?"), ("assistant", "Nzuri.")),
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
    "mmlu": Shape(
        {"question": "2+3?", "choices": ["4", "5"], "answer": 1},
        words=r"choices looks like a part of the question",
        advice={"columns": {"prompt": "{question}\nA {choices[0]}\nB {choices[1]}", "completion": "answer"}},
        then=said(("user", "2+3?\nA 4\nB 5"), ("assistant", "1")),
    ),
    "arc": Shape(
        {"id": "M1", "question": "2+3?", "choices": {"text": ["4", "5"], "label": ["A", "B"]}, "answerKey": "B"},
        words=r"choices\.text\[0\].*completion: answerKey",
    ),
    "firefly_history": Shape(
        {"instruction": "And 1?", "input": "", "output": "6", "history": [["2+3?", "5"]]},
        said(("user", "2+3?"), ("assistant", "5"), ("user", "And 1?"), ("assistant", "6")),
    ),
    "natural_questions": Shape(
        {"question": "Who?", "answers": ["Bo", "Bo Brask"]},
        words=r"data\.columns: {prompt: question, completion: \"{answers\[0\]}\"}",
    ),
    "user_assistant": Shape(
        {"system": "Be brief.", "user": "Hi there", "assistant": "Hello!"},
        said(("system", "Be brief."), ("user", "Hi there"), ("assistant", "Hello!")),
    ),
    "ultrafeedback": Shape(
        {"prompt": "Hi", "chosen": BRAID, "rejected": BRAID, "messages": BRAID, "score_chosen": 8.0},
        words=r"preference.*data\.format: messages and data\.columns: {messages: chosen}",
        advice={"format": "messages", "columns": {"messages": "chosen"}},
        then=said(*BRAIDED),
    ),
    "hh_rlhf": Shape(
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
        words=r"preference.*data\.response_part",
    ),
    "orca_dpo_pairs": Shape(
        {"system": "Be brief.", "question": "2+3?", "chosen": "5", "rejected": "6"},
        words=r"preference.*data\.columns: {prompt: question, completion: chosen}",
        advice={"columns": {"prompt": "question", "completion": "chosen"}},
        then=said(("system", "Be brief."), ("user", "2+3?"), ("assistant", "5")),
    ),
    "kto_mix": Shape({"prompt": "2+3?", "completion": "6", "label": False}, words=r"judge answers.*KTO"),
    "verl": Shape(
        {
            "data_source": "gsm8k", "prompt": [BRAID[0]], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "5"}, "extra_info": {"index": 0},
        },
        words=r"no answers: these rows are prompts.*completion: COLUMN",
    ),
}  # fmt: skip
