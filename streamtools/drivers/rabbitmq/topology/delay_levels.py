"""Computes which levels of the delay chain hold a message; this module does not use a broker."""

from __future__ import annotations

import re
from hashlib import blake2b
from math import ceil
from typing import Final

from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name
from streamtools.message import Message

#: One step: the lowest level holds a message for this many seconds.
STEP: Final = 0.1
#: The number of levels of which each is twice as long as the one below.
DOUBLING: Final = 26
#: The number of further levels, each as long as the last doubled one.
LAPS: Final = 8
#: The steps of each of these further levels.
LAP: Final = 1 << (DOUBLING - 1)
#: The most steps for which the chain can hold a message.
MOST: Final = (1 << DOUBLING) - 1 + LAPS * LAP
#: These seconds are added, so that rounding in the broker's clock makes no message early.
MARGIN: Final = 0.005

PREFIX: Final = "streamtools.delay"
#: The exchange below the lowest level.
OUT: Final = f"{PREFIX}.out"
_PLAIN_WORD: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")


def level_name(level: int) -> str:
    """Return the name of a level's exchange and queue."""
    return f"{PREFIX}.{level:02d}"


def level_time(level: int) -> int:
    """Return how long a level holds a message, in milliseconds."""
    return 100 << min(level, DOUBLING - 1)


def steps(delay: float) -> int:
    """Return the number of steps that hold a message for at least `delay` seconds; 0 if there is no delay.

    Raises:
        Unsendable: the delay is longer than the chain can hold a message.
    """
    fits = delay <= MOST * STEP  # false for infinity and for NaN
    number = ceil((delay + MARGIN) / STEP) if fits and delay > 0 else 0
    if not fits or number > MOST:
        raise Unsendable(
            f"its delay of {delay / 86400:.0f} days is over {MOST * STEP / 86400:.0f} days, the most here. Send it "
            "later, from a schedule of your own."
        )
    return number


def digits(number: int) -> list[str]:
    """Return a digit for each level, lowest first: "1" if it holds a message that waits for `number` steps."""
    laps = max(0, -(-(number - (1 << DOUBLING) + 1) // LAP))
    rest = number - laps * LAP
    doubling = [str(rest >> level & 1) for level in range(DOUBLING if laps else rest.bit_length())]
    return doubling + ["1"] * laps


def word(target: str) -> str:
    """Return one word of a routing key that stands for a target, whatever characters the target has."""
    if _PLAIN_WORD.fullmatch(target):
        return target
    return "~" + blake2b(target.encode(), digest_size=16).hexdigest()


def target_word(message: Message) -> str:
    """Return the word for the target of a message: the queue or the topic it goes to when it is due.

    Raises:
        ConfigurationError: RabbitMQ does not accept the name of the queue.
    """
    if message.exchange is None:
        check_rabbitmq_name(message.queue)
        return word(message.queue)
    return word(f"{message.exchange.name}\n{message.queue}")


def is_route(key: str, message: Message) -> bool:
    """Whether a routing key leads through the delay chain to the target of this message."""
    held, _, target = key.rpartition(".")  # the word has no dot
    return held != "" and set(held) <= set("01.") and target == target_word(message)
