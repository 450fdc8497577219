"""Seeds of what the examples draw by themselves: the order of batches, and plans of the controls."""

import hashlib


def seed_of(*numbers: int | str) -> int:
    """One seed of several numbers or names. Hashed: of its seed torch's CPU generator uses the lower 32 bits only."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little")
