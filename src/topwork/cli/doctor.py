"""`topwork doctor`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
from typing import Annotated

import typer

from topwork.cli.options import AsJson, starting

EPILOG = "Example: topwork doctor --quick\n\ntopwork doctor > doctor.txt, for a bug report; topwork doctor --json"


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Compile and try nothing: tell of C kernels what was found out before.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Try C kernels once more that were refused on this processor.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a bug report needs of this machine, and what to mend: versions, processor, kernels, memory, GPU."""
    from topwork.common.errors import RequestError

    if quick and again:
        raise RequestError("--quick tries nothing, and --again tries once more; give one of them")
    log = starting(to_errors=True, doing="loading torch")
    from topwork.run.doctor import doctor as run

    found = run(quick, again, log.doing)
    log.quiet()
    print(json.dumps(found.as_json()) if as_json else found.as_text())
    raise typer.Exit(found.exit_code)
