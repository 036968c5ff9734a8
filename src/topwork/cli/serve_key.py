"""`topwork serve-key`."""

import json
from typing import Annotated

import typer

from topwork.cli.options import AsJson

EPILOG = "Example: topwork serve-key support-team"


def serve_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who is to have it.")],
    as_json: AsJson = False,
) -> None:
    """Make a key for `topwork serve`: it is shown once, and its hash goes into serve.yaml."""
    import re

    from topwork.common.errors import RequestError
    from topwork.serving.config import NAME
    from topwork.serving.keys import new_key

    if not re.fullmatch(NAME, name):
        raise RequestError(f"{name!r} cannot be a tenant's name; letters, digits, `.`, `_` and `-` can, up to 64")
    key, digest = new_key()
    if as_json:
        print(json.dumps({"name": name, "key": key, "key_sha256": digest}))
        return
    print(f"the key, which is not shown again:\n  {key}\n\nfor serve.yaml:\n  tenants:\n    - name: {name}")
    print(f"      key_sha256: {digest}")
