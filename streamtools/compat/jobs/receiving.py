"""Receives job messages: as a list, or by a callback for each message."""

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

#: The most messages that a call without a callback returns.
LIMIT: Final = 1000
#: Such a call stops gathering messages this many seconds after the first, even if more keep coming.
GATHER_TIMEOUT: Final = 2.0

#: A function that is called with each message: an `async def`, or a `def`, which runs in a thread.
Callback = Callable[[JobMessage], Any]


async def receive_list(consumer: Consumer, wait: float | None) -> list[JobMessage]:
    """Receive the waiting messages, and acknowledge them; return none if none comes in `wait` seconds."""
    await consumer.open()
    try:
        deliveries = await _all_there(consumer, wait)
        with suppress(ConnectError):  # the acknowledgement below meets the same error
            # Stop first: otherwise the acknowledgement makes the broker deliver further messages, which have to go
            # back, and RabbitMQ would put them at the end of the queue.
            await stray_cancellation_as_lost(consumer._stop())
        read = [(delivery, await _read(delivery)) for delivery in deliveries]
    except BaseException:
        await consumer.close()
        raise
    # From here on only the caller has the messages: `finish` delays a cancellation until it has got them.
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
    """Return the job message of a delivery; if the body is not one, reject the delivery and return None."""
    try:
        message: JobMessage = _decode(delivery.message)
    except DecodeError as error:
        log.error("Message %s of %r is not a job message: %s", delivery.message.id, delivery.message.queue, error)  # noqa: TRY400
        await delivery.reject(str(error))
        return None
    return message


async def _take_over(consumer: Consumer, deliveries: Sequence[Delivery]) -> None:
    # One acknowledgement for all: RabbitMQ drops single ones that it has not processed when the channel is closed.
    try:
        await consumer.ack_many(deliveries)
    except ConnectError as error:  # some may be acknowledged, so all have to be returned
        log.warning("Messages of %r may be delivered again: %s", consumer.queue, error)
    finally:
        await consumer.close()


_decode: Final = codec.decoder(JobMessage)


async def call_for_each(consumer: Consumer, wait: float | None, callback: Callback) -> None:
    """Call the callback with each message, until none has come for `wait` seconds."""
    idle = Idle(consumer, wait)
    consumer.middleware.append(idle)
    try:
        await consumer.run(JobHandler(consumer, callback), on_started=idle.begin)
    finally:
        idle.end()


def check_callback(callback: object) -> None:
    """Check that a callback can be called with one message.

    Raises:
        ConfigurationError: the callback does not take one message.
    """
    check_function(callback, "callback", "def on_message(message): ...", "one message")


class JobHandler(BoundHandler):
    """Makes a handler of a callback, which gets a JobMessage even if its parameter has no annotation."""

    def make_decider(self, consumer: Consumer, threads: Threads) -> Dispatcher:
        """Return the dispatcher that runs the callback."""
        function = compile_handler(self.function, threads, RESOLVERS, JobMessage)
        return consumer.make_dispatcher(chain(function, consumer.middleware), self.name)


class Idle:
    """Stops a consumer that has got no message for some time.

    Parameters:
        consumer: the consumer to stop.
        wait: the seconds without a message; None never stops the consumer.
    """

    def __init__(self, consumer: Consumer, wait: float | None) -> None:
        self._consumer = consumer
        #: At least the time that the consumer needs to find the waiting messages.
        self._wait = None if wait is None else max(wait, consumer.poll_timeout)
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start the time anew."""
        self.end()
        if self._wait is not None:
            self._timer = asyncio.get_running_loop().call_later(self._wait, self._over)

    def end(self) -> None:
        """Stop the time."""
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
