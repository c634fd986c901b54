"""Rules for topic names, and the names of the topics that are made beside a queue's own."""

from __future__ import annotations

import re
from typing import Final

from streamtools.errors import ConfigurationError
from streamtools.validation.checks import check_not_ours

#: Kafka: org.apache.kafka.common.internals.Topic, LEGAL_CHARS and MAX_NAME_LENGTH.
_LEGAL: Final = re.compile(r"[a-zA-Z0-9._-]+")
LONGEST: Final = 249
#: Part of the name of a retry topic.
RETRY: Final = ".retry"
#: The topic that keeps the bindings of queues.
BINDINGS: Final = "streamtools.bindings"


def check_kafka_name(name: str, what: str = "queue") -> None:
    """Check a topic's name; it is never changed.

    Raises:
        ConfigurationError: Kafka does not allow the name.
    """
    if name in (".", ".."):
        raise ConfigurationError(f"The {what} name {name!r} is not allowed on Kafka.")
    if len(name) > LONGEST:
        raise ConfigurationError(f"The {what} name {name[:40]!r}... is over {LONGEST} characters, Kafka's limit.")
    if not _LEGAL.fullmatch(name):
        wrong = "".join(sorted({c for c in name if not _LEGAL.fullmatch(c)}))
        raise ConfigurationError(
            f"The {what} name {name!r} has {wrong!r}: on Kafka a name has letters a-z and A-Z, digits, and . _ - only"
        )


def check_kafka_reply(address: str) -> None:
    """Check the address of a reply, which another program has chosen.

    Raises:
        ConfigurationError: Kafka does not allow the name, or the topic takes no replies.
    """
    check_kafka_name(address)
    check_not_ours(address)
    if address.startswith("__") or is_retry_topic(address):
        raise ConfigurationError(f"The topic {address!r} takes no replies: it is for {_keeper(address)} alone.")


def _keeper(topic: str) -> str:
    return "Kafka" if topic.startswith("__") else "the retries of a group"


def retry_topic(queue: str, group: str) -> str:
    """The retry topic of a group: `orders.retry` for the group named as its queue, else `orders.retry.billing`.

    Raises:
        ConfigurationError: the group's name cannot be part of a topic's.
    """
    if group == queue:
        name = queue + RETRY
    else:
        check_kafka_name(group, "group")
        # Else retries of the queue "a.retry.b" and those of the queue "a" in the group "b.retry" would meet.
        if "retry" in group.split("."):
            raise ConfigurationError(
                f"The group name {group!r} has a part named retry, which is reserved; choose another."
            )
        name = f"{queue}{RETRY}.{group}"
    check_kafka_name(name, "retry topic's")
    return name


def is_retry_topic(name: str) -> bool:
    """It is the retry topic of some group."""
    return RETRY[1:] in name.split(".")[1:]


def reader_of(topic: str) -> str:
    """The group that a topic is for: the one named as the topic; for a retry topic, the one that it names."""
    queue, _, group = topic.rpartition(f"{RETRY}.")
    if queue:
        return group
    return topic.removesuffix(RETRY) or topic
