"""Regular expressions out of a stranger's adapter_config.json.

One of a few characters can take Python's `re` longer than the world will last, and nothing stops it once it runs, nor
does any other thread run meanwhile. So those that are more than names are tried on the base's paths in a process of
their own first, which is ended when it takes too long.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from topwork.adapters.config import AdapterConfig
from topwork.common.errors import AdapterError, quoted

SECONDS = 3.0
"""How long all patterns of one adapter may take over all modules of a base, with the process's start."""
MOST = 10_000
"""Names and patterns in one config."""
_NAME = re.compile(r"[\w.\-]*")
_TRIED = r"""
import json, re, sys
patterns, paths = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    try:
        whole, ending, place = map(re.compile, (pattern, rf"(.*\.)?({pattern})$", rf"(?:.*?\.)?{pattern}\.(\d+)\."))
    except (re.error, RecursionError, OverflowError):
        print(number)
        sys.exit(1)
    for path in paths:
        whole.fullmatch(path), ending.match(path), place.match(path)
"""
"""A pattern in the three ways in which it may be looked for (`targets.py`, `methods/lora/method.py`)."""


def check_patterns(config: AdapterConfig, paths: Sequence[str], seconds: float = SECONDS) -> None:
    """AdapterError where a pattern in `config` is none, or is not done with the base's module `paths` in time."""
    names, patterns = _named(config)
    if len(names) + len(patterns) > MOST:
        raise AdapterError(f"its config names modules {len(names) + len(patterns):,} times; at most {MOST:,} are read")
    patterns = [pattern for pattern in patterns if not _NAME.fullmatch(pattern)]
    if not patterns:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIED], input=json.dumps([patterns, list(paths)]), text=True,
            capture_output=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AdapterError(
            f"its config has {len(patterns)} regular expressions (first {quoted(patterns[0])}), which take too long to "
            "match; name its modules in a list"
        ) from None
    if done.returncode:
        number = int(done.stdout) if done.stdout.strip().isdigit() else 0
        raise AdapterError(f"{quoted(patterns[number])} in its config is no regular expression; name modules in a list")


def _named(config: AdapterConfig) -> tuple[list[str], list[str]]:
    """The names and the regular expressions of modules in an adapter's options."""
    names: list[str] = []
    patterns: list[str] = []
    for field in (
        "target_modules", "target_parameters", "exclude_modules", "feedforward_modules", "modules_to_save",
    ):  # fmt: skip
        value = getattr(config, field, None)
        (patterns if isinstance(value, str) else names).extend([value] if isinstance(value, str) else value or ())
    layers = getattr(config, "layers_pattern", None)
    patterns.extend([layers] if isinstance(layers, str) else layers or ())
    for field in ("rank_pattern", "alpha_pattern"):
        patterns.extend(getattr(config, field, None) or ())
    return names, patterns
