"""Seeds of the examples' own draws: the order of batches, and plans of the controls."""

import hashlib


def seed_of(*numbers: int | str) -> int:
    """Returns one seed for several numbers or names. It is a hash, because torch's CPU generator uses only the lower 32
    bits of a seed."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little")
