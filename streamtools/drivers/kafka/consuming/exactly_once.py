"""TransactionalPublisher: what settlements send and their offsets, in one transaction (`exactly_once=True`)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from aiokafka import errors as kafka

from streamtools.delivery import Settlement
from streamtools.drivers.kafka.consuming.copies import Copies
from streamtools.drivers.kafka.consuming.delays import DelayedRecord
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, PartitionTransactions, delivery_of
from streamtools.drivers.kafka.consuming.retries import Reject, RetryPublisher
from streamtools.drivers.kafka.producing.record import ProducerRecord, not_held, refused
from streamtools.drivers.kafka.producing.transactions import TransactionalProducer, opened
from streamtools.engine.replies import lost_replies
from streamtools.errors import ConnectError, ConnectionLost, SendError
from streamtools.settings import KafkaSettings
from streamtools.verdicts import ACK


class TransactionalPublisher(RetryPublisher):
    """Makes one transaction at a time for each partition.

    Parameters:
        client_id: the consumer's; its producers show it with a suffix.
    """

    def __init__(self, settings: KafkaSettings, copies: Copies, member: GroupMember, client_id: str) -> None:
        super().__init__(settings, copies)
        self._member = member
        self._client_id = f"{client_id}-publishing"
        self._producers: set[TransactionalProducer] = set()

    async def settle(self, settlements: Sequence[Settlement], done: list[Settlement], reject: Reject) -> None:
        """Send the messages of these settlements and commit them, in one transaction for each partition."""
        done += [s for s in settlements if s.verdict.kind.gives_back]
        by_partition: dict[AssignedPartition, list[Settlement]] = {}
        for settlement in settlements:
            if not settlement.verdict.kind.gives_back:
                by_partition.setdefault(delivery_of(settlement).partition, []).append(settlement)
        for partition, batch in by_partition.items():
            await self._settle_partition(partition, batch, done, reject)

    async def _settle_partition(
        self, partition: AssignedPartition, batch: list[Settlement], done: list[Settlement], reject: Reject
    ) -> None:
        copies = [(s, item) for s in batch for item in self._copies.of(s)]
        try:
            await self.transact(partition, {delivery_of(s).offset for s in batch}, [item for _, item in copies])
        except SendError as error:
            error.messages = not_held([m for s in batch for m in s.outgoing], [item for _, item in copies])
            ids = {id(s) for s, item in copies if item.error is not None}
            bad = [s for s in batch if id(s) in ids]
            good = [s for s in batch if id(s) not in ids]
            if not bad:
                raise  # no single message was refused
            if good:
                await self._settle_partition(partition, good, done, reject)
            for settlement in bad:
                own = [item for s, item in copies if s is settlement]
                await self._reject(partition, settlement, own, error, reject)
                done.append(settlement)
        else:
            done += batch

    async def _reject(
        self,
        partition: AssignedPartition,
        settlement: Settlement,
        copies: Sequence[ProducerRecord],
        error: SendError,
        reject: Reject,
    ) -> None:
        """Reject a message because Kafka refuses what its handler has sent.

        Raises:
            SendError: `error`, if what is refused is not the handler's.
        """
        if settlement.verdict is not ACK:
            raise error
        refusal = refused({c.id: c.error for c in copies if c.error is not None}, self._settings)
        refusal.messages = [m for m in settlement.outgoing if any(m is each for each in error.messages)]
        if lost_replies(settlement.outgoing, refusal):
            raise error  # settled by itself it goes without its reply: a refused reply is not the handler's failure
        instead = reject(settlement, refusal)
        await self.transact(partition, {delivery_of(settlement).offset}, self._copies.of(instead))

    async def forward(self, batch: Sequence[DelayedRecord]) -> None:
        """Send copies of what is not due to the retry topic, and commit the records, for each partition."""
        for partition in {delayed.partition for delayed in batch}:
            own = [delayed for delayed in batch if delayed.partition is partition]
            copies = [self._copies.delayed(delayed) for delayed in own]
            await self.transact(partition, {delayed.record.offset for delayed in own}, copies)

    async def pass_over(self, partitions: Collection[AssignedPartition]) -> None:
        """Commit the positions: offsets that are no messages have no transaction of their own."""
        for partition in partitions:
            await self.transact(partition, (), ())

    async def transact(
        self, partition: AssignedPartition, offsets: Collection[int], items: Sequence[ProducerRecord]
    ) -> None:
        """Send `items` and commit that `offsets` are finished, in one transaction."""
        transactions = _transactions(partition)
        async with transactions.lock:
            try:
                producer = await self._get_producer(partition, transactions)
                await producer.begin()
                changes = await self._send_and_commit(partition, producer, offsets, items)
            except SendError:
                raise
            except BaseException as error:
                await self.release([partition])
                if partition.revoked and isinstance(error, ConnectError):
                    return  # the next owner of the partition repeats what was not committed
                if isinstance(error.__cause__, kafka.OffsetMetadataTooLargeError):
                    self._member.commits.limit //= 2
                if not (
                    partition.revoked or partition.revoking
                ):  # the consumer connects anew, also if the user settles
                    self._member.fail(ConnectionLost(f"A transaction of {partition!r} failed: it is read anew."))
                raise
            for offset in offsets:
                partition.offsets.finish(offset)
            partition.offsets.committed(changes + len(offsets))

    async def _send_and_commit(
        self,
        partition: AssignedPartition,
        producer: TransactionalProducer,
        offsets: Collection[int],
        items: Sequence[ProducerRecord],
    ) -> int:
        """Perform a transaction that was begun; returns `Offsets.changes` as it was committed, without `offsets`."""
        try:
            if items:
                await producer.send(items)
        except SendError:
            await producer.abort()
            if producer.broken:
                await self.release([partition])
            raise
        changes = partition.offsets.changes
        at, metadata, whole = partition.offsets.commit(self._member.commits.limit, also=offsets)
        adding = producer.add_offsets({partition.place: (at, metadata)}, self._member.group)
        await self._member.unless_deleted(adding, [partition.place])
        await producer.commit()
        partition.metadata_full = not whole
        return changes

    async def _get_producer(
        self, partition: AssignedPartition, transactions: PartitionTransactions
    ) -> TransactionalProducer:
        if self._closed or partition.revoked:
            raise ConnectionLost("The partition is no longer ours.")
        if transactions.producer is None:
            if transactions.identity is None:
                raise ConnectionLost(f"A transaction of {partition!r} failed: it is read anew.")
            name = self._member.transactional_id(partition.place)
            # The identity serves once: after a failure the partition is read anew, from what is committed then.
            identity, transactions.identity = transactions.identity, None
            made = TransactionalProducer(self._settings, name, self._client_id, identity=identity)
            self._producers.add(made)
            transactions.producer = await opened(made, self._settings)
        return transactions.producer

    async def release(self, partitions: Collection[AssignedPartition]) -> None:
        """Close the producers of these partitions."""
        for partition in partitions:
            transactions = _transactions(partition)
            producer, transactions.producer = transactions.producer, None
            if producer is not None:
                self._producers.discard(producer)
                await producer.close()

    async def close(self) -> None:
        """Close all producers."""
        self._closed = True
        producers, self._producers = self._producers, set()
        await asyncio.gather(*(producer.close() for producer in producers))


def _transactions(partition: AssignedPartition) -> PartitionTransactions:
    assert partition.transactions is not None
    return partition.transactions
