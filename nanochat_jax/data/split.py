"""What is for testing: decided by a hash, so that where something stands, and what else there is, do not matter."""

import hashlib

HELD_OUT = 10  # of what is made here one in so many is for testing


def held_out(text: str, one_in: int) -> bool:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") % one_in == 0
