"""Rare: a producer's own topic was deleted while the producer uses it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from streamtools.drivers.kafka.brokers.topics import Topic
from streamtools.drivers.kafka.errors import Missing
from streamtools.drivers.kafka.producing.record import Records, singles
from streamtools.drivers.kafka.producing.sender import Sender

log: logging.Logger = logging.getLogger("streamtools")


async def make_and_send_again(sender: Sender, items: Sequence[Records], own: Topic, who: str) -> bool:
    """Make the topic again, as it was, and send what was refused; False if records were refused for another reason.

    Parameters:
        items: sent before; the refused ones have an error.
        own: the producer's topic.
        who: the producer, for the log.
    """
    refused = [item for item in singles(items) if item.error is not None]
    ours = all(item.topic == own.name and isinstance(item.error, Missing) for item in refused)
    if not (refused and ours):
        return False
    for item in refused:
        item.error = None
    topic = replace(own, partitions=own.partitions or sender.partitions(own.name))
    if await sender.make(topic):
        log.warning(
            "%s: the topic was deleted while it was in use, with all that it held. Made again, partitions=%s.",
            who,
            topic.partitions,
        )
    await sender.publish(refused)
    return True
