"""What a consumer sends: retries, rejected messages, what its handlers send; plainly, or in transactions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aiokafka import errors as kafka

from streamtools.delivery import Settlement, goes_last
from streamtools.drivers.kafka.consuming.delays import level_of
from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition, delivery_of
from streamtools.drivers.kafka.producing.record import ProducerRecord, not_held, records_of
from streamtools.drivers.kafka.producing.record import refused as refused_error
from streamtools.drivers.kafka.producing.sender import Sender
from streamtools.drivers.kafka.producing.transactions import TransactionalProducer, opened
from streamtools.drivers.kafka.records import (
    COPY_ROOM,
    GROUP,
    QUEUE,
    RETRIES,
    Header,
    decode_origin,
    header_texts,
    now_ms,
)
from streamtools.engine.replies import lost_replies
from streamtools.errors import Closed, ConnectError, ConnectionLost, SendError
from streamtools.message import Message
from streamtools.settings import KafkaSettings
from streamtools.verdicts import ACK, VerdictKind

#: A record that is not due, with its partition and its message.
Waiting = tuple[AssignedPartition, Any, Message]


class RetryPublisher:
    """Sends for one membership.

    Parameters:
        queue: the consumer's own.
        retry_topic: where retries of the group wait.
        tiers: the partitions of that topic; 0 where it does not exist.
        sender_id: the name by which it shares the client that sends plainly.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        client_id: str,
        membership: GroupMember,
        *,
        queue: str,
        retry_topic: str,
        tiers: int,
        sender_id: str | None = None,
    ) -> None:
        self._settings = settings
        self._sender_id = sender_id
        self._client_id = f"{client_id}-publishing"
        self._membership = membership
        self._queue = queue
        self._retry_topic = retry_topic
        self._tiers = tiers
        self._sender: Sender | None = None
        self._opening = asyncio.Lock()
        self._transactionals: set[TransactionalProducer] = set()
        self._closed = False

    # --- plainly ----------------------------------------------------------------------------------

    async def settle(self, mine: Sequence[Settlement], done: list[Settlement]) -> None:
        """Send what these send; `done` gets those of which Kafka holds all.

        Raises:
            SendError: some were refused.
            ConnectError: the connection ended; nothing is known.
        """
        held, refused = await self._publish(mine, last=False)
        if held:
            held, more = await self._publish(held, last=True)
            refused = refused or more  # the others are tried again, and then say so themselves
        done += held
        if refused is not None:
            kept = {id(s) for s in held}
            unsent = [m for s in mine if id(s) not in kept for m in s.outgoing if goes_last(m, s)]
            refused.unknown = (*refused.unknown, *(m.id for m in unsent))
            refused.messages = (*refused.messages, *unsent)
            raise refused

    async def _publish(self, mine: Sequence[Settlement], *, last: bool) -> tuple[list[Settlement], SendError | None]:
        """Send what is to go first, or last; those of which none was refused, and the refusal."""
        messages = [(s, m) for s in mine for m in s.outgoing if goes_last(m, s) is last]
        copies = [self._copy(*each) for each in messages]
        try:
            if copies:
                await (await self._get_sender()).publish(copies)
        except SendError as error:
            error.messages = not_held([m for _, m in messages], copies)
            refused = {id(s) for (s, _), item in zip(messages, copies, strict=True) if item.error is not None}
            return [s for s in mine if id(s) not in refused], error
        return list(mine), None

    async def move(self, batch: Sequence[Waiting]) -> None:
        """Move what is not due to where it waits, and finish it where it was.

        Raises:
            SendError: some were refused.
            ConnectError: the connection ended; nothing is known.
        """
        if batch[0][0].exactly is not None:
            for track in {track for track, _, _ in batch}:
                own = [(record, message) for t, record, message in batch if t is track]
                copies = [self._waiting(track, record, message) for record, message in own]
                await self._transact(track, {record.offset for record, _ in own}, copies)
            return
        await (await self._get_sender()).publish([self._waiting(*each) for each in batch])
        for track, record, _ in batch:
            track.offsets.finish(record.offset)

    async def _get_sender(self) -> Sender:
        async with self._opening:
            if self._closed:
                raise Closed("The consumer was closed.")
            if self._sender is None:
                sender = Sender(self._settings, self._sender_id, room=COPY_ROOM)
                try:
                    await sender.open()
                except BaseException:
                    await sender.close()
                    raise
                self._sender = sender
            return self._sender

    # --- in transactions --------------------------------------------------------------------------

    async def settle_exactly(
        self,
        mine: Sequence[Settlement],
        done: list[Settlement],
        reject: Callable[[Settlement, SendError], Settlement],
    ) -> None:
        """Send what these send, and commit them, in one transaction for each partition.

        Parameters:
            reject: makes the settlement of one whose handler has sent what Kafka refuses.
        """
        done += [s for s in mine if s.verdict.kind is VerdictKind.RELEASE]
        tracks: dict[AssignedPartition, list[Settlement]] = {}
        for settlement in mine:
            if settlement.verdict.kind is not VerdictKind.RELEASE:
                tracks.setdefault(delivery_of(settlement).track, []).append(settlement)
        for track, batch in tracks.items():
            await self._settle_track(track, batch, done, reject)

    async def _settle_track(
        self,
        track: AssignedPartition,
        batch: list[Settlement],
        done: list[Settlement],
        reject: Callable[[Settlement, SendError], Settlement],
    ) -> None:
        copies = [(s, item) for s in batch for item in self._copies(s)]
        try:
            await self._transact(track, {delivery_of(s).offset for s in batch}, [item for _, item in copies])
        except SendError as error:
            error.messages = not_held([m for s in batch for m in s.outgoing], [item for _, item in copies])
            refused = {id(s) for s, item in copies if item.error is not None}
            bad = [s for s in batch if id(s) in refused]
            good = [s for s in batch if id(s) not in refused]
            if not bad:
                raise  # of none of these alone
            if good:
                await self._settle_track(track, good, done, reject)
            for settlement in bad:
                if settlement.verdict is not ACK:
                    raise
                why = {item.id: item.error for s, item in copies if s is settlement and item.error is not None}
                refusal = refused_error(why, self._settings)
                refusal.messages = [m for m in settlement.outgoing if any(m is each for each in error.messages)]
                if lost_replies(settlement.outgoing, refusal):
                    raise  # settled by itself it goes without them: that its reply was refused is not its failure
                instead = reject(settlement, refusal)
                await self._transact(track, {delivery_of(settlement).offset}, self._copies(instead))
                done.append(settlement)
        else:
            done += batch

    async def pass_over(self, tracks: Collection[AssignedPartition]) -> None:
        """Commit that these were read up to where they are: what is no message has no transaction of its own."""
        for track in tracks:
            await self._transact(track, (), ())

    async def _transact(
        self, track: AssignedPartition, offsets: Collection[int], items: Sequence[ProducerRecord]
    ) -> None:
        """Send `items`, and commit that `offsets` are finished, as one."""
        async with track.lock:
            try:
                transactional = await self._get_transactional(track)
                await transactional.begin()
                changes = await self._one(track, transactional, offsets, items)
            except SendError:
                raise
            except BaseException as error:
                await self.release([track])
                if track.gone and isinstance(error, ConnectError):
                    return  # someone else has the partition, and repeats what was not committed
                if isinstance(error.__cause__, kafka.OffsetMetadataTooLargeError):
                    self._membership.limit //= 2
                if not (track.gone or track.going):  # whoever receives connects anew; by hand, nobody else would
                    self._membership.fail(ConnectionLost(f"A transaction of {track!r} failed: it is read anew."))
                raise
            for offset in offsets:
                track.offsets.finish(offset)
            track.offsets.committed(changes + len(offsets))

    async def _one(
        self,
        track: AssignedPartition,
        transactional: TransactionalProducer,
        offsets: Collection[int],
        items: Sequence[ProducerRecord],
    ) -> int:
        """What was finished, by the count of `Offsets.changes`, beside `offsets`."""
        try:
            if items:
                await transactional.send(items)
        except SendError:
            await transactional.abort()
            if transactional.broken:
                await self.release([track])
            raise
        changes = track.offsets.changes
        at, metadata, whole = track.offsets.commit(self._membership.limit, also=offsets)
        adding = transactional.add_offsets({track.partition: (at, metadata)}, self._membership.group)
        await self._membership.unless_gone(adding, [track.partition])
        await transactional.commit()
        track.full = not whole
        return changes

    async def _get_transactional(self, track: AssignedPartition) -> TransactionalProducer:
        if self._closed or track.gone:
            raise ConnectionLost("The partition is no longer ours.")
        if track.transactional is None:
            if track.identity is None:
                raise ConnectionLost(f"A transaction of {track!r} failed: it is read anew.")
            name = self._membership.transactional_id(track.partition)
            # Our identity serves once: after a failure the partition is read anew, from what is committed then.
            identity, track.identity = track.identity, None
            made = TransactionalProducer(self._settings, name, self._client_id, identity=identity)
            self._transactionals.add(made)
            track.transactional = await opened(made, self._settings)
        return track.transactional

    async def release(self, tracks: Collection[AssignedPartition]) -> None:
        """Let go of what makes their transactions."""
        for track in tracks:
            transactional, track.transactional = track.transactional, None
            if transactional is not None:
                self._transactionals.discard(transactional)
                await transactional.close()

    async def close(self) -> None:
        """Let go of everything."""
        self._closed = True
        sender, self._sender = self._sender, None
        ends = [one.close() for one in self._transactionals]
        self._transactionals.clear()
        if sender is not None:
            ends.append(sender.close())
        await asyncio.gather(*ends)

    # --- copies -----------------------------------------------------------------------------------

    def _copies(self, settlement: Settlement) -> list[ProducerRecord]:
        return [self._copy(settlement, message) for message in settlement.outgoing]

    def _copy(self, settlement: Settlement, message: Message) -> ProducerRecord:
        kind = settlement.verdict.kind
        record = settlement.delivery.token if message.id == settlement.delivery.message.id else None
        if kind is VerdictKind.RETRY and message.queue == settlement.delivery.message.queue:
            return self._retry(message, self._history(settlement, message), record)
        headers = self._history(settlement, message) if kind is VerdictKind.REJECT else []
        [item] = records_of([message], headers=headers, read=_headers(record))
        item.is_copy = kind in (VerdictKind.RETRY, VerdictKind.REJECT)
        return item

    def _history(self, settlement: Settlement, message: Message) -> list[Header]:
        """Where it was read first, and who has rejected it."""
        delivery = delivery_of(settlement)
        if message.error is not None and message.error is delivery.message.error:
            # An error queue's own consumer has failed: what brought the message there stays with it.
            return [*delivery.origin.headers, *_rejected_by(delivery.token)]
        group = self._group_headers if settlement.verdict.kind is VerdictKind.REJECT else ()
        return [*delivery.origin.headers, *group]

    @property
    def _group_headers(self) -> list[Header]:
        """Who has rejected it, and by which way it can come back to this group alone."""
        group = (GROUP, self._membership.group.encode())
        return [group, (RETRIES, self._retry_topic.encode())] if self._tiers else [group]

    def _waiting(self, track: AssignedPartition, record: Any, message: Message) -> ProducerRecord:
        if track.is_retry:
            queue = header_texts(record.headers, (QUEUE,)).get(QUEUE, self._queue)
            message = message.replace(queue=queue)
        headers = [*decode_origin(record, track.partition).headers, *_rejected_by(record)]
        return self._retry(message, headers, record)

    def _retry(self, message: Message, headers: list[Header], record: Any) -> ProducerRecord:
        """To this group alone: into the tier for its delay."""
        delay = 0.0 if message.deliver_at is None else message.deliver_at - time.time()
        [item] = records_of([message], headers=[*headers, (QUEUE, message.queue.encode())], read=_headers(record))
        item.topic, item.partition, item.timestamp = self._retry_topic, level_of(delay, self._tiers), now_ms()
        item.is_copy = True
        return item


def _headers(record: Any) -> Sequence[Header]:
    """What stands beside what was read; nothing that matters where the record was not kept."""
    return () if record is None else record.headers


def _rejected_by(record: Any) -> list[Header]:
    return [(name, value) for name, value in _headers(record) if name in (GROUP, RETRIES)]
