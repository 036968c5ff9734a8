"""Which of the training examples that other tools ship does `topwork import` make a recipe of, and which keys of theirs
does it not know?

    pip download --no-deps --no-binary :all: axolotl llamafactory mlx-lm trl unsloth -d FOLDER, pip download --no-deps
    torchtune unsloth -d FOLDER; then unpack each into FOLDER (tar xzf, unzip -d FOLDER/whl-NAME)
    python benchmarks/imported_examples.py FOLDER

Nothing is downloaded or trained here. A recipe counts where `topwork train` would read it; else the example says what
is missing, or what it is for that is not done here. Code in a README (```python) counts as an example of its own.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record
from topwork.common.errors import RequestError
from topwork.run.import_ import Imported, import_recipe
from topwork.run.importing.records import FATES, unnumbered

OUT = BENCHMARKS / "results" / "imported_examples"
EXAMPLES = {
    "axolotl": ("axolotl-*/examples/**/*.y*ml",),
    "llamafactory": ("llamafactory-*/examples/**/*.yaml",),
    "trl": ("trl-*/trl/scripts/*.py", "trl-*/README.md", "github/trl/*.yaml"),
    "unsloth": (
        "unsloth-*/README.md",
        "unsloth-*/unsloth-cli.py",
        "*unsloth*/studio/backend/assets/configs/**/*.yaml",
        "github/unsloth/*.py",
        "github/unsloth/*.ipynb",
    ),
    "torchtune": ("*torchtune*/recipes/configs/**/*.yaml",),
    "mlx-lm": ("mlx_lm-*/mlx_lm/LORA.md", "github/mlx-lm/*.yaml"),
}
"""Of each tool, what its packages (and a folder of files from its repository, `FOLDER/github/NAME`) ship."""
_BLOCK = re.compile(r"^\s*```(?:python|py)\n(.*?)^\s*```", re.MULTILINE | re.DOTALL)
RECIPE, MISSING, OTHER, NO_CONFIG, FAILED = (
    "a recipe",
    "says what is missing",
    "is for something else",
    "no config",
    "fails",
)
OUTCOMES = (RECIPE, MISSING, OTHER, NO_CONFIG, FAILED)


def examples(folder: Path, patterns: tuple[str, ...], aside: Path) -> Iterator[tuple[str, Path]]:
    """Each example's name and file."""
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            name = str(file.relative_to(folder))
            blocks = _BLOCK.findall(file.read_text("utf-8", "replace")) if file.suffix == ".md" else []
            for number, block in enumerate(blocks, 1):
                if re.search(r"SFTTrainer|FastLanguageModel|SFTConfig", block):
                    script = aside / f"{file.parent.name}-{number}.py"
                    script.write_text(block, encoding="utf-8")
                    yield f"{name} (Python, {number})", script
            yield name, file


def tried(name: str, file: Path) -> dict[str, Any]:
    """What becomes of one example."""
    try:
        imported = import_recipe(file)
    except RequestError as error:
        return {"example": name, "outcome": NO_CONFIG, "why": str(error).replace(str(file), file.name)}
    except Exception as error:
        return {"example": name, "outcome": FAILED, "why": repr(error)}
    outcome = RECIPE if imported.whole else OTHER if imported.refused else MISSING
    return {
        "example": name,
        "outcome": outcome,
        "tool": imported.tool,
        "method": _method(imported),
        "keys": {fate: len(imported.of(fate)) for fate in FATES},
        "why": [*imported.refused, *imported.missing],
        "unknown": [told.given.key for told in imported.of("unknown")],
        "no equal": sorted({unnumbered(told.given.key) for told in imported.of("no equal")}),
    }


def _method(imported: Imported) -> str:
    """`lora`, `lora in 4 bits`, `full` …"""
    method = imported.values.get("adapter", {}).get("method", "none")
    bits = next((n for n in (4, 8) if imported.values.get("quantization", {}).get(f"load_in_{n}bit")), None)
    return f"{method} in {bits} bits" if bits else str(method)


def as_text(record: dict[str, Any]) -> str:
    """The record as a page."""
    counts = {tool: Counter(row["outcome"] for row in rows) for tool, rows in record["tools"].items()}
    head = table(
        ["tool", *OUTCOMES], [[tool, *(str(found[each]) for each in OUTCOMES)] for tool, found in counts.items()]
    )
    lines = ["# Other tools' examples as recipes", "", record["question"], "", head]
    for tool, rows in record["tools"].items():
        lines += ["", f"## {tool}", ""]
        methods = Counter(row["method"] for row in rows if row["outcome"] == RECIPE)
        lines.append(
            "Recipes: " + (", ".join(f"{count} {name}" for name, count in methods.most_common()) or "none") + "."
        )
        fates = Counter()
        for row in rows:
            fates.update(row.get("keys", {}))
        lines.append("Keys, over all: " + ", ".join(f"{fates[fate]:,} {fate}" for fate in FATES) + ".")
        unknown = Counter(key for row in rows for key in row.get("unknown", ()))
        lines.append("Not known: " + (", ".join(f"`{key}` ({n})" for key, n in unknown.most_common()) or "none") + ".")
        lacking = Counter(key for row in rows for key in row.get("no equal", ()))
        told = ", ".join(f"`{key}` ({n})" for key, n in lacking.most_common())
        lines.append(f"No equal, in so many examples: {told or 'none'}.")
        lines += ["", *_groups(rows, (MISSING, OTHER, NO_CONFIG, FAILED))]
    return "\n".join([*lines, "", surroundings_text(record["surroundings"])]) + "\n"


def _groups(rows: list[dict[str, Any]], outcomes: tuple[str, ...]) -> Iterator[str]:
    """Those of which no recipe is made, by the reason."""
    for outcome in outcomes:
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row["outcome"] == outcome:
                reasons.setdefault(_reason(row), []).append(row["example"].rpartition("/")[2])
        for reason, names in reasons.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            yield f"- {outcome}: {reason} ({shown})"


def _reason(row: dict[str, Any]) -> str:
    why = row["why"] if isinstance(row["why"], str) else "; ".join(row["why"])
    plain = re.sub(r"(line|cell) \d+(, line \d+)?: ", "", why).replace(row["example"].rpartition("/")[2], "it")
    return re.sub(r"(/[\w.-]+)+/(?=data/)", "", plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="packages of the tools, unpacked")
    folder = parser.parse_args().folder
    around = surroundings()
    with tempfile.TemporaryDirectory() as aside:
        tools = {
            tool: [tried(*each) for each in examples(folder, patterns, Path(aside))]
            for tool, patterns in EXAMPLES.items()
        }
    assert __doc__ is not None
    record = {"question": " ".join(__doc__.split("\n\n")[0].split()), "surroundings": around, "tools": tools}
    for rows in tools.values():
        for row in rows:
            why = [row["why"]] if isinstance(row["why"], str) else row["why"]
            row["why"] = [each.replace(str(folder.resolve()), "FOLDER").replace(str(folder), "FOLDER") for each in why]
    write_record(OUT, record, as_text(record))
    print(as_text(record))


if __name__ == "__main__":
    main()
