"""One arm's answers to banking77's test rows, graded; the same code whoever trained the adapter.

    python -m peers.answers RECIPE TEST_JSONL OUT_JSON [ADAPTER] [--max-rows N]      (in benchmarks/)

Without ADAPTER the bare base answers. An adapter that records a local folder as its base is loaded with a warning,
since that folder cannot be told from the recipe's base by name.
"""

import argparse
import json
import sys
from pathlib import Path

from common import peak_mib
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter
from topwork.data.examples import load_data
from topwork.evaluation.score import questions_of, score
from topwork.models.load import load_base
from topwork.recipe.recipe import load_recipe

ARM = "arm"


def told(line: str) -> None:
    print(line, file=sys.stderr)


def progress(done: int) -> None:
    if done % 256 == 0:
        told(f"{done} answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("test")
    parser.add_argument("out", type=Path)
    parser.add_argument("adapter", type=Path, nargs="?")
    parser.add_argument("--max-rows", type=int)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    base = load_base(recipe.model, told)
    if given.adapter is not None:
        warning = load_adapter(
            Adapters(base.module), ARM, read_adapter(given.adapter), BaseId(base.name, base.fingerprint)
        )
        told(warning or f"{given.adapter} loaded")
    rows = recipe.data.model_copy(update={"train": given.test, "max_rows": given.max_rows})
    data = load_data(rows, base.tokenizer, base.context_length, recipe.training.seed, told)
    questions = questions_of(data.train_conversations, data.template)
    scored = score(
        base, ARM if given.adapter else None, questions, data.train, data.template, "exact_match",
        recipe.evaluation.max_new_tokens, recipe.evaluation.batch_size, progress,
    )  # fmt: skip
    answers = [
        {"reference": question.reference, "answer": answer, "right": grade.exact}
        for question, answer, grade in zip(questions, scored.answers, scored.grades, strict=True)
    ]
    result = {"rows": len(questions), **scored.summary, "peak_mib": peak_mib(), "answers": answers}
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("rows", "exact_match", "loss", "seconds")}))


if __name__ == "__main__":
    main()
