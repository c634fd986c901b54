"""Checks queue names by the rules of RabbitMQ and of the client library."""

from __future__ import annotations

import re
from typing import Final

from streamtools.errors import ConfigurationError
from streamtools.validation.checks import check_name, check_not_ours

#: The names that the client library (pamqp) accepts in a declaration; the broker itself accepts any UTF-8.
_NAME: Final = re.compile(r"[a-zA-Z0-9-_.:@#,/+ ]+")


#: The broker's own names for reply queues begin with one of these; no other name with `amq.` is a reply queue.
_REPLY_QUEUES: Final = ("amq.gen-", "amq.rabbitmq.reply-to")


def check_rabbitmq_reply(address: str) -> None:
    """Check an address for a reply, which another program has chosen; it may be any queue name that AMQP can carry.

    Raises:
        ConfigurationError: the address is not a queue's name, or the queue is reserved.
    """
    check_name(address)
    check_not_ours(address)
    if address.startswith("amq.") and not address.startswith(_REPLY_QUEUES):
        raise ConfigurationError(f"The queue {address!r} takes no replies: RabbitMQ reserves names with 'amq.'.")


def check_rabbitmq_name(name: str) -> None:
    """Check a queue's name.

    Raises:
        ConfigurationError: the name begins with `amq.`, or has a character that the client library refuses.
    """
    if name.startswith("amq."):
        raise ConfigurationError(f"The queue name {name!r} begins with 'amq.', which RabbitMQ keeps to itself.")
    if not _NAME.fullmatch(name):
        wrong = "".join(sorted({c for c in name if not _NAME.fullmatch(c)}))
        raise ConfigurationError(
            f"The queue name {name!r} has {wrong!r}: on RabbitMQ a name has letters a-z and A-Z, digits, spaces, "
            "and - _ . : @ # , / +"
        )
