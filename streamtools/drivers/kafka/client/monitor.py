"""Whether a client of the library reaches Kafka, and telling it: once, and not fifty times a second.

The library tries again for as long as the brokers are away, and logs each try of each of its parts as an error.
While a topic that it reads is gone, it asks for it without a pause, 2,000 times a second (seen in 0.14).
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

#: Seconds in which a line of the library is logged once.
AGAIN: Final = 60.0
#: Lines that are remembered at most.
LINES: Final = 1000
#: Seconds between two questions for what topics there are.
LOOK: Final = 0.05


class ConnectionMonitor:
    """Watches the connections of one client of the library, and has it ask in peace.

    Parameters:
        client: the library's, with the brokers' addresses.
        who: whose it is, for the log.
    """

    def __init__(self, client: Any, who: str, settings: KafkaSettings) -> None:
        self._client = client
        self._who = who
        self._place = settings.safe_url
        self._lost = False
        harden(client)
        self._connect = client._get_conn
        client._get_conn = self._get_conn
        self._next_look = 0.0
        self._look = client._metadata_update
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
        await asyncio.sleep(self._next_look - time.monotonic())
        try:
            return await self._look(*args, **kwargs)
        finally:
            self._next_look = time.monotonic() + LOOK


class Repeated(logging.Filter):
    """Lets the same line through once in AGAIN seconds; it then says how often it was left out."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is to be logged."""
        text, now = record.getMessage(), time.monotonic()
        line = (record.name, text)
        since, left_out = self._seen.get(line, (0.0, 0))
        if line in self._seen and now - since < AGAIN:
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
    """Leaves out that a partition has no leader yet: so it is with each new topic, and the library asks again."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is to be logged."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        return not any(isinstance(each, NotLeaderForPartitionError | LeaderNotAvailableError) for each in arguments)


_WITHOUT_NEW_LEADERS: Final = WithoutNewLeaders()


class WithoutCredentials(logging.Filter):
    """Lets no line show what is said to log in: SASL's PLAIN is the password itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true; requests and answers of SASL are replaced by their names."""
        if isinstance(record.args, tuple):
            record.args = tuple(_without_credentials(argument) for argument in record.args)
        return True


def _without_credentials(argument: object) -> object:
    name = type(argument).__name__
    return f"{name}(not shown)" if "sasl" in name.lower() else argument


#: At the logger that tells each request: at any level, however it is set up later.
logging.getLogger("aiokafka.conn").addFilter(WithoutCredentials())


def quieten() -> None:
    """Have the library's loggers leave out repetitions; safe to repeat. DEBUG shows them all."""
    connections_log.addFilter(_REPEATED)
    for name in [n for n in logging.Logger.manager.loggerDict if n.split(".")[0] == "aiokafka"]:
        logger = logging.getLogger(name)
        if not logger.isEnabledFor(logging.DEBUG):
            logger.addFilter(_WITHOUT_NEW_LEADERS)
            logger.addFilter(_REPEATED)
