"""Looking for topics: what one broker does not know yet, another one does."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka

from streamtools import ConnectError, KafkaSettings, QueueError
from streamtools.drivers.kafka.brokers.topics import Topic, Topics

KNOWN, UNKNOWN, NOT_READY = 0, kafka.UnknownTopicOrPartitionError.errno, kafka.LeaderNotAvailableError.errno
PARTITION = (0, 0, 1, [1], [1])


class Brokers:
    """A client of three brokers, each with a view of its own: node to topic to (code, partitions)."""

    def __init__(self, views: dict[int, dict[str, tuple[int, list[Any]]]]) -> None:
        self._views = views
        self.cluster = SimpleNamespace(
            brokers=lambda: [SimpleNamespace(nodeId=node) for node in views],
            _partitions={},
            _broker_partitions=defaultdict(set),
        )
        self.asked: list[int] = []

    def get_random_node(self) -> int:
        return min(self._views)

    async def force_metadata_update(self) -> None:
        """Nothing new."""

    async def send(self, node: int, request: Any) -> Any:
        self.asked.append(node)
        if not self._views[node]:
            raise kafka.KafkaConnectionError("it is down")
        topics = [(name, self._views[node].get(name, (UNKNOWN, []))) for name in request._topics]
        return SimpleNamespace(topics=[(code, name, False, parts) for name, (code, parts) in topics])


async def find(client: Brokers, *names: str) -> dict[str, int]:
    return await Topics(client, KafkaSettings(host="h")).find(names)


async def test_a_topic_that_one_broker_does_not_know_yet_is_not_missing() -> None:
    here = {"orders": (KNOWN, [PARTITION])}
    brokers = Brokers({1: here, 2: {}, 3: here | {"fresh": (KNOWN, [PARTITION, (0, 1, 1, [1], [1])])}})
    assert await find(brokers, "orders", "fresh", "none") == {"orders": 1, "fresh": 2}
    assert brokers.asked == [1, 1, 2, 3]


async def test_a_topic_that_is_known_everywhere_costs_one_question() -> None:
    brokers = Brokers({node: {"orders": (KNOWN, [PARTITION])} for node in (1, 2, 3)})
    assert await find(brokers, "orders") == {"orders": 1}
    assert brokers.asked == [1]


async def test_a_topic_without_a_leader_exists_and_has_no_partitions_yet() -> None:
    assert await find(Brokers({1: {"orders": (NOT_READY, [])}}), "orders") == {"orders": 0}


async def test_partitions_that_one_broker_does_not_know_yet_are_asked_for_elsewhere() -> None:
    old, new = {"orders": (KNOWN, [PARTITION])}, {"orders": (KNOWN, [PARTITION, (0, 1, 1, [1], [1])])}
    brokers = Brokers({1: old, 2: new, 3: old})
    found = await Topics(brokers, KafkaSettings(host="h")).look(["orders"], {"orders": 2})
    assert len(found["orders"].leaders) == 2
    assert brokers.asked == [1, 1, 2]
    assert set(brokers.cluster._partitions["orders"]) == {0, 1}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Unable to replicate the partition 1 time(s): All brokers are currently fenced.", ConnectError),
        ("The target replication factor of 3 cannot be reached because only 1 broker(s) are registered.", QueueError),
    ],
)
async def test_a_topic_that_cannot_be_made_while_no_broker_is_ready_is_made_later(
    words: str, kind: type[Exception]
) -> None:
    async def refuse(_node: int, request: Any) -> Any:
        code = kafka.InvalidReplicationFactorError.errno
        return SimpleNamespace(topic_errors=[(name, code, words) for name, *_ in request.create_topic_requests])

    brokers = Brokers({1: {"others": (KNOWN, [PARTITION])}})
    topics = Topics(brokers, KafkaSettings(host="h"))
    brokers.cluster.controller, brokers.send = None, refuse  # type: ignore[method-assign]
    with pytest.raises(kind, match=r"'orders' cannot be made.*(fenced|registered)\.$") as caught:
        await topics._create([Topic(name="orders")])
    assert not getattr(caught.value, "permanent", False)
