"""Queue names that RabbitMQ, and the client library, take."""

from __future__ import annotations

import re
from typing import Final

from streamtools.errors import ConfigurationError

#: What the client library (pamqp) lets through in a declaration; the broker itself takes any UTF-8.
_NAME: Final = re.compile(r"[a-zA-Z0-9-_.:@#,/+ ]+")


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
