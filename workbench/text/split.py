"""Which documents train and which validate: decided by each text alone, never by a run's seed."""

from __future__ import annotations

import hashlib

VALIDATION_SHARE = 0.05


def text_digest(text: str) -> bytes:
    """The sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).digest()


def split(digests: list[bytes]) -> tuple[list[int], list[int]]:
    """Positions of the training and of the validation documents, each ordered by digest, which is as good as shuffled.

    A document validates if its digest, read as a fraction, is below 5 %; so it stays on its side when others are added,
    and copies of one text are never on both sides. Where that leaves a side empty, it gets the one text nearest to it.

    Raises:
        ValueError: there is only one distinct text.
    """
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        copies = f"{len(digests)} copies of one document" if len(digests) > 1 else "a single document"
        raise ValueError(f"holds {copies}; at least two different ones are needed to train and to validate")
    below = sum(int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64 for digest in distinct)
    first_of_training = distinct[min(max(below, 1), len(distinct) - 1)]
    order = sorted(range(len(digests)), key=lambda i: (digests[i], i))
    train = [i for i in order if digests[i] >= first_of_training]
    return train, [i for i in order if digests[i] < first_of_training]
