"""Queue names that RabbitMQ and the client library accept."""

from __future__ import annotations

import re
from typing import Final

from streamtools.errors import ConfigurationError
from streamtools.validation.checks import check_name, check_not_ours

#: What the client library (pamqp) lets through in a declaration; the broker itself takes any UTF-8.
_NAME: Final = re.compile(r"[a-zA-Z0-9-_.:@#,/+ ]+")


#: How the broker's own names for reply queues begin; no other name with `amq.` is a reply queue.
_REPLY_QUEUES: Final = ("amq.gen-", "amq.rabbitmq.reply-to")


def check_rabbitmq_reply(address: str) -> None:
    """Check an address for a reply, which another program has chosen: a queue of any name that AMQP carries.

    Raises:
        ConfigurationError: it is no queue's name, or a queue that takes no replies.
    """
    check_name(address)
    check_not_ours(address)
    if address.startswith("amq.") and not address.startswith(_REPLY_QUEUES):
        raise ConfigurationError(f"The queue {address!r} takes no replies: RabbitMQ keeps 'amq.' to itself.")


def check_rabbitmq_name(name: str) -> None:
    """Check a queue's name; never rewrite it.

    Raises:
        ConfigurationError: it begins with `amq.`, or has a character that the client library refuses.
    """
    if name.startswith("amq."):
        raise ConfigurationError(f"The queue name {name!r} begins with 'amq.', which RabbitMQ keeps to itself.")
    if not _NAME.fullmatch(name):
        wrong = "".join(sorted({c for c in name if not _NAME.fullmatch(c)}))
        raise ConfigurationError(
            f"The queue name {name!r} has {wrong!r}: on RabbitMQ a name is of letters a-z and A-Z, digits, spaces, "
            "and - _ . : @ # , / +"
        )
