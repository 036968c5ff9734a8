"""Seeds from what they are for."""

import hashlib


def hashed(*what: object, bits: int = 32) -> int:
    """A number of so many bits, the same for the same `what` everywhere."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest, "big") >> (8 * len(digest) - bits)
