"""ConnectionMonitor: whether a client reaches Kafka, logged once; and filters for the library's own log lines.

The library tries again for as long as the brokers are away, and logs each try of each of its parts as an error. While
a topic that it reads is gone, it asks for it without a pause, 2,000 times a second (seen in 0.14).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from aiokafka.errors import LeaderNotAvailableError, NotLeaderForPartitionError

from streamtools.drivers.kafka.client.guard import harden
from streamtools.drivers.kafka.client.guard import log as connections_log
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds in which a repeated line of the library is logged once.
REPEAT_INTERVAL: Final = 60.0
#: Lines that are remembered at most.
LINES: Final = 1000
#: Seconds between two requests for the topics and their leaders.
METADATA_INTERVAL: Final = 0.05


class ConnectionMonitor:
    """Watches the connections of one client, hardens them, and has it pause between requests for metadata.

    Parameters:
        client: the library's, with the brokers' addresses.
        who: whose client it is, for the log.
    """

    def __init__(self, client: Any, who: str, settings: KafkaSettings) -> None:
        self._client = client
        self._who = who
        self._place = settings.safe_url
        self._lost = False
        harden(client)
        self._connect = client._get_conn
        client._get_conn = self._get_conn
        self._next_update = 0.0
        self._update = client._metadata_update
        client._metadata_update = self._metadata_update

    @property
    def up(self) -> bool:
        """A broker is connected, as far as is known."""
        return any(connection.connected() for connection in self._client._conns.values())

    async def _get_conn(self, *args: Any, **kwargs: Any) -> Any:
        found = await self._connect(*args, **kwargs)
        if found is not None and self._lost:
            self._lost = False
            log.info("%s: %s is reached again.", self._who, self._place)
        elif found is None and not self._lost and not self.up:
            self._lost = True
            log.warning("%s: %s cannot be reached any more. Trying again until it is.", self._who, self._place)
        return found

    async def _metadata_update(self, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(self._next_update - time.monotonic())
        try:
            return await self._update(*args, **kwargs)
        finally:
            self._next_update = time.monotonic() + METADATA_INTERVAL


class Repeated(logging.Filter):
    """Passes the same line once in REPEAT_INTERVAL seconds; and then says how often it was left out."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is logged."""
        text, now = record.getMessage(), time.monotonic()
        line = (record.name, text)
        since, left_out = self._seen.get(line, (0.0, 0))
        if line in self._seen and now - since < REPEAT_INTERVAL:
            self._seen[line] = (since, left_out + 1)
            return False
        if len(self._seen) >= LINES:
            self._seen.clear()
        self._seen[line] = (now, 0)
        if left_out:
            record.msg, record.args = f"{text} ({left_out} times more in the last {now - since:.0f} s)", None
        return True


_REPEATED: Final = Repeated()


class WithoutNewLeaders(logging.Filter):
    """Leaves out that a partition has no leader yet: each new topic has none, and the library asks again."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is logged."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(each, NotLeaderForPartitionError | LeaderNotAvailableError) for each in arguments)


_WITHOUT_NEW_LEADERS: Final = WithoutNewLeaders()


class WithoutCredentials(logging.Filter):
    """Removes credentials from log lines: SASL's PLAIN is the password itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true; requests and answers of SASL are replaced by their names."""
        if isinstance(record.args, tuple):
            record.args = tuple(_without_credentials(argument) for argument in record.args)
        return True


def _without_credentials(argument: object) -> object:
    name = type(argument).__name__
    return f"{name}(not shown)" if "sasl" in name.lower() else argument


#: At the logger of all requests, whatever its level is or will be.
logging.getLogger("aiokafka.conn").addFilter(WithoutCredentials())


def quieten() -> None:
    """Have the library's loggers leave out repeated lines, unless at DEBUG; safe to repeat."""
    connections_log.addFilter(_REPEATED)
    for name in [n for n in logging.Logger.manager.loggerDict if n.split(".")[0] == "aiokafka"]:
        logger = logging.getLogger(name)
        if not logger.isEnabledFor(logging.DEBUG):
            logger.addFilter(_WITHOUT_NEW_LEADERS)
            logger.addFilter(_REPEATED)
