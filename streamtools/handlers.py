"""The older name of `streamtools.compat.handlers`."""

from streamtools.compat.handlers import HandleMsgs, HandlerFactory

__all__ = ["HandleMsgs", "HandlerFactory"]
