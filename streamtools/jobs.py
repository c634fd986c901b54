"""The public name of `streamtools.compat.jobs`."""

from streamtools.compat.jobs import (
    Callback,
    JobConnection,
    JobMessage,
    QueueName,
    connect,
    receive_message,
    receive_message_sync,
    send_message,
    send_message_sync,
)

__all__ = [
    "Callback",
    "JobConnection",
    "JobMessage",
    "QueueName",
    "connect",
    "receive_message",
    "receive_message_sync",
    "send_message",
    "send_message_sync",
]
