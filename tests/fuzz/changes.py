"""Changes of bytes at random that fit every protocol."""

from __future__ import annotations

import random
from collections.abc import Sequence

#: How many kinds of change there are.
KINDS = 5


def changed(kind: int, chance: random.Random, data: bytes, at: int, seeds: Sequence[bytes]) -> bytes:
    """The data with one change of this kind, 0 to KINDS - 1, at this place."""
    end = min(len(data), at + chance.choice([1, 2, 8, 64]))
    match kind:
        case 0:
            return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + chance.choice(seeds)[chance.randrange(64) :]
        case _:
            return data[:end] + data[at:end] * chance.choice([1, 3, 100, 10_000]) + data[end:]
