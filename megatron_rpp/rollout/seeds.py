"""Seeds that belong to a request, not to an engine, so that work stealing changes nothing in the result."""

from __future__ import annotations

import hashlib

SEED_BITS = 63  # SGLang takes a signed 64-bit sampling_seed


def request_seed(run_seed: int, step: int, prompt_uid: str, sample: int) -> int:
    """H(run seed, step, prompt uid, sample): the first 63 bits of blake2b over the four, separated.

    Equal on every machine and Python version; any change of one part gives another seed. In [0, 2**63).
    """
    text = "\x1f".join((str(run_seed), str(step), prompt_uid, str(sample)))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"rpp-rollout").digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)
