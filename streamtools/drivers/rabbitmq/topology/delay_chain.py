"""Delay without a plugin: a chain of levels, each of which holds a message for twice as long as the one before.

Level n is a topic exchange and a queue whose messages expire after 100 ms x 2^n. The routing key of a
delayed message says in binary which levels hold it, lowest first, and ends in a word that stands for
its target: `0.1.1.orders` is held 400 ms and 200 ms. It enters at its highest level; each exchange
reads one digit: 1 goes into its queue, which dead-letters to the exchange below when the time is up,
0 goes to the exchange below at once. The last exchange is bound to each target by its word. So the
cost does not depend on the delay, nor on how many messages wait. A target that is a topic of an exchange has a
queue of its own there, whose messages expire at once and are dead-lettered to that exchange under that topic.

No hop can lose a message: quorum queues, at-least-once dead-lettering (which needs reject-publish), and an
alternate exchange behind the last one: a target that is gone sends its messages to
`streamtools.undeliverable`, where 32 of them cannot stall a whole level.

A queue's time to live is a 32-bit number of milliseconds, so levels stop doubling at 2^25 x 100 ms
(39 days); eight further levels of that length come on top: 388 days together.

https://www.rabbitmq.com/docs/quorum-queues#dead-lettering, /docs/ttl, /docs/ae
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from math import ceil
from typing import Any, Final

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource, ChannelNotFoundEntity

from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.drivers.rabbitmq.errors import CLIENT_ERRORS, channel_error, is_missing, plain
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name
from streamtools.errors import QueueError, StreamToolsError
from streamtools.exchange import Exchange
from streamtools.message import Message

#: Seconds of the lowest level.
STEP: Final = 0.1
#: Levels whose time doubles.
DOUBLING: Final = 26
#: Further levels, each as long as the last of those.
LAPS: Final = 8
#: Steps of one of these.
LAP: Final = 1 << (DOUBLING - 1)
#: The most steps that the chain can hold a message.
MOST: Final = (1 << DOUBLING) - 1 + LAPS * LAP
#: Seconds added, so that rounding in the broker's clock makes nothing early.
MARGIN: Final = 0.005
#: Seconds for which a target that was found and bound is taken to be so.
TARGET_TTL: Final = 30.0
#: Seconds after which the levels are declared again before the next use: an operator may have deleted one.
LEVELS_TTL: Final = 300.0
#: Seconds for which nothing is sent by way of a level that gave no answer.
AVOID_TTL: Final = 300.0

PREFIX: Final = "streamtools.delay"
OUT: Final = f"{PREFIX}.out"
UNDELIVERABLE: Final = "streamtools.undeliverable"
_PLAIN_WORD: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")

#: Arguments of a queue that dead-letters without losing anything.
SAFE: Final[dict[str, Any]] = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def level_name(level: int) -> str:
    """The name of a level's exchange and queue."""
    return f"{PREFIX}.{level:02d}"


def level_time(level: int) -> int:
    """How long a level holds a message, in milliseconds."""
    return 100 << min(level, DOUBLING - 1)


def steps(delay: float) -> int:
    """The steps that hold a message for at least `delay` seconds; 0 for none.

    Raises:
        Unsendable: longer than the chain can hold it.
    """
    fits = delay <= MOST * STEP  # which infinity does not, nor what is not a number
    number = ceil((delay + MARGIN) / STEP) if fits and delay > 0 else 0
    if not fits or number > MOST:
        raise Unsendable(
            f"its delay of {delay / 86400:.0f} days is over {MOST * STEP / 86400:.0f} days, the most here. Send it "
            "later, from a schedule of your own."
        )
    return number


def digits(number: int) -> list[str]:
    """Which levels hold a message for so many steps, lowest first, up to the highest that does."""
    laps = max(0, -(-(number - (1 << DOUBLING) + 1) // LAP))
    rest = number - laps * LAP
    doubling = [str(rest >> level & 1) for level in range(DOUBLING if laps else rest.bit_length())]
    return doubling + ["1"] * laps


def word(queue: str) -> str:
    """One word of a routing key for a queue's name, whatever characters that has."""
    if _PLAIN_WORD.fullmatch(queue):
        return queue
    return "~" + blake2b(queue.encode(), digest_size=16).hexdigest()


def _target(message: Message) -> str:
    """The word for where a message is to go when it is due."""
    if message.exchange is None:
        check_rabbitmq_name(message.queue)
        return word(message.queue)
    return word(f"{message.exchange.name}\n{message.queue}")


class Unheld(QueueError):
    """Nothing can hold a message for this target until it is due: what that needs is missing, or is not for us."""


class _Absent(Unheld):
    """Levels of the chain are missing."""


class DelayChain:
    """The chain as one connection sees it: levels declared and targets bound when they are first needed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._levels = 0
        #: When they are to be declared again.
        self._renew_at = 0.0
        self._targets: dict[str, float] = {}
        #: Level -> until when it is avoided.
        self._avoided: dict[int, float] = {}
        #: We may make queues and exchanges here, as far as is known; else those that stand are used.
        self._may_make = True
        #: What cannot be used, a target's word or so many levels, with or without declaring: until when we do not ask
        #: again, and why.
        self._unusable: dict[tuple[str | int, bool], tuple[float, str]] = {}
        self._lock = asyncio.Lock()
        self._time = asyncio.get_running_loop().time

    def route(self, delay: float, target: str) -> tuple[str, str]:
        """The exchange and the routing key for a message due in `delay` seconds; two empty strings when it is due.

        Parameters:
            target: what `prepare` returned.
        """
        number = steps(delay)
        if number == 0:
            return "", ""
        bits = digits(self._passable(number))
        # Levels that a message's time needs were declared for a longer time, a moment before.
        if len(bits) > self._levels:
            bits = digits(number)  # one is avoided since then
        return level_name(len(bits) - 1), ".".join((*bits, target))

    def avoid(self, name: str) -> None:
        """Send nothing by way of this level for a while: what needs it is held longer, until a time without it."""
        level = int(name.rpartition(".")[2])
        self._avoided[level] = self._time() + AVOID_TTL

    def _passable(self, number: int) -> int:
        """The least number of steps from this one on that needs no level which is avoided."""
        if not self._avoided:
            return number
        self._avoided = {level: until for level, until in self._avoided.items() if until > self._time()}
        for level in sorted(self._avoided):
            if number >> level & 1 and number < 1 << DOUBLING:
                number = (number >> level) + 1 << level
        return number

    def is_route(self, key: str, message: Message) -> bool:
        """Whether this routing key is one through the chain to this message's target."""
        held, _, target = key.rpartition(".")  # the word has no dot
        return held != "" and set(held) <= set("01.") and target == _target(message)

    def forget(self) -> None:
        """Declare and bind all of it anew before the next message: some of it is gone."""
        self._levels = 0
        self._targets.clear()

    def forbid(self, why: str) -> None:
        """We may not send to the chain; ask again after a while."""
        for declares in (True, False):
            self._note_unusable(0, why, declares=declares)

    async def prepare(self, message: Message, now: float, *, declares: bool = True) -> str:
        """Make sure that the chain stands for this message; the word of its target.

        Parameters:
            now: seconds since the epoch.
            declares: what is missing is made; else only what stands is used, and the target is bound to it.

        Raises:
            Unheld: the chain is missing and not to be made, or we may not use it.
            QueueError: the target does not exist.
            ConfigurationError: its name cannot be used.
            Unsendable: the delay is too long.
            ConnectionLost: the connection has ended.
        """
        target = _target(message)
        levels = len(digits(self._passable(steps((message.deliver_at or now) - now))))
        trusted_until = min(self._renew_at, self._targets.get(target, 0.0))
        if self._unusable:
            self._check_usable(target, levels, declares=declares)
        if levels <= self._levels and trusted_until > self._time():
            return target
        async with self._lock:
            try:
                await self._declare(levels, declares=declares)
                await self._bind(message, target, declares=declares)
            except Unheld as error:
                what = levels if isinstance(error, _Absent) and levels > self._levels else target
                self._note_unusable(what, str(error), declares=declares)
                raise
            except StreamToolsError:
                raise
            except ChannelAccessRefused as error:
                why = f"RabbitMQ at {self._connection.where} does not allow it: {plain(error)}"
                self._note_unusable(target, why, declares=declares)
                raise Unheld(why) from error
            except CLIENT_ERRORS as error:
                raise channel_error(error, self._connection.where) from error
        return target

    def _note_unusable(self, what: str | int, why: str, *, declares: bool) -> None:
        self._unusable[what, declares] = self._time() + TARGET_TTL, why

    def _check_usable(self, target: str, levels: int, *, declares: bool) -> None:
        """Raise Unheld where the same was found out a moment ago: each request would end a channel."""
        now = self._time()
        self._unusable = {what: found for what, found in self._unusable.items() if found[0] > now}
        for (what, declaring), (_, why) in self._unusable.items():
            is_meant = what in (target, 0) or (isinstance(what, int) and self._levels < what <= levels)
            if is_meant and declaring is declares:
                raise Unheld(why)

    async def _bind(self, message: Message, target: str, *, declares: bool) -> None:
        if self._targets.get(target, 0.0) > self._time():
            return
        queue = message.queue
        if message.exchange is None:
            await self._look_for(queue)
        else:
            queue = await self._declare_hop(message.exchange, queue, target, declares=declares)
        async with self._connection.declaring() as channel:
            # "#" stands for the digits, however many: the word is always the last, and has no dot.
            await self._connection.call(channel.queue_bind(queue, OUT, f"#.{target}"))
        self._targets[target] = self._time() + TARGET_TTL

    async def _declare_hop(self, exchange: Exchange, topic: str, target: str, *, declares: bool) -> str:
        """The queue from which what is due goes to an exchange, which is there."""
        name = f"{PREFIX}.to.{target[1:]}"
        onwards = {"x-dead-letter-exchange": exchange.name, "x-dead-letter-routing-key": topic}
        arguments = {**SAFE, "x-message-ttl": 1, **onwards}

        async def make(channel: AbstractChannel) -> None:
            await self._connection.call(channel.queue_declare(name, durable=True, arguments=arguments))

        await self._make(make, queues=(name,), declares=declares)
        return name

    async def _look_for(self, queue: str) -> None:
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(channel.queue_declare(queue, passive=True))
        except ChannelLockedResource:
            # Exclusive to another connection: it exists, but only that one may bind it.
            raise Unheld(
                f"The queue {queue!r} is exclusive to another connection, so a delayed message cannot be sent to it. "
                "Use Retry(delay=0), or a queue that is not exclusive."
            ) from None
        except ChannelNotFoundEntity as error:
            if not is_missing(error):
                raise channel_error(error, self._connection.where) from error
            raise QueueError(
                f"There is no queue {queue!r} at {self._connection.where}. Open a consumer of it first, or a "
                "producer with declare=True."
            ) from error

    async def _declare(self, levels: int, *, declares: bool) -> None:
        """Declare what is missing, from the end of the chain upwards: a level is used when all below stand."""
        if self._renew_at < self._time():
            levels, self._levels, self._may_make = max(levels, self._levels), 0, True
        if levels <= self._levels:
            return
        if self._levels == 0:
            if declares:
                with suppress(ChannelAccessRefused):  # what is missing then is found out below
                    await declare_undeliverable(self._connection)
            end = {"queues": (UNDELIVERABLE,), "exchanges": (UNDELIVERABLE, OUT)}
            await self._make(self._declare_end, **end, declares=declares)
            self._renew_at = self._time() + LEVELS_TTL
        for level in range(self._levels, levels):
            name = level_name(level)
            make = partial(self._declare_level, level=level)
            await self._make(make, queues=(name,), exchanges=(name,), declares=declares)
            self._levels = level + 1

    async def _make(
        self,
        make: Callable[[AbstractChannel], Awaitable[None]],
        *,
        queues: Sequence[str] = (),
        exchanges: Sequence[str] = (),
        declares: bool,
    ) -> None:
        """Declare a part of the chain; where that is not wanted, or not allowed, see that it stands."""
        if declares and self._may_make:
            try:
                async with self._connection.declaring() as channel:
                    return await make(channel)
            except ChannelAccessRefused:
                self._may_make = False
        try:
            async with self._connection.declaring() as channel:
                for name in queues:
                    await self._connection.call(channel.queue_declare(name, passive=True))
                for name in exchanges:
                    await self._connection.call(channel.exchange_declare(name, passive=True))
        except ChannelNotFoundEntity as error:
            if not is_missing(error):
                raise
            raise self._absent(dict.fromkeys((*queues, *exchanges)), declares=declares) from error

    def _absent(self, names: Iterable[str], *, declares: bool) -> _Absent:
        where = self._connection.where
        missing = f"Queues or exchanges that hold delayed messages are missing at {where} ({', '.join(names)}), "
        if not declares:
            return _Absent(
                f"{missing}and without declare=True none are made. Use declare=True, which leaves a queue that "
                "exists as it is; have somebody else send one message with the same delay; or send without a delay."
            )
        return _Absent(
            f"{missing}and this user may not declare them. Have another user send one message with the same delay, "
            "or allow it: rabbitmqctl set_permissions with a configure pattern that matches "
            f"{PREFIX}.* and {UNDELIVERABLE}."
        )

    async def _declare_end(self, channel: AbstractChannel) -> None:
        call = self._connection.call
        await call(channel.exchange_declare(UNDELIVERABLE, exchange_type="fanout", durable=True))
        await call(channel.queue_bind(UNDELIVERABLE, UNDELIVERABLE))
        await call(
            channel.exchange_declare(
                OUT, exchange_type="topic", durable=True, arguments={"alternate-exchange": UNDELIVERABLE}
            )
        )

    async def _declare_level(self, channel: AbstractChannel, level: int) -> None:
        call = self._connection.call
        name, below = level_name(level), level_name(level - 1) if level else OUT
        arguments = {**SAFE, "x-message-ttl": level_time(level), "x-dead-letter-exchange": below}
        await call(channel.queue_declare(name, durable=True, arguments=arguments))
        await call(channel.exchange_declare(name, exchange_type="topic", durable=True))
        place = "*." * level
        await call(channel.queue_bind(name, name, f"{place}1.#"))
        await call(channel.exchange_bind(below, name, f"{place}0.#"))


async def declare_undeliverable(connection: Connection) -> None:
    """The queue where messages wait that would have nowhere else to go; as it is, where it stands.

    From RabbitMQ 4 on a quorum queue without an argument drops what was delivered more than 20 times.
    """
    try:
        async with connection.declaring() as channel:
            await connection.call(channel.queue_declare(UNDELIVERABLE, passive=True))
    except ChannelNotFoundEntity:
        async with connection.declaring() as channel:
            arguments = {"x-queue-type": "quorum", **_without_limit(channel)}
            await connection.call(channel.queue_declare(UNDELIVERABLE, durable=True, arguments=arguments))


def _without_limit(channel: AbstractChannel) -> dict[str, Any]:
    """The argument that lifts the delivery limit; on RabbitMQ 3, which has none by default, it would drop all."""
    version = str(channel.connection.server_properties.get("version", ""))
    return {} if version.partition(".")[0] in ("", "3") else {"x-delivery-limit": -1}
