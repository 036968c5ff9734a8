"""banking77 (customer message -> one of 77 intents) as chat rows, the same file for Topwork and for its peers.

    python benchmarks/banking77_data.py DATA_DIR OUT_DIR

Reads DATA_DIR/banking77/{train,test}.csv and writes OUT_DIR/{train,test}.jsonl. The answer is the label with spaces
for underscores: the words carry meaning that the model already has.
"""

import csv
import json
import sys
from pathlib import Path

SYSTEM = "You name the intent of a bank customer's message. Answer with the intent only."


def convert(source: Path, target: Path) -> int:
    with open(source, encoding="utf-8", newline="") as lines, open(target, "w", encoding="utf-8") as out:
        rows = [
            [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["text"].strip()},
                {"role": "assistant", "content": row["category"].replace("_", " ")},
            ]
            for row in csv.DictReader(lines)
        ]
        out.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in rows)
    return len(rows)


if __name__ == "__main__":
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        print(split, convert(data / "banking77" / f"{split}.csv", out / f"{split}.jsonl"), "rows")
