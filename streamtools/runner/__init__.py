"""ConsumerRunner: runs every handler in one event loop, until a signal or a failure ends it."""

from streamtools.runner.runner import ConsumerRunner

__all__ = ["ConsumerRunner"]
