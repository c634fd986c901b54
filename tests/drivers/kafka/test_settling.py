"""No message of a partition is lost, stuck or committed past, whatever happens to its settlement."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from streamtools import ConnectionLost, Message, SendError
from streamtools.delivery import Settlement
from streamtools.drivers.kafka.client.fetched import Fetched
from streamtools.testing import eventually
from streamtools.verdicts import ACK, RELEASE, Verdict, VerdictKind
from tests.drivers.kafka.offline import PLACE, Broker, OfflineConsumer, consumer, record

LATER = 5000.0


def delayed(offset: int, seconds: float = LATER) -> Any:
    return record(offset, Message(body=b"x", queue=PLACE.topic, id=str(offset), deliver_at=time.time() + seconds))


async def opened(broker: Broker, **options: Any) -> OfflineConsumer:
    made = consumer(broker, **options)
    await made.open()
    return made


def bodiless() -> Any:
    """Records that cannot be read."""
    yield record(0)
    raise ValueError("bytes")


# --- receiving ------------------------------------------------------------------------------------


async def test_what_cannot_be_read_is_told_at_once_though_nothing_else_comes() -> None:
    receiver = await opened(Broker([]))
    receiving = asyncio.create_task(receiver._receive(10))
    await asyncio.sleep(0.01)  # it waits, and is woken
    receiver.partition.arrive(Fetched(bodiless(), 2, 100))
    receiver._wake_up()
    assert [d.message.id for d in await asyncio.wait_for(receiving, 5)] == ["0"]
    with pytest.raises(ConnectionLost, match="bytes"):
        await asyncio.wait_for(receiver._receive(10), 5)
    receiver = await opened(Broker([]))
    receiving = asyncio.create_task(receiver._receive(10))
    await asyncio.sleep(0.01)
    records = bodiless()
    next(records)
    receiver.partition.arrive(Fetched(records, 2, 100))
    receiver._wake_up()
    with pytest.raises(ConnectionLost, match="bytes"):
        await asyncio.wait_for(receiving, 5)
    await receiver.close()


async def test_a_log_that_begins_anew_is_read_at_once_though_nothing_else_comes() -> None:
    broker = Broker([])
    broker.kept = 100, ""
    receiver = await opened(broker)
    receiving = asyncio.create_task(receiver._receive(10))
    await asyncio.sleep(0.01)
    receiver.partition.arrive(Fetched(iter([record(3), record(4)]), 5, 100))
    receiver._wake_up()
    assert [d.message.id for d in await asyncio.wait_for(receiving, 5)] == ["3", "4"]
    await receiver.close()


async def test_nothing_that_waited_is_begun_of_a_partition_that_goes() -> None:
    receiver = await opened(Broker([delayed(0, 0.1)]))
    receiver.poll_timeout = 0.01  # type: ignore[misc]
    assert await receiver.receive(10, timeout=0.01) == []
    due = receiver.partition.not_due.next_due
    receiver.partition.revoking = True
    await eventually(lambda: time.time() > due)
    assert await receiver.receive(10, timeout=0.01) == []
    receiver.partition.revoking = False
    assert len(await receiver.receive(10)) == 1
    await receiver.close()


# --- moving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_what_is_refused_keeps_no_other_from_being_moved(exactly_once: bool) -> None:
    broker = Broker([delayed(n) for n in range(5)])
    broker.troubles = [{"2"}]
    receiver = await opened(broker, exactly_once=exactly_once)
    assert await receiver.receive(10, timeout=0.01) == []
    await eventually(lambda: sorted(broker.sent) == ["0", "1", "3", "4"])
    await eventually(lambda: list(receiver.partition.offsets.pending) == [2])
    assert exactly_once or receiver.member.commits._now.is_set()  # else a crash sends them twice
    await receiver.member.commits.commit()
    assert broker.kept[0] == 2 and len(receiver.partition.not_due) == 1
    await receiver.close()


# --- settling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_a_delivery_whose_copy_is_refused_is_in_hand_again(exactly_once: bool) -> None:
    broker = Broker([record(0), record(1)])
    receiver = await opened(broker, exactly_once=exactly_once)
    first, second = await receiver.receive(10)
    broker.troubles = [{"0"}]
    with pytest.raises(SendError):
        await first.retry()
    await second.ack()
    assert receiver.partition.offsets.position == 0
    await first.retry()
    await first.retry()  # the second verdict
    assert broker.sent == ["0"] and receiver.partition.offsets.position == 2
    await receiver.close()


async def test_a_settlement_that_is_cancelled_leaves_the_delivery_in_hand() -> None:
    broker = Broker([record(0)])
    receiver = await opened(broker)
    [delivery] = await receiver.receive(10)
    broker.troubles = ["never"]
    settling = asyncio.create_task(delivery.reject("no"))
    await eventually(lambda: not broker.troubles)
    assert receiver.partition.settling == 1 and receiver.partition.in_hand == []
    settling.cancel()
    await asyncio.wait({settling})
    assert receiver.partition.settling == 0 and receiver.partition.in_hand == [delivery]
    await delivery.ack()
    assert receiver.partition.offsets.position == 1
    await receiver.close()


async def test_what_is_being_settled_is_not_settled_by_anyone_else() -> None:
    broker = Broker([record(0)])
    receiver = await opened(broker)
    [delivery] = await receiver.receive(10)
    broker.troubles = ["never"]
    settling = asyncio.create_task(delivery.reject("no"))
    await eventually(lambda: not broker.troubles)
    await receiver._ack([delivery])
    await receiver._settle([Settlement(delivery, ACK)])
    assert receiver.partition.offsets.position == 0
    settling.cancel()
    await asyncio.wait({settling})
    await receiver.close()


@pytest.mark.parametrize("release", [RELEASE, Verdict(VerdictKind.RELEASE)], ids=["ours", "a handler's own"])
@pytest.mark.parametrize("exactly_once", [False, True])
async def test_what_is_given_back_beside_a_copy_comes_again(exactly_once: bool, release: Verdict) -> None:
    broker = Broker([record(0), record(1), record(2)])
    receiver = await opened(broker, exactly_once=exactly_once)
    first, second, third = await receiver.receive(10)
    copy = Settlement(second, Verdict.retry(0), (second.message,))
    await receiver._settle([Settlement(first, release), copy, Settlement(third, ACK)])
    assert list(receiver.partition.offsets.pending) == [0] and broker.sent == ["1"]
    [again] = await receiver.receive(10, timeout=5)
    await again.ack()
    assert receiver.partition.offsets.position == 3
    await receiver.close()


@pytest.mark.parametrize("exactly_once", [False, True])
async def test_only_the_delivery_given_last_is_in_hand(exactly_once: bool) -> None:
    broker = Broker([record(0)])
    receiver = await opened(broker, exactly_once=exactly_once)
    [old] = await receiver.receive(10)
    await receiver._settle([Settlement(old, Verdict(VerdictKind.RELEASE))])
    await receiver._ack([old])
    [new] = await receiver.receive(10)
    assert new is not old and new.message is old.message
    await receiver._ack([old])
    for verdict in (ACK, RELEASE):
        await receiver._settle([Settlement(old, verdict)])
    assert (
        receiver.partition.offsets.position == 0
        and receiver.partition.in_hand == [new]
        and not receiver._settler.returned
    )
    await receiver.ack_many([new, new])
    assert receiver.partition.offsets.position == 1
    assert receiver.partition.offsets.uncommitted == (0 if exactly_once else 1)  # a transaction has committed it
    await receiver.close()


async def test_a_verdict_about_what_was_taken_away_changes_nothing() -> None:
    broker = Broker([record(0), record(1)])
    receiver = await opened(broker)
    first, second = await receiver.receive(10)
    gone = receiver.partition
    receiver.member._let_go()
    receiver.assign()
    await first.ack()
    await second.reject("no")
    await receiver.member.commits.commit()
    assert gone.offsets.position == 0 and broker.kept[0] == 0 and broker.sent == []
    assert [d.message.id for d in await receiver.receive(10)] == ["0", "1"]
    await receiver.close()


@pytest.mark.parametrize("trouble", ["lost", "late"])
async def test_after_a_transaction_whose_fate_is_open_the_partition_is_read_anew(trouble: str) -> None:
    broker = Broker([record(0), record(1)])
    receiver = await opened(broker, exactly_once=True)
    first, second = await receiver.receive(10)
    broker.troubles = [None, trouble]  # it is sent; the commit fails, before or after Kafka has it
    with pytest.raises(ConnectionLost):
        await first.retry()
    with pytest.raises(ConnectionLost):
        await second.ack()
    again = await receiver.receive(10, timeout=1)
    assert [d.message.id for d in again] == (["1"] if trouble == "late" else ["0", "1"])
    for delivery in again:
        await delivery.retry()
    assert not await receiver.receive(10, timeout=0.01)
    assert broker.sent == ["0", "1"] and broker.kept[0] == 2
    await receiver.close()


# --- what is told, and what is passed over --------------------------------------------------------


async def test_what_is_finished_is_committed_soon_whoever_has_finished_it() -> None:
    broker = Broker([record(n) for n in range(3)])
    receiver = await opened(broker)
    [first, second] = await receiver.receive(2)
    await receiver.ack_many([second])
    assert receiver.member.commits._timer is not None
    await receiver.member.commits.commit()
    receiver.member._let_go()
    receiver.member.commits._timer.cancel()
    receiver.member.commits._timer = None
    receiver.assign()
    again = await receiver.receive(3)
    assert [d.message.id for d in again] == ["0", "2"] and receiver.member.commits._timer is not None
    await receiver.close()


async def test_what_was_given_back_is_not_given_out_once_its_partition_is_gone() -> None:
    receiver = await opened(Broker([record(0)]))
    [delivery] = await receiver.receive(1)
    await delivery.release()
    receiver.member._let_go()
    receiver.assign()
    [again] = await receiver.receive(5)
    assert again.partition is receiver.partition  # type: ignore[attr-defined]
    await again.release()
    receiver.partition.revoking = True
    assert await receiver.receive(5, timeout=0.01) == []
    await receiver.close()


async def test_what_has_expired_is_finished_and_not_handed_over() -> None:
    stale = record(0, Message(body=b"x", queue=PLACE.topic, id="0", expires_at=time.time() - 9))
    receiver = await opened(Broker([stale, record(1)]))
    [fresh] = await receiver.receive(5)
    assert fresh.message.id == "1" and receiver.partition.offsets.position == 1
    await receiver.close()


async def test_who_is_cancelled_while_what_has_expired_is_dropped_gives_the_rest_back() -> None:
    stale = record(0, Message(body=b"x", queue=PLACE.topic, id="0", expires_at=time.time() - 9))
    broker = Broker([stale, record(1)])
    broker.troubles = ["never"]
    receiver = await opened(broker, exactly_once=True)
    receiving = asyncio.create_task(receiver.receive(5))
    await eventually(lambda: not broker.troubles)
    receiving.cancel()
    await asyncio.wait({receiving})
    assert [d.offset for d in receiver._settler.returned] == [1]
    await receiver.close()
