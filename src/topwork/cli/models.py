"""`topwork models`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
from typing import Annotated

import typer

from topwork.cli.options import AsJson

EPILOG = "Example: topwork models\n\ntopwork models qwen2.5-7b; what an adapter of it trains: topwork count qwen2.5-7b"


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One base: a name of the list, a Hub id or a folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the bases that are known by name: sizes, memory, and which are on this machine."""
    from topwork.run.models import model_details, models_text
    from topwork.run.models import models as known

    if name is not None:
        details = model_details(name)
        print(json.dumps(details.as_json()) if as_json else details.as_text())
        return
    rows = known()
    print(json.dumps([row.as_json() for row in rows]) if as_json else models_text(rows))
