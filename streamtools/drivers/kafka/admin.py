"""KafkaAdmin: topics, their settings and their groups."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, ClassVar, Final

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from pydantic import Field

from streamtools.admin import QueueAdmin
from streamtools.driver import Options, Reader
from streamtools.drivers.kafka.brokers.bindings import bind, unbind
from streamtools.drivers.kafka.brokers.cluster import EARLIEST, LATEST, Cluster, TopicState
from streamtools.drivers.kafka.brokers.topics import Topic, Topics
from streamtools.drivers.kafka.errors import CLIENT_ERRORS, refusal
from streamtools.drivers.kafka.names import BINDINGS, RETRY, check_kafka_name, is_retry_topic, reader_of
from streamtools.drivers.kafka.operating.admin_reader import AdminReader, AdminViewer, RedrivenMessage
from streamtools.drivers.kafka.operating.groups import Commit, GroupDescription, Groups, Progress, busy
from streamtools.drivers.kafka.operating.waiting import count, next_times
from streamtools.engine.options import read_options
from streamtools.errors import ConfigurationError, ConnectError, QueueError
from streamtools.exchange import Binding
from streamtools.message import Message
from streamtools.protocols import QUEUE_OPTIONS
from streamtools.queues import GroupInfo, PartitionInfo, Place, QueueInfo, QueueSettings
from streamtools.settings import KafkaSettings

#: Kafka's names for a topic's settings (kafka.apache.org, "Topic configs"), and their value for "no limit".
RETENTION: Final = "retention.ms"
RETENTION_BYTES: Final = "retention.bytes"
UNLIMITED: Final = "-1"


class CreateOptions(Options):
    """Options of `create` for Kafka; when None, those of the settings, else the broker's default."""

    partitions: Annotated[int | None, Field(ge=1)] = None
    replication: Annotated[int | None, Field(ge=1)] = None


class KafkaAdmin(QueueAdmin, protocol="kafka"):
    """Shows Kafka's topics and groups, and changes them.

    A queue's `ready` is what the group named as the queue has still to read; messages in hand count too, as Kafka
    does not know them. `delayed` is what waits in that group's retry topic; retry topics of other groups are listed
    as queues. `oldest` is the age of the group's next message; only `stats` finds it. `peek` disturbs nobody; `move`,
    `discard` and `seek` need that group's consumers to be stopped. Without a target, `move` returns a message from
    an error queue only to the group that had rejected it; with a target, even the same queue, to all who read it.
    """

    settings_class: ClassVar[type[KafkaSettings]] = KafkaSettings
    settings: KafkaSettings
    _cluster: Cluster | None = None

    # --- topics -----------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._close()
        cluster = Cluster(self.settings, self.client_id or "streamtools-admin")
        await cluster.open()
        self._cluster = cluster

    async def _close(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            await cluster.stop()

    async def _list(self) -> Sequence[QueueInfo]:
        with self._plain_errors() as cluster:
            found = (await cluster.topics()).items()
            topics = {name: topic for name, topic in found if not topic.internal and name != BINDINGS}
            return await self._infos(topics)

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        check_kafka_name(queue)
        asked, _ = read_options(
            CreateOptions,
            options,
            known=QUEUE_OPTIONS,
            own=frozenset({"queue"}),
            owner=f"{type(self).__name__}.create",
        )
        with self._plain_errors() as cluster:
            topic = Topic(name=queue, partitions=asked.partitions, replication=asked.replication)
            await Topics(cluster.client, self.settings).declare([topic], True)
            found = await self._topic(queue)
        if asked.partitions not in (None, len(found.leaders)):
            raise self._other(queue, "partitions", len(found.leaders), asked.partitions)
        if asked.replication not in (None, found.replication):
            raise self._other(queue, "replication", found.replication, asked.replication)

    async def _delete(self, queue: str) -> None:
        with self._plain_errors() as cluster:
            await self._topic(queue)
            await unbind(cluster.client, self.settings, queue)
            retries = [name for name in await cluster.topics() if f"{name}.".startswith(f"{queue}{RETRY}.")]
            for name in (queue, *retries):
                await cluster.delete_topic(name)
            await cluster.wait(lambda: self._are_gone([queue, *retries]))

    async def _purge(self, queue: str) -> int:
        with self._plain_errors() as cluster:
            found = await self._progress(reader_of(queue), (await self._topic(queue)).partitions)
            await cluster.delete_records({partition: one.end for partition, one in found.items()})
            return sum(one.waiting for one in found.values())

    async def _stats(self, queue: str) -> QueueInfo:
        with self._plain_errors() as cluster:
            topic = await self._topic(queue)
            infos = await self._infos(await cluster.topics([queue, queue + RETRY]), counted=True)
            found = next(info for info in infos if info.name == queue)
            return replace(found, oldest=await self._oldest(topic)) if found.ready else found

    async def _bind(self, queue: str, binding: Binding) -> None:
        with self._plain_errors() as cluster:
            await self._topic(queue)
            await bind(cluster.client, self.settings, queue, [binding])

    async def _unbind(self, queue: str, binding: Binding) -> None:
        with self._plain_errors() as cluster:
            await unbind(cluster.client, self.settings, queue, [binding])

    # --- settings ---------------------------------------------------------------------------------

    async def _describe(self, queue: str) -> QueueSettings:
        with self._plain_errors() as cluster:
            topic = await self._topic(queue)
            found = await cluster.configuration(queue)
        milliseconds, size = found[RETENTION], found[RETENTION_BYTES]
        return QueueSettings(
            partitions=len(topic.leaders),
            replication=topic.replication,
            retention=math.inf if milliseconds == UNLIMITED else int(milliseconds) / 1000,
            retention_bytes=math.inf if size == UNLIMITED else int(size),
        )

    async def _alter(
        self, queue: str, partitions: int | None, retention: float | None, retention_bytes: float | None
    ) -> None:
        with self._plain_errors() as cluster:
            there = len((await self._topic(queue)).leaders)
            if partitions is not None and partitions < there:
                raise QueueError(
                    f"The topic {queue!r} has {there} partitions, and Kafka takes none away: ask for {there} or "
                    f"more. For fewer make another: streamtools queues create {queue}-2 --partitions {partitions}"
                )
            changed = _settings(retention, retention_bytes)
            if changed:
                await cluster.configure(queue, changed)
            if partitions is not None and partitions > there:
                await self._add_partitions(cluster, queue, partitions)

    async def _add_partitions(self, cluster: Cluster, queue: str, total: int) -> None:
        try:
            await cluster.add_partitions(queue, total)
        except kafka.InvalidPartitionsError:
            if len((await self._topic(queue)).leaders) != total:  # else it was done, and the answer was lost
                raise
        await cluster.wait(lambda: self._has_partitions(queue, total))

    # --- groups -----------------------------------------------------------------------------------

    async def _groups(self, queue: str) -> Sequence[GroupInfo]:
        with self._plain_errors() as cluster:
            partitions = (await self._topic(queue)).partitions
            groups = Groups(cluster)
            found = []
            for name in await groups.names():
                members = await groups.describe(name)
                progress = await self._progress(name, partitions)
                if members.reads(queue) or any(one.commit is not None for one in progress.values()):
                    found.append(_group(name, queue, members, progress))
            return found

    async def _seek(self, queue: str, to: Place, group: str, partition: int | None) -> GroupInfo:
        with self._plain_errors() as cluster:
            partitions = await self._chosen(queue, to, partition)
            groups = Groups(cluster)
            if (await groups.describe(group)).active:
                raise busy(group, self.settings)
            try:
                await groups.commit(group, {p: (o, "") for p, o in (await self._place(partitions, to)).items()})
            except kafka.UnknownMemberIdError as error:
                raise busy(group, self.settings) from error
            progress = await self._progress(group, (await self._topic(queue)).partitions)
            return _group(group, queue, await groups.describe(group), progress)

    async def _chosen(self, queue: str, to: Place, partition: int | None) -> list[TopicPartition]:
        partitions = (await self._topic(queue)).partitions
        if partition is not None:
            chosen = [found for found in partitions if found.partition == partition]
            if not chosen:
                raise QueueError(
                    f"The topic {queue!r} has partitions 0 to {len(partitions) - 1}, and no {partition}."
                )
            return chosen
        if isinstance(to, int) and len(partitions) > 1:
            raise ConfigurationError(
                f"The topic {queue!r} has {len(partitions)} partitions, each with its own offsets: say which one "
                "with partition= (--partition)."
            )
        return partitions

    async def _place(self, partitions: Sequence[TopicPartition], to: Place) -> dict[TopicPartition, int]:
        cluster = self._connected()
        begins = await cluster.offsets(partitions, EARLIEST)
        ends = await cluster.offsets(partitions, LATEST)
        if to == "beginning":
            return begins
        if to == "end":
            return ends
        if isinstance(to, datetime):
            found = await cluster.offsets(partitions, int(to.timestamp() * 1000))
            return {p: offset if offset >= 0 else ends[p] for p, offset in found.items()}
        assert isinstance(to, int)
        for p in partitions:
            if not begins[p] <= to <= ends[p]:
                raise QueueError(
                    f"Partition {p.partition} of {p.topic!r} keeps its messages from offset {begins[p]}, and the "
                    f"next one will have {ends[p]}: seek to one of these or between, not to {to}."
                )
        return dict.fromkeys(partitions, to)

    # --- shared -----------------------------------------------------------------------------------

    def _back(self, message: Message, target: str | None) -> Message:
        copy = super()._back(message, target)
        return RedrivenMessage.of(copy) if target is None else copy

    def _reader(self, queue: str, prefetch: int) -> Reader:
        return AdminReader(queue, self._connected(), self.settings, client_id=self.client_id)

    def _viewer(self, queue: str, most: int) -> Reader:
        return AdminViewer(queue, self.settings, client_id=self.client_id)

    async def _infos(self, topics: Mapping[str, TopicState], *, counted: bool = False) -> list[QueueInfo]:
        """The numbers of each topic, including those of the retry topic of its own group.

        Parameters:
            counted: count messages if there are few, instead of offsets.
        """
        groups = Groups(self._connected())
        known = await groups.names()
        commits: dict[TopicPartition, Commit] = {}
        members = {}
        for name in topics:
            if (group := reader_of(name)) in known:
                commits |= await groups.committed(group, topics[name].partitions)
                members[name] = len((await groups.describe(group)).members)
        partitions = [partition for topic in topics.values() for partition in topic.partitions]
        due, later = dict.fromkeys(topics, 0), dict.fromkeys(topics, 0)
        found = await self._measured(commits, partitions, all_of_them=False)
        numbers = await count(self._connected(), found) if counted else {p: one.waiting for p, one in found.items()}
        for partition, number in numbers.items():
            waits = is_retry_topic(partition.topic) and partition.partition > 0  # the first tier holds nothing back
            (later if waits else due)[partition.topic] += number
        own = {name + RETRY: name for name in topics if name + RETRY in topics}
        for retry, name in own.items():
            due[name] += due[retry]
            later[name] += later[retry]
        return [
            QueueInfo(name=n, ready=due[n], delayed=later[n], consumers=members.get(n, 0))
            for n in topics
            if n not in own
        ]

    async def _oldest(self, topic: TopicState) -> float | None:
        """The age of the next message of its group, in seconds; None if nothing waits."""
        found = await self._progress(reader_of(topic.name), topic.partitions)
        times = await next_times(self._connected(), {p: one.start for p, one in found.items() if one.waiting})
        return max(0.0, time.time() - min(times)) if times else None

    async def _progress(self, group: str, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, Progress]:
        # The commits first: a message that is finished meanwhile may count as waiting, but not the other way round.
        return await self._measured(await Groups(self._connected()).committed(group, partitions), partitions)

    async def _measured(
        self,
        commits: Mapping[TopicPartition, Commit],
        partitions: Sequence[TopicPartition],
        *,
        all_of_them: bool = True,
    ) -> dict[TopicPartition, Progress]:
        """These commits, compared with what the partitions hold."""
        cluster = self._connected()
        begins = await cluster.offsets(partitions, EARLIEST, all_of_them=all_of_them)
        ends = await cluster.offsets(partitions, LATEST, all_of_them=all_of_them)
        return {p: Progress(begins[p], end, commits.get(p)) for p, end in ends.items() if p in begins}

    def _other(self, queue: str, name: str, there: int, wanted: int | None) -> QueueError:
        return QueueError(
            f"There is a topic {queue!r} at {self.settings.safe_url} already, with {name}={there}, not {wanted}. "
            f"For more partitions: streamtools queues alter {queue} --partitions NUMBER"
        )

    async def _topic(self, queue: str) -> TopicState:
        found = (await self._connected().topics([queue])).get(queue)
        if found is None:
            raise Topics(self._connected().client, self.settings).missing(queue)
        return found

    async def _has_partitions(self, queue: str, total: int) -> bool:
        # All brokers must know it, as any of them may be asked next.
        states = await self._connected().everywhere(queue)
        return bool(states) and all(
            state is not None and len(state.leaders) == total and min(state.leaders.values()) >= 0 for state in states
        )

    async def _are_gone(self, queues: Sequence[str]) -> bool:
        return not await self._connected().topics(queues)

    def _connected(self) -> Cluster:
        if self._cluster is None:
            raise ConnectError(f"{self!r} is not open: async with ADMINS['kafka'](url=...) as admin: ...")
        return self._cluster

    @contextmanager
    def _plain_errors(self) -> Iterator[Cluster]:
        try:
            yield self._connected()
        except CLIENT_ERRORS as error:
            raise refusal(error, self.settings) from error


def _settings(retention: float | None, retention_bytes: float | None) -> dict[str, str]:
    changed = {}
    if retention is not None:
        changed[RETENTION] = UNLIMITED if retention == math.inf else str(int(retention * 1000))
    if retention_bytes is not None:
        changed[RETENTION_BYTES] = UNLIMITED if retention_bytes == math.inf else str(int(retention_bytes))
    return changed


def _group(
    name: str, queue: str, members: GroupDescription, progress: Mapping[TopicPartition, Progress]
) -> GroupInfo:
    partitions = tuple(
        PartitionInfo(
            partition=partition.partition,
            begin=one.begin,
            end=one.end,
            committed=None if one.commit is None else one.commit[0],
            lag=one.lag,
            ahead=one.ahead,
            member=members.holder(partition),
        )
        for partition, one in sorted(progress.items())
    )
    return GroupInfo(
        name=name,
        queue=queue,
        state=members.state.lower(),
        members=len(members.members),
        lag=sum(one.lag for one in partitions),
        partitions=partitions,
    )
