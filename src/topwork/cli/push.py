"""`topwork push` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, starting

EPILOG = (
    "Example: topwork push runs/support ada/support-tickets --private\n\n"
    "topwork push runs/support ada/support-tickets --dry-run to-be-pushed"
)


def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or what merge, combine, export or PEFT wrote.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made where there is none.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    base_name: Annotated[
        str | None, typer.Option(help="The base's id on the Hub, where it was trained on a local folder.")
    ] = None,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write what would be uploaded into this folder; upload nothing.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="So many answers to held-out rows are shown.")] = 3,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is of another base, or of another kind.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter or a model with a model card to the Hugging Face Hub, in one commit."""
    from topwork.reporting.wording import size

    log = starting(as_json)
    from topwork.run.push import push as send

    done = send(run, repo, private, revision, message, base_name, dry_run, samples, force, log)
    log.quiet()
    if as_json:
        print(json.dumps(done))
        return
    for name, size_bytes in done["files"].items():
        print(f"  {name:40} {size(size_bytes):>12}")
    for name in done["removed"]:
        print(f"  {name:40} {'removed':>12}")
    print(
        f"pushed: {done['commit']}" if done["commit"] else f"nothing was uploaded; all of it lies in {done['folder']}"
    )
