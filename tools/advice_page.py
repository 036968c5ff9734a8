"""Write docs/advice.md: every rule of `topwork advise`, from the table that it decides by.

    python tools/advice_page.py

Free of torch. tests/docs/test_advice_page.py holds the page to the table.
"""

from pathlib import Path

from topwork.plan.advice.pages import ORDER, rules_page

PAGE = Path(__file__).parents[1] / "docs" / "advice.md"
HEAD = f"""# Advice, and where it is from

Written by `python tools/advice_page.py` (`make docs`) from the table in `plan/advice/`, by which `topwork advise`
decides.

```
topwork advise --task classification --examples 5000 --model llama-3-8b --memory 24GB
topwork advise --data tickets.jsonl --model smollm2-135m --out recipe.yaml
topwork advise recipe.yaml                    # what a recipe does otherwise, and why not
topwork advise --prompt                       # the rules, for any assistant
topwork advise --skill skills/fine-tuning     # the same as a skill for agents: SKILL.md and the rules beside it
```

It says first whether to prompt, to retrieve or to fine-tune, then each option of a recipe with its reason and source.
The task, the number of rows and their lengths come from the rows where there are some; what `--set` decides stays, and
the rest is advised around it. `--out` writes the recipe with the reasons above its lines, and it trains as it is.

How well a source is known stands behind it: a record of this repository was *measured here*; a page was *read*, or
*excerpts* of it; what was written *from memory* was not read again. An advised learning rate is within a factor of two
of the best that the recorded sweeps found ([banking77](../benchmarks/results/sweep_banking77_learning-rate.md),
[GSM8K](../benchmarks/results/sweep_gsm8k_learning-rate.md),
[E2E NLG](../benchmarks/results/sweep_e2e_nlg_learning-rate.md)), all of one base and of less than a hundred steps: over
yours, `topwork sweep --preset learning-rate` knows better.

{ORDER}
"""


def page() -> str:
    """docs/advice.md."""
    return f"{HEAD}\n{rules_page()}".rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
