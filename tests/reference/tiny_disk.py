"""A disk that is really full: a program run on a file system of one mebibyte."""

import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1"'


def printed_on_a_tiny_disk(program: str, place: Path) -> list[str]:
    """The words that a Python program prints; its first argument is `place`, where the small disk is mounted."""
    try:
        possible = subprocess.run(["unshare", "-rm", "sh", "-c", MOUNT, "sh", place], capture_output=True)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if possible.returncode:
        pytest.skip("a small tmpfs cannot be mounted here without privileges")
    command = ["unshare", "-rm", "sh", "-c", f'{MOUNT} && exec "$2" -c "$3" "$1"', "sh", place, sys.executable]
    done = subprocess.run([*command, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
