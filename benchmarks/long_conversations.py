"""What turning conversations into learned tokens takes, by their turns, in this tree and in others.

    python benchmarks/long_conversations.py [TREE ...] [--turns 2,10,160,1000] [--rows 5000,500,4,1] [--out OUT]

TREE is a checkout of another commit (`git worktree add TREE COMMIT`). Rows are made of common words by a seed: twelve
a turn, or forty asked and sixty answered where there are two turns. SmolLM2's tokenizer and ChatML; each tree in a
fresh process, on one core. Writes OUT.json and OUT.md where asked to.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import surroundings, surroundings_text, table, write_record

WORDS = "the of and to in is it you that he was for on are with as his they be at one have this from"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path)
    parser.add_argument("--turns", default="2,10,160,1000")
    parser.add_argument("--rows", default="5000,500,4,1")
    parser.add_argument("--out", type=Path, help="the record's path without its ending; left out, it is only printed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = list(zip(map(int, given.turns.split(",")), map(int, given.rows.split(",")), strict=True))
    if given.worker:
        print(json.dumps([seconds(*size) for size in sizes]))
        return
    here = Path(__file__).parents[1]
    found = {tree.resolve().name: measured(tree, given) for tree in (*given.trees, here)}
    record = {"sizes": sizes, "seconds_per_row": found, "surroundings": surroundings()}
    if given.out:
        write_record(given.out, record, text(record))
    print(text(record))


def measured(tree: Path, given: argparse.Namespace) -> list[float]:
    """Seconds a row for each size, by the package of a tree."""
    variables = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src"), "RAYON_NUM_THREADS": "1"}
    asked = [sys.executable, __file__, "--worker", "--turns", given.turns, "--rows", given.rows]
    done = subprocess.run(asked, env=variables, capture_output=True, text=True, check=True)
    return [float(each) for each in json.loads(done.stdout.splitlines()[-1])]


def seconds(turns: int, rows: int) -> float:
    """Processor time for a row of so many turns."""
    try:
        from topwork.data.chat.template import ChatTemplate
    except ImportError:  # a tree of before
        from topwork.data.template import ChatTemplate
    from topwork.data.conversations import Conversation, Message
    from topwork.models.config import ModelConfig
    from topwork.models.source import find_source
    from topwork.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(find_source(ModelConfig(model_name_or_path="smollm2-135m"), lambda _: None), False)
    template, draw = ChatTemplate(tokenizer), random.Random(turns)
    template.encode_all([Conversation((Message("user", "a"), Message("assistant", "b")), None, "warm")])

    words = WORDS.split()

    def turn(number: int) -> Message:
        count = 12 if turns > 2 else (40, 60)[number]
        return Message("assistant" if number % 2 else "user", " ".join(draw.choices(words, k=count)))

    made = [Conversation(tuple(map(turn, range(turns))), None, f"row {row}") for row in range(rows)]
    start = time.process_time()
    template.encode_all(made)
    return (time.process_time() - start) / rows


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    trees = record["seconds_per_row"]
    rows = [
        [f"{turns:,}", f"{count:,}", *(f"{each[number] * 1000:,.2f}" for each in trees.values())]
        for number, (turns, count) in enumerate(record["sizes"])
    ]
    head = ["turns", "rows", *(f"{tree}, ms a row" for tree in trees)]
    return (
        "\n\n".join(["# Conversations as learned tokens", table(head, rows), surroundings_text(record["surroundings"])])
        + "\n"
    )


if __name__ == "__main__":
    main()
