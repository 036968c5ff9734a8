"""Keys, and what of them stands in a file."""

import hashlib
from secrets import token_urlsafe

BEGINS = "tw-"


def new_key() -> tuple[str, str]:
    """A new key, 32 random bytes of it, and its SHA-256 for the file."""
    key = BEGINS + token_urlsafe(32)
    return key, digest(key).hex()


def digest(key: str) -> bytes:
    """A key's SHA-256; of letters that no key has, any."""
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()
