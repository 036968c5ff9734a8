"""The folders in `cases`: files as people have them, read by a recipe, and shown with what is learned of them."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.family_tokenizers import TEMPLATES
from topwork.common.errors import DataError
from topwork.data.examples import Data, load_data
from topwork.recipe.recipe import load_recipe

CASES = Path(__file__).parent / "cases"
LONG_CELL = "long words, " * 11_700
MESSAGES = [
    json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"hello {n}"}]) for n in "012"
]


def template(name: str) -> str:
    """A template's file."""
    return str(TEMPLATES / f"{name}.jinja")


def _sky_parquet(folder: Path) -> None:
    """Arrow gives every call, and every tool, the keys of all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    read = pq.read_table(folder / "train.parquet").to_pylist()
    assert "sku" in read[0]["messages"][1]["tool_calls"][0]["function"]["arguments"], "no padding, no test"


def _json_text_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"messages": MESSAGES}), folder / "train.parquet")


def _long_cell(folder: Path) -> None:
    (folder / "b.csv").write_text(f'prompt,completion\nshort,yes\n"{LONG_CELL}",no\n', "utf-8")


MADE: dict[str, Callable[[Path], None]] = {"01": _sky_parquet, "15": _json_text_parquet, "14": _long_cell}
"""Files that are too large for the repository, or no text."""


@dataclass(frozen=True)
class Read:
    """Sequences as text, learned stretches in ⟦ ⟧; and what was told."""

    train: list[str]
    eval: list[str]
    said: list[str]
    data: Data


class Case:
    """A folder of its own with a case's files."""

    def __init__(self, number: str, folder: Path, base: Path, tokenizer: Any) -> None:
        self.folder, self.base, self.tokenizer = folder / number, base, tokenizer
        shutil.copytree(CASES / number, self.folder)
        MADE.get(number, lambda _: None)(self.folder)

    def read(self, **data: Any) -> Read:
        """By a recipe beside the files, with these options of `data`."""
        values = {
            "model": {"model_name_or_path": str(self.base), "dtype": "float32"},
            "data": {"max_length": 2048, "eval_fraction": 0, **data},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
        said: list[str] = []
        found = load_data(load_recipe(path).data, self.tokenizer, 2048, 0, said.append)
        shown = ([self.shown(item) for item in part] for part in (found.train, found.eval))
        return Read(*shown, said, found)

    def refused(self, words: str, **data: Any) -> str:
        """The message, in which the words stand (a regular expression)."""
        with pytest.raises(DataError, match=re.compile(words, re.DOTALL)) as refused:
            self.read(**data)
        return str(refused.value)

    def shown(self, example: Any) -> str:
        runs: list[tuple[bool, list[int]]] = []
        for token, weight in zip(example.tokens.tolist(), example.weights.tolist()):
            if not runs or runs[-1][0] != (weight > 0):
                runs.append((weight > 0, []))
            runs[-1][1].append(token)
        texts = [(is_learned, self.tokenizer.decode(ids, skip_special_tokens=False)) for is_learned, ids in runs]
        return "".join(f"⟦{text}⟧" if is_learned else text for is_learned, text in texts)


OpenCase = Callable[[str], Case]


def learned(shown: str) -> list[str]:
    """The learned stretches of a sequence."""
    return re.findall("⟦(.*?)⟧", shown, re.DOTALL)


def chatml(*turns: str) -> str:
    """What `chatml` makes of "role: text" turns on a tokenizer without its special tokens; the last is learned."""
    *asked, (_, answer) = [turn.split(": ", 1) for turn in turns]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in asked)
    return f"<s> {text}<|im_start|>assistant\n⟦{answer}<|im_end|></s>⟧"


def sky_tool(name: str, argument: str) -> str:
    """A tool's schema, as templates write it."""
    return (
        f'{{"type": "function", "function": {{"name": "{name}", "description": "does {name}", "parameters": '
        f'{{"type": "object", "properties": {{"{argument}": {{"type": "string"}}}}}}}}}}'
    )


def tool_call(name: str, argument: str, value: str) -> str:
    """A call, as `chatml` writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"{argument}": "{value}"}}}}\n</tool_call>'
