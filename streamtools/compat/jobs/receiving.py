"""Receiving: a list of what is there, or a callback for each message."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from streamtools import codec
from streamtools.compat.jobs.message import JobMessage
from streamtools.consumer import BoundHandler, Consumer
from streamtools.delivery import Delivery
from streamtools.engine.dispatch import Dispatcher, chain
from streamtools.engine.functions.calling import check_function
from streamtools.engine.functions.invoke import RESOLVERS, compile_handler
from streamtools.engine.tasks.cancellation import finish, stray_cancellation_as_lost
from streamtools.engine.tasks.threads import Threads
from streamtools.errors import ConnectError, DecodeError
from streamtools.message import Message
from streamtools.types import Handler

log: logging.Logger = logging.getLogger("streamtools")

#: Messages that one call without a callback returns at most.
LIMIT: Final = 1000
#: Seconds after the first message in which such a call takes further ones, which may never cease to come.
GATHER_TIMEOUT: Final = 2.0

#: What is called with each message: `def`, in a thread, or `async def`.
Callback = Callable[[JobMessage], Any]


async def receive_list(consumer: Consumer, wait: float | None) -> list[JobMessage]:
    """What is there, acknowledged; none after `wait` seconds."""
    await consumer.open()
    try:
        deliveries = await _all_there(consumer, wait)
        with suppress(ConnectError):  # which the acknowledgement meets as well
            # Else the broker delivers the next ones when these are acknowledged, only to have them back, and
            # RabbitMQ puts those that are under way at the queue's end.
            await stray_cancellation_as_lost(consumer._stop())
        read = [(delivery, await _read(delivery)) for delivery in deliveries]
    except BaseException:
        await consumer.close()
        raise
    # From here on nobody else has them: who gives up now gets them all the same.
    await finish(_take_over(consumer, [delivery for delivery, message in read if message is not None]))
    return [message for _, message in read if message is not None]


async def _all_there(consumer: Consumer, wait: float | None) -> list[Delivery]:
    deliveries = await consumer.receive(LIMIT, timeout=wait)
    loop = asyncio.get_running_loop()
    end = loop.time() + GATHER_TIMEOUT
    while deliveries and len(deliveries) < LIMIT and loop.time() < end:
        more = await consumer.receive(LIMIT - len(deliveries), timeout=0)
        if not more:
            break
        deliveries += more
    return deliveries


async def _read(delivery: Delivery) -> JobMessage | None:
    """The delivery's message; None for a body that is none, which goes to the error queue."""
    try:
        message: JobMessage = _decode(delivery.message)
    except DecodeError as error:
        log.error("Message %s of %r is no job message: %s", delivery.message.id, delivery.message.queue, error)  # noqa: TRY400
        await delivery.reject(str(error))
        return None
    return message


async def _take_over(consumer: Consumer, deliveries: Sequence[Delivery]) -> None:
    # All at once: of many single ones RabbitMQ forgets those that it has not come to when the channel is closed.
    try:
        await consumer.ack_many(deliveries)
    except ConnectError as error:  # some may be acknowledged, so all are to be returned
        log.warning("Messages of %r may be delivered again: %s", consumer.queue, error)
    finally:
        await consumer.close()


_decode: Final = codec.decoder(JobMessage)


async def call_for_each(consumer: Consumer, wait: float | None, callback: Callback) -> None:
    """Call it with each message, until none has come for `wait` seconds."""
    idle = Idle(consumer, wait)
    consumer.middleware.append(idle)
    try:
        await consumer.run(JobHandler(consumer, callback), on_started=idle.begin)
    finally:
        idle.end()


def check_callback(callback: object) -> None:
    """A callback that can be called with one message.

    Raises:
        ConfigurationError: it cannot.
    """
    check_function(callback, "callback", "def on_message(message): ...", "one message")


class JobHandler(BoundHandler):
    """A callback as a handler: what it is given is a JobMessage, annotated or not."""

    def make_decider(self, consumer: Consumer, threads: Threads) -> Dispatcher:
        """The callback, compiled."""
        function = compile_handler(self.function, threads, RESOLVERS, JobMessage)
        return consumer.make_dispatcher(chain(function, consumer.middleware), self.name)


class Idle:
    """Stops a consumer after so many seconds without a message.

    Parameters:
        consumer: which.
        wait: seconds; None never stops it.
    """

    def __init__(self, consumer: Consumer, wait: float | None) -> None:
        self._consumer = consumer
        #: Not less than it takes to see what is there.
        self._wait = None if wait is None else max(wait, consumer.poll_timeout)
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Count from now on."""
        self.end()
        if self._wait is not None:
            self._timer = asyncio.get_running_loop().call_later(self._wait, self._over)

    def end(self) -> None:
        """Count no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _over(self) -> None:
        if self._consumer.connected:
            self._consumer.stop()
        else:
            self.begin()

    async def __call__(self, message: Message, call_next: Handler) -> Any:
        self.end()
        try:
            return await call_next(message)
        finally:
            self.begin()
