"""Delay without a plugin: a chain of levels, each of which holds a message for twice as long as the one before.

Level n is a topic exchange and a queue whose messages expire after 100 ms x 2^n. The routing key of a delayed message
says in binary which levels hold it, lowest first, and ends in a word that stands for its target: `0.1.1.orders` is
held for 400 ms and 200 ms. The message enters at its highest level. The exchange of each level reads one digit: with
1 the message goes into the level's queue, which dead-letters it to the exchange below when the time is over; with 0
it goes to the exchange below at once. The last exchange is bound to each target by its word. So the work does not
depend on the delay, nor on the number of waiting messages. If a target is a topic of an exchange, it has a queue of
its own, whose messages expire at once and are dead-lettered to that exchange under that topic.

No step can lose a message. The queues are quorum queues and dead-letter at least once (which needs reject-publish).
The last exchange has an alternate exchange: if a target is gone, its messages go to `streamtools.undeliverable`.
Otherwise 32 of them would block a whole level.

A queue's time to live is a 32-bit number of milliseconds, so levels stop doubling at 2^25 x 100 ms (39 days). Eight
further levels of that length come on top: 388 days together.

https://www.rabbitmq.com/docs/quorum-queues#dead-lettering, /docs/ttl, /docs/ae
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource

from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.rare.leaderless_levels import LeaderlessLevels
from streamtools.drivers.rabbitmq.rare.unusable_delays import LevelsMissing, Unheld, UnusableDelays
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.delay_levels import (
    OUT,
    PREFIX,
    digits,
    level_name,
    level_time,
    steps,
    target_word,
)
from streamtools.drivers.rabbitmq.topology.queues import AT_LEAST_ONCE, UNDELIVERABLE, nowhere_to_send
from streamtools.errors import ConnectError, QueueError
from streamtools.message import Message

#: After this many seconds, a target is checked and bound again before its next use.
TARGET_TTL: Final = 30.0
#: After this many seconds, the levels are declared again before their next use: an operator may have deleted one.
LEVELS_TTL: Final = 300.0


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the chain: the names of its queues and exchanges, and the requests that create them, in order."""

    queues: tuple[str, ...]
    exchanges: tuple[str, ...]
    requests: tuple[Callable[[AbstractChannel], Awaitable[Any]], ...]


class DelayChain:
    """Declares the levels and binds the targets over one connection, when they are first needed.

    Attributes:
        leaderless: the levels that are not used for now.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._declarations = Declarations(connection)
        self._time = asyncio.get_running_loop().time
        #: The number of levels that exist, from the lowest on.
        self._levels = 0
        #: When the levels must be declared again.
        self._renew_at = 0.0
        #: The word of a target -> until when we assume that it is bound.
        self._targets: dict[str, float] = {}
        #: Whether we may create queues and exchanges, as far as is known; if not, we use those that exist.
        self._may_make = True
        self.leaderless: LeaderlessLevels = LeaderlessLevels(self._time)
        self._unusable = UnusableDelays(self._time)
        self._lock = asyncio.Lock()

    def route(self, delay: float, target: str) -> tuple[str, str]:
        """Return exchange and routing key for a message due in `delay` seconds; two empty strings if it is due now.

        Parameters:
            target: the word that `prepare` returned.
        """
        number = steps(delay)
        if number == 0:
            return "", ""
        bits = digits(self.leaderless.passable(number))
        # `prepare` declared the levels a moment earlier, for a delay that was a little longer.
        if len(bits) > self._levels:
            bits = digits(number)  # meanwhile a level has become leaderless
        return level_name(len(bits) - 1), ".".join((*bits, target))

    def forget(self) -> None:
        """Declare and bind everything again before the next message, because a part of the chain is gone."""
        self._levels = 0
        self._targets.clear()

    def forbid(self, why: str) -> None:
        """Note that we may not send to the chain; it is tried again after a while."""
        self._unusable.forbid(why)

    async def prepare(self, message: Message, now: float, *, declares: bool = True) -> str:
        """Make sure that the chain exists for a message, and return the word of its target.

        Parameters:
            now: the present time, in seconds since the epoch.
            declares: whether to create missing levels; if not, existing ones are used, and the target is bound.

        Raises:
            Unheld: the chain is missing and `declares` is false, or we may not use it.
            QueueError: the target does not exist.
            ConfigurationError: RabbitMQ does not accept the name of the target.
            Unsendable: the delay is too long.
            ConnectionLost: the connection has ended.
        """
        target = target_word(message)
        levels = len(digits(self.leaderless.passable(steps((message.deliver_at or now) - now))))
        trusted_until = min(self._renew_at, self._targets.get(target, 0.0))
        self._unusable.check(target, levels, standing=self._levels, declares=declares)
        if levels <= self._levels and trusted_until > self._time():
            return target
        async with self._lock:
            try:
                await self._declare(levels, declares=declares)
                await self._bind(message, target, declares=declares)
            except QueueError as error:
                if not isinstance(error, Unheld) and not isinstance(error.__cause__, ChannelAccessRefused):
                    raise
                what = levels if isinstance(error, LevelsMissing) and levels > self._levels else target
                self._unusable.note(what, str(error), declares=declares)
                raise Unheld(str(error)) from error.__cause__
        return target

    # --- targets ------------------------------------------------------------------------------------

    async def _bind(self, message: Message, target: str, *, declares: bool) -> None:
        if self._targets.get(target, 0.0) > self._time():
            return
        queue = message.queue
        if message.exchange is None:
            await self._check_queue(queue)
        else:
            onwards = {"x-dead-letter-exchange": message.exchange.name, "x-dead-letter-routing-key": queue}
            queue = f"{PREFIX}.to.{target[1:]}"
            await self._ensure(_hop(queue, onwards), declares=declares)
        # "#" matches any number of digits; the word is always the last, and has no dot.
        await self._connection.request(lambda channel: channel.queue_bind(queue, OUT, f"#.{target}"))
        self._targets[target] = self._time() + TARGET_TTL

    async def _check_queue(self, queue: str) -> None:
        try:
            found = await self._declarations.exists(queue)
        except ConnectError as error:
            if not isinstance(error.__cause__, ChannelLockedResource):
                raise
            # The queue exists, but only the connection that owns it may bind it.
            raise Unheld(
                f"The queue {queue!r} is exclusive to another connection, so a delayed message cannot be sent to it. "
                "Use Retry(delay=0), or a queue that is not exclusive."
            ) from None
        if not found:
            raise QueueError(nowhere_to_send(queue, self._connection.where))

    # --- levels -------------------------------------------------------------------------------------

    async def _declare(self, levels: int, *, declares: bool) -> None:
        """Declare missing levels from the end of the chain upwards, because a level needs all levels below it."""
        if self._renew_at < self._time():
            levels, self._levels, self._may_make = max(levels, self._levels), 0, True
        if levels <= self._levels:
            return
        if self._levels == 0:
            if declares:
                with suppress(QueueError):  # we may not create the queue; `_ensure` checks that it exists
                    await self._declarations.declare_undeliverable()
            await self._ensure(_END, declares=declares)
            self._renew_at = self._time() + LEVELS_TTL
        for level in range(self._levels, levels):
            await self._ensure(_level(level), declares=declares)
            self._levels = level + 1

    async def _ensure(self, part: _Part, *, declares: bool) -> None:
        """Create a part of the chain; if we must not or may not, check that it exists."""
        if declares and self._may_make:
            try:
                for request in part.requests:
                    await self._connection.request(request, expects=(ChannelAccessRefused,))
            except ChannelAccessRefused:
                self._may_make = False
            else:
                return
        for name in part.queues:
            if not await self._declarations.exists(name):
                raise self._missing(part, declares=declares)
        for name in part.exchanges:
            if not await self._declarations.has_exchange(name):
                raise self._missing(part, declares=declares)

    def _missing(self, part: _Part, *, declares: bool) -> LevelsMissing:
        names = ", ".join(dict.fromkeys((*part.queues, *part.exchanges)))
        missing = (
            f"Queues or exchanges that hold delayed messages are missing at {self._connection.where} ({names}), "
        )
        if not declares:
            return LevelsMissing(
                f"{missing}and without declare=True they are not created. Use declare=True, which does not change a "
                "queue that exists; let somebody else send one message with the same delay; or send without a delay."
            )
        return LevelsMissing(
            f"{missing}and this user may not declare them. Have another user send one message with the same delay, "
            "or allow it: rabbitmqctl set_permissions with a configure pattern that matches "
            f"{PREFIX}.* and {UNDELIVERABLE}."
        )


def _level(level: int) -> _Part:
    name, below = level_name(level), level_name(level - 1) if level else OUT
    arguments = {**AT_LEAST_ONCE, "x-message-ttl": level_time(level), "x-dead-letter-exchange": below}
    place = "*." * level
    return _Part(
        (name,),
        (name,),
        (
            lambda channel: channel.queue_declare(name, durable=True, arguments=arguments),
            lambda channel: channel.exchange_declare(name, exchange_type="topic", durable=True),
            lambda channel: channel.queue_bind(name, name, f"{place}1.#"),
            lambda channel: channel.exchange_bind(below, name, f"{place}0.#"),
        ),
    )


def _hop(name: str, onwards: dict[str, Any]) -> _Part:
    """Return the queue from which due messages go to an existing exchange."""
    arguments = {**AT_LEAST_ONCE, "x-message-ttl": 1, **onwards}
    return _Part((name,), (), (lambda channel: channel.queue_declare(name, durable=True, arguments=arguments),))


#: The part below the lowest level.
_END: Final = _Part(
    (UNDELIVERABLE,),
    (UNDELIVERABLE, OUT),
    (
        lambda channel: channel.exchange_declare(UNDELIVERABLE, exchange_type="fanout", durable=True),
        lambda channel: channel.queue_bind(UNDELIVERABLE, UNDELIVERABLE),
        lambda channel: channel.exchange_declare(
            OUT, exchange_type="topic", durable=True, arguments={"alternate-exchange": UNDELIVERABLE}
        ),
    ),
)
