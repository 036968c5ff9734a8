"""Write docs/peft-tables.md: PEFT's own test tables on our tiny models, and what Topwork makes of every row's folder.

    python tools/peft_tables.py            all rows, about a minute; the page is written
    python tools/peft_tables.py LoRA …     the rows whose names have these words, told one by one

Each row is an adapter that PEFT makes, with weights that are no longer its first, and writes; Topwork reads the folder,
and the logits of both are compared. tests/adapters/test_peft_tables.py holds the page to what is found.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reference.peft_rows import DECODERS, rows  # noqa: E402
from reference.peft_tables import ALLOWED, Outcome, outcomes  # noqa: E402

PAGE = ROOT / "docs" / "peft-tables.md"
HEAD = f"""# PEFT's own tables

Written by `python tools/peft_tables.py`; `tests/adapters/test_peft_tables.py` asserts the same.

PEFT tries its methods on tables of configs and models: on decoders (tests/test_decoder_models.py, and experts' weights
in tests/test_target_parameters.py) and on small networks of linear, embedding and other layers
(tests/test_custom_models.py, here the rows of LoRA, IA3 and the other methods that Topwork trains). The rows below are
those, moved to tiny random decoders in fp32: PEFT makes the adapter, its weights are shaken, PEFT writes the folder,
Topwork reads it, and the logits of two sequences are compared. **Equal** is within {ALLOWED:g} of them, relative.
**Refused** is an error that says what the folder has that cannot be read. **Wrong** would be logits that differ and
nothing said.
"""
MARKS = {"equal": "=", "refused": "refused", "wrong": "WRONG", "PEFT refuses": "not in PEFT", "no place": "no place"}


def main(words: Sequence[str]) -> int:
    chosen = [row for row in rows() if not words or any(word in row.name for word in words)]
    found = []
    for outcome in outcomes(chosen):
        found.append(outcome)
        if words or outcome.kind == "wrong":
            apart = "" if outcome.apart is None else f" {outcome.apart:.1e}"
            print(f"{outcome.row.name}: {outcome.kind}{apart} {outcome.told}", flush=True)
    print(_counts(found))
    if not words:
        PAGE.write_text(page(found), encoding="utf-8")
    return int(any(outcome.kind == "wrong" for outcome in found))


def page(found: Sequence[Outcome]) -> str:
    """The whole page."""
    return "\n".join([
        HEAD,
        _counts(found) + "\n",
        "## On decoders\n",
        _decoders(found) + "\n",
        "## On small networks\n",
        "Where PEFT's network has an MLP the row stands on opt's, whose layers have biases as well; its Conv1D and its "
        "embedding are gpt2's.\n",
        _others(found) + "\n",
        "## What is not equal\n",
        _reasons(found) + "\n",
    ])  # fmt: skip


FIRST = ("LoraConfig", "IA3Config")
"""Whose rows on small networks stand beside those on decoders."""


def _counts(found: Sequence[Outcome]) -> str:
    counts = {kind: sum(outcome.kind == kind for outcome in found) for kind in MARKS}
    first = [outcome for outcome in found if not outcome.row.custom or outcome.row.config in FIRST]
    return (
        f"{len(found)} rows: {counts['equal']} equal, {counts['refused']} refused by name, {counts['wrong']} wrong; "
        f"{counts['PEFT refuses']} that PEFT itself refuses, {counts['no place']} of layers that no decoder here has. "
        f"Of those on decoders and of LoRA and IA3, {len(first)}, {sum(o.kind == 'equal' for o in first)} are equal."
    )


def _decoders(found: Sequence[Outcome]) -> str:
    lines = [f"| | {' | '.join(DECODERS)} |", "| --- |" + " --- |" * len(DECODERS)]
    by_label: dict[str, dict[str, str]] = defaultdict(dict)
    for outcome in found:
        if outcome.row.family in DECODERS and not outcome.row.custom:
            by_label[outcome.row.label][outcome.row.family] = MARKS[outcome.kind]
    lines += [
        f"| {label} | {' | '.join(of.get(family, '') for family in DECODERS)} |" for label, of in by_label.items()
    ]
    return "\n".join(lines)


def _others(found: Sequence[Outcome]) -> str:
    by_config: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for outcome in found:
        if outcome.row.custom or outcome.row.family not in DECODERS:
            by_config[outcome.row.config.removesuffix("Config")][outcome.kind].append(outcome.row.label)
    lines = ["| | rows | equal | refused | not in PEFT | no place |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for config, of in by_config.items():
        counts = [
            sum(map(len, of.values())),
            *(len(of[kind]) for kind in ("equal", "refused", "PEFT refuses", "no place")),
        ]
        lines.append(f"| {config} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def _reasons(found: Sequence[Outcome]) -> str:
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in found:
        if outcome.kind != "equal":
            reasons[MARKS[outcome.kind], _short(outcome.told)].append(outcome.row.name)
    lines = ["| rows | | why |", "| --- | --- | --- |"]
    lines += [f"| {_listed(names)} | {mark} | {_cell(told)} |" for (mark, told), names in reasons.items()]
    return "\n".join(lines)


def _short(told: str) -> str:
    """Without what else can be read and without the values of an option, in whatever order PEFT has written them."""
    return re.sub(r"=[\[{].*(?=, which cannot be read)", "", told.partition(";")[0])


def _listed(names: Sequence[str]) -> str:
    by_label: dict[str, list[str]] = defaultdict(list)
    for name in names:
        label, _, family = name.rpartition(" on ")
        by_label[label].append(family)
    return "; ".join(f"{label} ({', '.join(of)})" if of != ["no decoder"] else label for label, of in by_label.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
