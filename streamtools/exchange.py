"""Exchange: a name that messages are published to, and that queues are bound to by topic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from streamtools.errors import ConfigurationError, QueueError
from streamtools.validation.checks import check_name

ExchangeType = Literal["direct", "topic", "fanout"]
TYPES: Final = ("direct", "topic", "fanout")


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange copies a message into the queues that are bound to its topic.

    Parameters:
        name: its name; `streamtools.<type>` when empty.
        type: "direct" (a binding names the whole topic), "topic" (dotted words, where `*` in a binding
            stands for one word and `#` for any number) or "fanout" (every bound queue).

    Raises:
        ConfigurationError: no such type, or a name that cannot be used.
    """

    name: str = ""
    type: ExchangeType = "topic"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ConfigurationError(f"Exchange(type={self.type!r}) is not one of {', '.join(map(repr, TYPES))}.")
        if not self.name:
            object.__setattr__(self, "name", f"streamtools.{self.type}")
        check_name(self.name)

    def matches(self, pattern: str, topic: str) -> bool:
        """Return whether a queue that is bound with `pattern` receives messages of `topic`."""
        if self.type == "topic":
            return _match(pattern, topic)
        return self.type == "fanout" or pattern == topic


DIRECT: Final = Exchange(type="direct")
TOPIC: Final = Exchange(type="topic")
FANOUT: Final = Exchange(type="fanout")


@dataclass(frozen=True, slots=True)
class Binding:
    """Says which messages of an exchange a queue receives: those whose topic matches.

    Parameters:
        topic: a topic, or a pattern of topics on a topic exchange.
        exchange: `streamtools.topic` unless given.

    Raises:
        ConfigurationError: the topic is not a text.
    """

    topic: str
    exchange: Exchange = TOPIC

    def __post_init__(self) -> None:
        if not isinstance(self.topic, str):
            raise ConfigurationError(
                f"A queue is bound by a topic, which is a text, not {type(self.topic).__name__}."
            )


def no_subscriber(topic: str, exchange: Exchange) -> QueueError:
    """A message whose topic no queue is bound to."""
    return QueueError(
        f"No queue is bound to the topic {topic!r} on the exchange {exchange.name!r}, so the message would reach "
        "nobody. Start a subscriber first, or publish with mandatory=False."
    )


def another_type(exchange: Exchange, found: str) -> QueueError:
    """An exchange that exists as another type."""
    return QueueError(
        f"The exchange {exchange.name!r} is {found!r}, and {exchange.type!r} is asked for: write "
        f"Exchange({exchange.name!r}, type={found!r}), or choose another name."
    )


@lru_cache(maxsize=4096)
def _match(pattern: str, topic: str) -> bool:
    # As RabbitMQ does it (https://www.rabbitmq.com/tutorials/tutorial-five-python): the positions in the
    # pattern that the words so far can have come to, all at once, so that "#" never looks back.
    words: list[str] = []
    for word in pattern.split("."):
        if word != "#" or words[-1:] != ["#"]:  # several in a row stand for no more than one
            words.append(word)
    places = _past_hashes(words, {0})
    for word in topic.split("."):
        # "#" keeps its place: it takes this word too.
        places = {p if words[p] == "#" else p + 1 for p in places if p < len(words) and words[p] in ("#", "*", word)}
        places = _past_hashes(words, places)
    return len(words) in places


def _past_hashes(words: list[str], places: set[int]) -> set[int]:
    """These places, and those behind each "#" at them, which may stand for no word."""
    return places | {place + 1 for place in places if place < len(words) and words[place] == "#"}
