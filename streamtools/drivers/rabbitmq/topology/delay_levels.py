"""Which levels of the delay chain hold a message for how long. Nothing here speaks to a broker."""

from __future__ import annotations

import re
from hashlib import blake2b
from math import ceil
from typing import Final

from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name
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

PREFIX: Final = "streamtools.delay"
#: The exchange behind the lowest level.
OUT: Final = f"{PREFIX}.out"
_PLAIN_WORD: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")


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


def word(target: str) -> str:
    """One word of a routing key that stands for a target, whatever characters that has."""
    if _PLAIN_WORD.fullmatch(target):
        return target
    return "~" + blake2b(target.encode(), digest_size=16).hexdigest()


def target_word(message: Message) -> str:
    """The word for where a message goes when it is due.

    Raises:
        ConfigurationError: it is a queue whose name RabbitMQ does not take.
    """
    if message.exchange is None:
        check_rabbitmq_name(message.queue)
        return word(message.queue)
    return word(f"{message.exchange.name}\n{message.queue}")


def is_route(key: str, message: Message) -> bool:
    """Whether this routing key is one through the chain to this message's target."""
    held, _, target = key.rpartition(".")  # the word has no dot
    return held != "" and set(held) <= set("01.") and target == target_word(message)
