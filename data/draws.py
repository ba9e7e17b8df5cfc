"""Random choices that belong to a sample's global position: the same on every rank, in every loader process, after a resume."""

import hashlib


def uniform(seed: int, position: int, what: str) -> float:
    """A uniform draw from [0, 1). what: names the choice, so that different choices are independent."""
    raw = hashlib.blake2b(f"{seed}/{position}/{what}".encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "little") >> 11) / 2**53
