"""The older name of `streamtools.compat.pikabus`."""

from streamtools.compat.pikabus import DIRECT, TOPIC, PikaBus

__all__ = ["DIRECT", "TOPIC", "PikaBus"]
