"""Publishing: many senders, one lane for each partition, whole batches, each message's own outcome.

A lane hands Kafka one batch at a time and gathers the next meanwhile. Messages are idempotent: the
library numbers the messages of a partition, so that a batch which it repeats is written once. A batch that
failed leaves a hole in these numbers, and Kafka then takes no other from the same producer. After a plain
refusal the numbers are taken back; after any other failure the lanes go on with a new producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka

from streamtools.drivers.kafka.brokers.topics import Topic, Topics
from streamtools.drivers.kafka.client.connect import (
    abandoned,
    connection,
    fail_batches,
    next_number,
    rewind,
    started,
    stopped,
)
from streamtools.drivers.kafka.client.monitor import ConnectionMonitor
from streamtools.drivers.kafka.errors import (
    CLIENT_ERRORS,
    RECORD_REFUSALS,
    REFUSALS,
    TROUBLE,
    Missing,
    client_error,
    plain,
)
from streamtools.drivers.kafka.producing.partitions import PartitionChooser
from streamtools.drivers.kafka.producing.record import UNWRITABLE, Portions, ProducerRecord, unwritable
from streamtools.drivers.kafka.producing.unconfirmed import ByteLimit, UnconfirmedBatch
from streamtools.drivers.kafka.records import COPY_ROOM
from streamtools.engine.tasks.cancellation import asked_to_stop
from streamtools.errors import Closed, ConnectError, StreamToolsError
from streamtools.settings import KafkaSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Bytes of one batch; Kafka takes 1 MiB unless told otherwise (`message.max.bytes`).
BATCH: Final = 512 * 1024
CLOSED: Final = "The producer was closed; call open() to use it again."
#: Seconds without a confirmation after which it is looked at whether the topic is still there.
LATE: Final = 2.0
#: Seconds before a batch is tried again with a new producer; doubled each time, up to the most of it.
PAUSE: Final = 0.05
LONGEST: Final = 1.0


class PartitionSender:
    """One partition's messages, in order, one batch at a time."""

    def __init__(self, publisher: Publisher, topic: str, partition: int) -> None:
        self.waiting: deque[ProducerRecord] = deque()
        self.task: asyncio.Task[None] | None = None
        self._publisher = publisher
        self.topic: str = topic
        self.partition: int = partition
        self._portions = Portions()
        self._watch: asyncio.Task[None] | None = None
        self._failures = 0  # since the last confirmation

    def wake(self) -> None:
        """Send what waits, until nothing does."""
        self.task = asyncio.create_task(self._run(), name=f"streamtools-lane-{self.topic}-{self.partition}")

    async def _run(self) -> None:
        while self.waiting:
            producer = await self._publisher.producer()
            if producer is None:
                return
            if self._publisher.partitions.lacks(self.topic, self.partition):
                self._move_on()
                return
            batch, builder = self._build(producer)
            if not batch:
                continue
            number = next_number(producer, self.topic, self.partition)
            producer.client._topics.add(self.topic)  # a new one knows of none
            try:
                future = await producer.send_batch(builder, self.topic, partition=self.partition)
                offset = (await self._in_time(future, producer)).offset
            except asyncio.CancelledError:
                if asked_to_stop():
                    self._fail(batch, Closed("The producer was closed while this was sent."))
                    raise
                await self._again(batch, producer, kafka.KafkaConnectionError("the client library gave it up"))
            except CLIENT_ERRORS as error:
                await self._failed(batch, producer, number, error)
            except Exception as error:  # the library's own: whoever waits is told, and sends again
                failed = [*batch, *self.waiting]
                self.waiting.clear()
                self._fail(failed, client_error(error, self._publisher.settings))
                raise
            else:
                self._confirm(batch, offset)

    async def _in_time(self, future: asyncio.Future[Any], producer: Any) -> Any:
        """What comes of it; whether the topic is still there is looked at when that takes long."""
        timer = asyncio.get_running_loop().call_later(LATE, self._wonder, future, producer)
        try:
            return await future
        finally:
            timer.cancel()
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

    def _wonder(self, future: asyncio.Future[Any], producer: Any) -> None:
        self._watch = asyncio.create_task(self._look_after(future, producer), name="streamtools-late")

    async def _look_after(self, future: asyncio.Future[Any], producer: Any) -> None:
        """The library sends to a topic that was deleted for ever, and to the next one of that name: end that."""
        looks = Topics(producer.client, self._publisher.settings)
        pause = LATE
        while not future.done():
            with suppress(*TROUBLE):  # nothing is known while no broker answers
                if (error := await self._is_gone(looks)) is not None:
                    pause = PAUSE  # it may be on its way just now, and then comes back to where it can be ended
                    fail_batches(producer, self.topic, self.partition, error)
            await asyncio.sleep(pause)

    async def _is_gone(self, looks: Topics) -> Exception | None:
        """What to end its batches with, where the topic or the partition is not there any more."""
        found = (await looks.look([self.topic], {self.topic: self.partition + 1})).get(self.topic)
        error: Exception | None = None
        if found is None:
            error = kafka.UnknownTopicOrPartitionError()
        elif found.is_short_of(self.partition + 1):
            error = kafka.NotLeaderForPartitionError()
        return error

    def _build(self, producer: Any) -> tuple[list[ProducerRecord], Any]:
        builder = producer.create_batch()
        add, waiting = builder.append, self.waiting
        batch: list[ProducerRecord] = []
        number = most = self._portions.next(len(waiting))
        while number:
            item = waiting[0]
            number -= 1
            if item.pending.given_up:
                item.pending.room.free(waiting.popleft().size)
                continue
            try:  # as `append` does, which would be one more call for each message
                if add(timestamp=item.timestamp, key=item.key, value=item.value, headers=item.headers) is None:
                    number += 1
                    break
            except UNWRITABLE as error:
                waiting.popleft().fail(unwritable(error))
            else:
                batch.append(waiting.popleft())
        self._portions.taken(most - number)
        builder.close()
        return batch, builder

    def _confirm(self, batch: list[ProducerRecord], offset: int) -> None:
        partition, self._failures = self.partition, 0
        pending, number, size = batch[0].pending, 0, 0
        for item in batch:
            item.partition = partition
            item.offset = offset if offset >= 0 else None
            offset += 1
            if item.pending is not pending:  # they come in runs
                pending.room.free(size)
                pending.done(number)
                pending, number, size = item.pending, 0, 0
            number += 1
            size += item.size
        pending.room.free(size)
        pending.done(number)

    async def _failed(self, batch: list[ProducerRecord], producer: Any, number: int, error: BaseException) -> None:
        partitions = self._publisher.partitions
        partitions.look_again(producer.client.cluster)
        if partitions.lacks(self.topic, self.partition):  # it was made anew, with fewer
            self.waiting.extendleft(reversed(batch))
            return
        if isinstance(error, REFUSALS):
            rewind(producer, self.topic, self.partition, number)
        if isinstance(error, RECORD_REFUSALS) and len(batch) > 1:
            self._portions.halve(len(batch))
            self.waiting.extendleft(reversed(batch))
        elif isinstance(error, REFUSALS):
            self._refuse(batch, error)
        elif isinstance(error, kafka.UnknownTopicOrPartitionError):
            partitions.forget(self.topic)
            waiting = [*batch, *self.waiting]
            self.waiting.clear()
            self._refuse(waiting, self._deleted())
            await self._publisher.renew(producer)
        else:
            await self._again(batch, producer, error)

    def _move_on(self) -> None:
        """There is no such partition any more: what waits goes to where its key is now."""
        log.warning(
            "The topic %r was deleted and made anew while messages were sent to it, with %s partition(s).",
            self.topic,
            self._publisher.partitions.count(self.topic),
        )
        waiting = list(self.waiting)
        self.waiting.clear()
        self._publisher.distribute(waiting)

    def _deleted(self) -> Missing:
        count = self._publisher.partitions.count(self.topic)
        return Missing(
            f"the topic {self.topic!r} was deleted while messages were sent to it. Make it again, as it was: "
            f"streamtools queues create {self.topic} --partitions {count}"
        )

    async def _again(self, batch: list[ProducerRecord], producer: Any, error: BaseException) -> None:
        """Send it once more, before all others, by a new producer, as long as somebody waits for it."""
        level = logging.WARNING if not self._failures else logging.DEBUG  # said once
        log.log(
            level, "A batch of %d for %s-%d is sent again: %s", len(batch), self.topic, self.partition, plain(error)
        )
        self.waiting.extendleft(reversed(batch))
        try:
            await self._publisher.renew(producer)
        except StreamToolsError as trouble:
            failed = list(self.waiting)
            self.waiting.clear()
            self._fail(failed, trouble)
            return
        await asyncio.sleep(min(PAUSE * 2**self._failures, LONGEST))
        self._failures = min(self._failures + 1, 10)

    def _refuse(self, batch: list[ProducerRecord], error: BaseException) -> None:
        for item in batch:
            item.fail(error)

    def _fail(self, batch: Sequence[ProducerRecord], error: BaseException) -> None:
        for item in batch:
            item.pending.room.free(item.size)
            item.pending.fail(error)


class Publisher:
    """Sends records over one idempotent producer, which is made anew after each failure.

    All who send to one Kafka share it, each by a `Sender`.

    Parameters:
        settings: where.
        client_id: as the broker shows it.
    """

    def __init__(self, settings: KafkaSettings, client_id: str) -> None:
        self.settings: KafkaSettings = settings
        self._client_id = client_id
        self._producer: Any = None
        self._reach: ConnectionMonitor | None = None
        self._lanes: dict[tuple[str, int], PartitionSender] = {}
        self.partitions: PartitionChooser = PartitionChooser(settings)
        self._renewing = asyncio.Lock()
        self._making = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._failed = False  # to connect anew
        self._closed = False

    async def open(self) -> None:
        """Connect; at once where that was done, and the last attempt to connect anew did not fail.

        Raises:
            ConnectError: no broker lets us in.
        """
        async with self._renewing:
            if self._producer is None or self._failed:
                failed, self._producer = self._producer, await self._new_producer()
                if failed is not None:
                    self._retire_later(failed)

    def what_it_waits_for(self) -> str:
        """A sentence on why something is not confirmed, as far as is known."""
        if self._reach is None or not self._reach.up:
            return f"no broker answers at {self.settings.safe_url}."
        partitions = self._producer.client.cluster._partitions
        for (topic, number), lane in self._lanes.items():
            seen = partitions.get(topic, {}).get(number)
            if lane.task is None or lane.task.done() or seen is None:
                continue
            if seen.leader < 0:
                return f"partition {number} of {topic!r} has no leader."
            if len(seen.isr) < len(seen.replicas):
                return (
                    f"of the {len(seen.replicas)} replicas of partition {number} of {topic!r} {len(seen.isr)} are in "
                    "sync, and the topic may need more (min.insync.replicas)."
                )
        return "no confirmation came, though a broker is connected."

    async def make(self, topic: Topic) -> bool:
        """Make a topic that was deleted while it was in use; False where it is there again."""
        async with self._making:  # many find out at once
            while True:
                producer = await self.producer()
                looks = Topics(producer.client, self.settings)
                try:
                    if topic.name in await looks.look([topic.name]):
                        return False
                    await looks.declare([topic], True)
                except ConnectError:
                    if producer is self._producer:
                        raise
                else:
                    return True

    @property
    def topics(self) -> Topics:
        """What looks at topics over the same connection."""
        return Topics(self._producer.client, self.settings)

    async def submit(self, batch: Sequence[ProducerRecord], room: ByteLimit, limit: int) -> UnconfirmedBatch:
        """Hand them over in order, once there is room; returns before they are confirmed.

        Parameters:
            room: of whoever sends them.
            limit: bytes of a message at most.
        """
        producer = await self.producer()
        if producer is None:
            raise Closed(CLOSED)
        batch, missing = await self.partitions.know(batch, producer)
        size = sum([item.size for item in batch])
        if room.is_short_of(size):
            await room.wait_for(size)
        if self._closed:
            raise Closed(CLOSED)
        pending = UnconfirmedBatch(len(batch), room)
        self._hand_over(batch, pending, missing, limit)
        if not batch:
            pending.done()  # it may reach nobody, and did not
        return pending

    async def close(self) -> None:
        """End; what is not confirmed by then fails."""
        self._closed = True
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self.partitions.close(), return_exceptions=True)
        error = Closed("The producer was closed before this was confirmed.")
        for lane in self._lanes.values():
            lane._fail(list(lane.waiting), error)
            lane.waiting.clear()
        producer, self._producer = self._producer, None
        for task in list(self._retiring):
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if producer is not None:
            await abandoned(producer)

    # --- lanes --------------------------------------------------------------------------------------

    def _hand_over(
        self,
        batch: Sequence[ProducerRecord],
        pending: UnconfirmedBatch,
        missing: Mapping[str, StreamToolsError],
        limit: int,
    ) -> None:
        trouble_of, choose = self.partitions.trouble, self.partitions.choose
        lane: PartitionSender | None = None
        size = 0
        for item in batch:
            item.pending = pending
            trouble = item.error
            if trouble is None and missing:
                trouble = missing.get(item.topic)
            if trouble is None and (item.size > limit or item.partition is not None):
                trouble = trouble_of(item, limit)
            if trouble is not None:
                item.refuse(trouble)
                pending.failed[item.id] = trouble
                pending.done()
                continue
            partition = choose(item)
            if lane is None or lane.partition != partition or lane.topic != item.topic:  # they come in runs
                lane = self._lane(item.topic, partition)
            lane.waiting.append(item)
            size += item.size
        pending.room.take(size)

    def distribute(self, batch: Sequence[ProducerRecord]) -> None:
        """Hand over once more what was accepted, where its topic has fewer partitions now."""
        for item in batch:
            trouble = self.partitions.trouble(item, item.size)
            if trouble is None:
                self._lane(item.topic, self.partitions.choose(item)).waiting.append(item)
            else:
                item.fail(trouble)

    def _lane(self, topic: str, partition: int) -> PartitionSender:
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = PartitionSender(self, topic, partition)
        if lane.task is None or lane.task.done():
            lane.wake()  # it begins once all of this batch is there
        return lane

    # --- producers --------------------------------------------------------------------------------

    async def producer(self) -> Any:
        """The producer to use now; None after the end."""
        if self._renewing.locked():
            async with self._renewing:
                pass
        return self._producer

    async def renew(self, failed: Any) -> None:
        """Use a new producer instead of `failed`, which ends once its last batches have."""
        async with self._renewing:
            if self._producer is not failed or self._closed:
                return
            self._producer = await self._new_producer()
            self._retire_later(failed)

    def _retire_later(self, producer: Any) -> None:
        task = asyncio.create_task(self._retire(producer))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(self, producer: Any) -> None:
        try:
            await stopped(producer, timeout=2 * self.settings.request_timeout)
        finally:
            await abandoned(producer)

    async def _new_producer(self) -> Any:
        producer = AIOKafkaProducer(
            **await connection(self.settings, self._client_id),
            enable_idempotence=True,
            max_batch_size=BATCH,
            max_request_size=self.settings.max_message + COPY_ROOM,
        )
        self._reach = ConnectionMonitor(producer.client, f"Producer {self._client_id}", self.settings)
        self._failed = True
        await started(producer, self.settings)
        self._failed = False
        return producer
