"""Write docs/families.md: what each family measures against transformers' own forward, or why it is refused.

    python tools/family_table.py

The measure is the one that tests/models/test_families.py asserts.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from reference.families import PICTURES, batch_differences, tiny_model  # noqa: E402
from topwork.common.errors import ModelError  # noqa: E402
from topwork.models.fast import FastLayer  # noqa: E402
from topwork.models.load import as_base  # noqa: E402
from topwork.models.proven import PROVEN  # noqa: E402

FURTHER = (
    "cohere", "cohere2", "deepseek_v3", "exaone4", "glm4", "gpt_neox", "olmo3", "stablelm",
    "bloom", "falcon", "lfm2", "mamba", "qwen3_next",
)  # fmt: skip
"""Families outside the table in models/proven.py, which are probed as they are loaded."""

HEAD = """# Model families

Written by `python tools/family_table.py`; `tests/models/test_families.py` asserts the same measures.

Each family is a random model of two layers in fp32 (grouped heads, sliding window of 5, soft-capping and sinks where
the family has them). Sequences of 13, 1, 7 and 24 tokens run as one flat batch, and each alone through transformers'
own forward pass. The figures are relative differences, |ours - theirs| / |theirs|, of the logits, of the gradients of
all the base's weights, and of the gradients of a LoRA adapter on every linear layer. At most 1e-5 is allowed. The last
column says what runs through the fast path (`models/fast.py`); the rest runs on transformers' own modules, as correct
and slower.
"""
COLUMNS = "| family | logits | base's gradients | adapter's gradients | fast |\n| --- | --- | --- | --- | --- |"


def main() -> None:
    measured = [_measured(family) for family in sorted(PROVEN)]
    others = {family: _probed(family) for family in FURTHER}
    parts = [
        HEAD,
        "## Proven\n\nTested with every change.\n",
        "\n".join([COLUMNS, *measured]),
        "\n## Text parts of models that read pictures\n",
        "The whole model is loaded; what reads pictures is never run.\n",
        "\n".join([COLUMNS, *map(_measured, sorted(PICTURES))]),
        "\n## Probed and accepted\n\nNot in the table of proven families: probed as they are loaded, then trained.\n",
        "\n".join([COLUMNS, *(row for row in others.values() if row.startswith("|"))]),
        "\n## Refused\n\nWhat Topwork says to a user who asks for them.\n",
        "\n".join(row for row in others.values() if row.startswith("-")),
    ]
    (ROOT / "docs" / "families.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def _measured(family: str) -> str:
    figures = " | ".join(f"{value:.1e}" for value in batch_differences(family).values())
    return f"| {family} | {figures} | {_fast(family)} |"


def _fast(family: str) -> str:
    model = as_base(tiny_model(family), None, family, lambda _: None).module  # type: ignore[arg-type]
    layers = [layer for layer in model.modules() if isinstance(layer, FastLayer)]
    parts = {"attention": all(layer.attention_part for layer in layers), "MLP": all(layer.mlp_part for layer in layers)}
    return " and ".join(part for part, is_fast in parts.items() if is_fast and layers) or "–"


def _probed(family: str) -> str:
    try:
        return _measured(family)
    except ModelError as error:
        return f"- **{family}**: {str(error).removeprefix(family + ': ')}"


if __name__ == "__main__":
    main()
