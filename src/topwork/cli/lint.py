"""`topwork lint`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, Overrides, starting

EPILOG = (
    "Ends with 0 where there is no error, 1 where there is one (with --strict also for a warning), 2 where the recipe, "
    "a file or the model cannot be read.\n\n"
    "Example: topwork lint examples/support/recipe.yaml --rows 3\n\n"
    "topwork lint recipe.yaml --rows train.jsonl:17,train.jsonl:3 --html lint.html --strict"
)


def lint(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")],
    rows: Annotated[
        str, typer.Option(metavar="N|ROWS", help="How many rows are shown, or which: train.jsonl:17,train.jsonl:3.")
    ] = "5",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page of rows, lengths, findings.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A warning ends with 1 too.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model will see them and what is wrong with the data; needs no weights."""
    from topwork.recipe.recipe import load_recipe

    read = load_recipe(recipe, overrides or [])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here, and all texts are tokenized at once
    wanted = int(rows) if rows.strip().isdigit() else re.split(",(?! )", rows)
    log = starting(to_errors=True)
    from topwork.run.lint import lint as run

    result = run(read, rows=wanted, log=log)
    log.quiet()
    found = result.as_json()
    if html is not None:
        from topwork.common.files import write_text
        from topwork.reporting.lint_page import lint_page

        write_text(html, lint_page(found, recipe.name))
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
        if html is not None:
            print(f"page: {html}")
    code = result.exit_code(strict)
    if code:
        raise typer.Exit(code)


def _print(found: dict[str, object]) -> None:
    from rich.console import Console

    from topwork.reporting.lint_text import print_lint

    print_lint(found, Console())
