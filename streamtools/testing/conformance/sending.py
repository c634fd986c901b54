"""Cases of sending: which messages arrive, are confirmed, and are refused."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from typing import Any

import pytest

from streamtools.errors import Closed, ConfigurationError, FeatureError, QueueError, SendError, StreamToolsError
from streamtools.message import Message
from streamtools.testing.conformance.cases import Cases, except_with, needs
from streamtools.testing.conformance.payloads import BODIES, HEADERS, NAMES, PAYLOADS
from streamtools.testing.conformance.stage import Envelopes, Gate, Inbox, Stage, gather
from streamtools.testing.waiting import eventually

#: Sends at once.
MANY = 1000
#: Seconds by which clocks of one machine may differ: RabbitMQ's timers count whole milliseconds.
TICK = 0.002
#: No times: not finite, in milliseconds, beyond all calendars.
NEVER = [math.nan, math.inf, -math.inf, 1.7e12, -1e300]


class SendingCases(Cases):
    """The promises of a producer."""

    @pytest.mark.parametrize("kind", PAYLOADS)
    async def test_a_payload_comes_back_as_it_was_sent(self, stage: Stage, kind: str) -> None:
        payload, expected = PAYLOADS[kind]
        inbox = Inbox()
        async with stage.running(inbox):
            await stage.send(payload)
            [got] = await inbox.holds(1)
        assert got == expected
        assert type(got) is type(expected)

    @pytest.mark.parametrize("kind", BODIES)
    async def test_any_bytes_arrive_untouched(self, stage: Stage, kind: str) -> None:
        inbox = Envelopes()
        async with stage.running(inbox):
            await stage.send(BODIES[kind])
            [message] = await inbox.holds(1)
        assert message.body == BODIES[kind]

    async def test_headers_of_any_text_arrive_exactly(self, stage: Stage) -> None:
        inbox = Envelopes()
        async with stage.running(inbox):
            await stage.send("body", headers=HEADERS)
            [message] = await inbox.holds(1)
        assert dict(message.headers) == HEADERS
        assert (message.body, message.attempt) == (b"body", 1)

    async def test_metadata_arrives_beside_the_body(self, stage: Stage) -> None:
        inbox = Envelopes()
        producer = await stage.producer(client_id="shop-7")
        before = time.time()
        async with stage.running(inbox, client_id="warehouse-1"):
            await stage.send(
                {"a": 1}, by=producer, id="id-ü-1", type="orders.Placed", key="k/1", correlation_id="c 1",
                reply_to="answers", ttl=1000,
            )  # fmt: skip
            [message] = await inbox.holds(1)
        assert message.body == b'{"a":1}'
        assert message.content_type is not None and message.content_type.startswith("application/json")
        assert (message.id, message.type, message.key) == ("id-ü-1", "orders.Placed", "k/1")
        assert (message.correlation_id, message.reply_to, message.source) == ("c 1", "answers", "shop-7")
        assert (message.queue, message.attempt, message.error) == (stage.queue, 1, None)
        # Whole seconds are all that some protocols carry natively.
        assert message.time is not None and before - 1 <= message.time <= time.time()
        assert message.expires_at == pytest.approx(message.time + 1000, abs=1.5)

    async def test_the_receipt_names_the_message(self, stage: Stage) -> None:
        inbox = Envelopes()
        async with stage.running(inbox):
            receipts = [*await (await stage.send(1)), *await (await stage.send(2, id="mine"))]
            messages = await inbox.holds(2)
        assert [r.id for r in receipts] == [m.id for m in messages]
        assert receipts[1].id == "mine"
        assert [r.queue for r in receipts] == [stage.queue] * 2

    async def test_send_many_sends_each_in_order(self, stage: Stage) -> None:
        inbox = Inbox()
        async with stage.running(inbox):
            receipts = await (await stage.send_many(range(50)))
            assert await inbox.holds(50) == list(range(50))
        assert len({receipt.id for receipt in receipts}) == 50
        assert await (await stage.producer()).send_many([]) == []

    async def test_a_thousand_sends_at_once_all_arrive_once(self, stage: Stage) -> None:
        inbox = Inbox()
        producer = await stage.producer()
        async with stage.running(inbox, concurrency=20, prefetch=MANY):
            receipts = await gather(*(producer.send(number) for number in range(MANY)))
            await inbox.holds(MANY)
        assert Counter(inbox.items) == Counter(range(MANY))
        assert len({receipt.id for receipt in receipts}) == MANY

    async def test_several_producers_reach_one_consumer(self, stage: Stage) -> None:
        inbox = Inbox()
        producers = [await stage.producer() for _ in range(4)]
        async with stage.running(inbox, concurrency=4):
            await gather(*(p.send_many(range(start, 100, 4)) for start, p in enumerate(producers)))
            await inbox.holds(100)
        assert sorted(inbox.items) == list(range(100))

    async def test_send_opens_by_itself(self, stage: Stage) -> None:
        inbox = Inbox()
        async with stage.running(inbox):
            await stage.send("hello", by=stage.new_producer())
            assert await inbox.holds(1) == ["hello"]

    async def test_a_payload_without_a_form_is_refused_and_the_producer_lives(self, stage: Stage) -> None:
        inbox = Inbox()
        producer = await stage.producer()
        with pytest.raises(TypeError, match="object"):
            await producer.send(object())
        async with stage.running(inbox):
            await stage.send("next", by=producer)
            assert await inbox.holds(1) == ["next"]

    # --- closing --------------------------------------------------------------------------------

    async def test_send_after_close_raises_and_open_opens_again(self, stage: Stage) -> None:
        producer = await stage.producer()
        await producer.close()
        await producer.close()
        with pytest.raises(Closed):
            await producer.send(1)
        inbox = Inbox()
        async with stage.running(inbox):
            await producer.open()
            await stage.send(2, by=producer)
            assert await inbox.holds(1) == [2]

    async def test_many_may_close_at_once(self, stage: Stage) -> None:
        producer, consumer = await stage.producer(), await stage.consumer()
        await gather(*(producer.close() for _ in range(5)), *(consumer.close() for _ in range(5)))

    async def test_when_the_producer_closes_every_send_under_way_ends(self, stage: Stage) -> None:
        gate, producer = Gate(), await stage.producer()
        async with stage.running(gate, concurrency=10):
            sends = [asyncio.create_task(producer.send(number)) for number in range(10)]
            await gate.holds(1)
            await producer.close()
            ends = await gather(asyncio.gather(*sends, return_exceptions=True))
            gate.opened.set()
        assert all(not isinstance(end, BaseException) or isinstance(end, StreamToolsError) for end in ends[0])

    async def test_a_cancelled_send_leaves_the_producer_usable(self, stage: Stage) -> None:
        inbox, producer = Inbox(), await stage.producer()
        async with stage.running(inbox):
            for _ in range(5):
                sending = asyncio.create_task(producer.send("cancelled"))
                await asyncio.sleep(0)
                sending.cancel()
                await asyncio.wait({sending})
            await stage.send("sent", by=producer)
            await eventually(lambda: "sent" in inbox.items)
        assert inbox.items.count("sent") == 1 and inbox.items.count("cancelled") <= 5

    # --- names ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", NAMES)
    async def test_a_name_is_taken_as_it_is_or_refused_at_once(self, stage: Stage, kind: str) -> None:
        names = [f"{stage.queue}.{name}" for name in NAMES[kind]]
        inboxes = Envelopes(), Envelopes()
        try:
            producers = [stage.new_producer(name) for name in names]
        except ConfigurationError:
            with pytest.raises(ConfigurationError):
                [stage.new_consumer(name) for name in names]
            return
        try:
            for producer in producers:
                await producer.open()
        except QueueError:  # refused beside the other: to Kafka they are alike
            return
        options = {"delay": 0.02} if self.features.delay else {}
        async with stage.running(inboxes[0], names[0]), stage.running(inboxes[1], names[1]):
            for name, producer in zip(names, producers, strict=True):
                await stage.send(name, by=producer)
                await stage.send(name, by=producer, **options)
            for name, inbox in zip(names, inboxes, strict=True):
                messages = await inbox.holds(2)
                assert [(m.body.decode(), m.queue) for m in messages] == [(name, name)] * 2

    # --- queues that are missing ----------------------------------------------------------------

    @needs("missing_queue")
    async def test_a_missing_queue_refuses_what_is_sent_to_it(self, stage: Stage) -> None:
        async with stage.running(Inbox(), f"{stage.queue}-other"):
            producer = await stage.producer(declare=False)
            with pytest.raises(SendError, match=stage.queue) as caught:
                await producer.send(1, id="lost")
        assert caught.value.refused == ("lost",)

    @needs("missing_queue")
    @except_with("listens", "a call has no queue that could be checked before")
    async def test_a_missing_queue_is_an_error_when_it_is_only_checked(self, stage: Stage) -> None:
        with pytest.raises(QueueError, match=stage.queue):
            await stage.producer(declare="passive")
        with pytest.raises(QueueError, match=stage.queue):
            await stage.consumer(declare="passive")
        await stage.consumer()
        await stage.consumer(declare="passive")
        await stage.producer(declare="passive")

    @needs("missing_queue")
    async def test_of_a_batch_refused_in_part_all_that_is_not_named_has_arrived(self, stage: Stage) -> None:
        inbox, producer = Inbox(), await stage.producer()
        batch = [
            Message(body=b"1", queue=stage.queue, id="good 1", content_type="application/json"),
            Message(body=b"2", queue=f"{stage.queue}-missing", id="bad", content_type="application/json"),
            Message(body=b"3", queue=stage.queue, id="good 2", content_type="application/json"),
        ]
        async with stage.running(inbox):
            with pytest.raises(SendError) as caught:
                await producer.send_messages(batch)
            error = caught.value
            await stage.send(4, by=producer)
            await eventually(lambda: 4 in inbox.items)
        assert "bad" in error.refused and not error.unknown
        assert inbox.items == [n for n, m in enumerate(batch, 1) if m.id not in error.refused] + [4]

    @needs("missing_queue")
    async def test_a_refusal_has_the_messages_themselves_where_several_have_the_same_id(self, stage: Stage) -> None:
        inbox, producer = Inbox(), await stage.producer()
        batch = [
            Message(body=b"1", queue=stage.queue, id="same", content_type="application/json"),
            Message(body=b"2", queue=f"{stage.queue}-missing", id="same", content_type="application/json"),
            Message(body=b"3", queue=stage.queue, id="other", content_type="application/json"),
        ]
        async with stage.running(inbox):
            with pytest.raises(SendError) as caught:
                await producer.send_messages(batch)
            left = caught.value.messages
            await stage.send(4, by=producer)
            await eventually(lambda: 4 in inbox.items)
        assert any(batch[1] is each for each in left) and not any(batch[0] is each for each in left)
        assert inbox.items == [n for n, m in enumerate(batch, 1) if not any(m is each for each in left)] + [4]

    # --- time -----------------------------------------------------------------------------------

    async def test_a_message_with_a_time_that_is_none_is_refused_by_itself(self, stage: Stage) -> None:
        inbox, producer = Inbox(), await stage.producer()
        fields: list[dict[str, Any]] = [{}]
        fields += [{field: value} for field in ("deliver_at", "expires_at") for value in NEVER]
        batch = [
            Message(body=b"%d" % n, queue=stage.queue, id=f"{n}", content_type="application/json", **each)
            for n, each in enumerate([*fields, {}])
        ]
        async with stage.running(inbox):
            with pytest.raises(SendError, match=r"deliver_at=nan is no time of the years 1 to 9999") as caught:
                await producer.send_messages(batch)
            await eventually(lambda: len(inbox.items) == 2)
        assert inbox.items == [0, len(fields)]
        assert caught.value.messages == tuple(batch[1:-1])
        assert caught.value.refused == caught.value.unfit == tuple(message.id for message in batch[1:-1])

    @pytest.mark.parametrize("option", ["delay", "ttl"])
    async def test_a_span_of_time_that_is_none_is_refused_at_once(self, stage: Stage, option: str) -> None:
        producer = await stage.producer()
        wrong: list[Any] = [math.nan, math.inf, -math.inf, -1, "", []]
        for value in wrong:
            with pytest.raises(ConfigurationError, match=option):
                await producer.send(1, **{option: value})

    @needs("delay")
    async def test_a_delayed_message_is_never_early_and_holds_up_nobody(self, stage: Stage) -> None:
        seen: dict[str, float] = {}

        async def note(msg: str) -> None:
            seen[msg] = time.time()

        async with stage.running(note):
            start = time.time()
            await stage.send("late", delay=1.5)  # the first delayed message takes a while to send on some brokers
            await stage.send("earlier", delay=0.25)
            await stage.send("now")
            await eventually(lambda: len(seen) == 3)
        assert list(seen)[2] == "late"
        assert seen["earlier"] - start >= 0.25 - TICK
        assert seen["late"] - start >= 1.5 - TICK

    @needs("delay")
    async def test_a_delayed_message_waits_for_a_consumer_that_has_not_come(self, stage: Stage) -> None:
        producer = await stage.producer()
        start = time.time()
        await stage.send("later", by=producer, delay=0.2)
        await producer.close()
        consumer = await stage.consumer()
        [delivery] = await stage.take(consumer, 1)
        assert time.time() - start >= 0.2 - TICK
        assert (delivery.message.body, delivery.message.attempt) == (b"later", 1)
        await delivery.ack()

    async def test_a_delay_that_the_protocol_cannot_hold_is_refused_at_once(self, stage: Stage) -> None:
        if self.features.delay:
            pytest.skip(f"{self.protocol!r} says delay=True")
        producer = await stage.producer()
        with pytest.raises(FeatureError, match="delay"):
            await producer.send(1, delay=5)

    @needs("expiry")
    async def test_an_expired_message_is_not_handled(self, stage: Stage) -> None:
        gate = Gate()
        async with stage.running(gate):
            await stage.send("first")
            await gate.holds(1)
            await stage.send("stale", ttl=0.05)
            await stage.send("fresh", ttl=60)
            expired = time.time() + 0.1
            await eventually(lambda: time.time() > expired)
            gate.opened.set()
            await eventually(lambda: "fresh" in gate.left)
        assert gate.left == ["first", "fresh"]

    @needs("expiry")
    @except_with("reply", "its sender waits for the answer")
    async def test_an_expired_message_is_not_handed_over_by_hand_either(self, stage: Stage) -> None:
        consumer = await stage.consumer()
        await stage.send("stale", ttl=0.05)
        await stage.send("fresh", ttl=60)
        expired = time.time() + 0.1
        await eventually(lambda: time.time() > expired)
        [delivery] = await stage.take(consumer, 1)
        assert delivery.message.body == b"fresh"
        await delivery.ack()
        assert await consumer.receive(timeout=0) == []
        await consumer.close()
        await stage.nothing_waits()

    # --- replies --------------------------------------------------------------------------------

    @needs("reply")
    async def test_the_handlers_value_is_the_answer(self, stage: Stage) -> None:
        async with stage.running(Inbox(lambda msg: {"double": 2 * msg})):
            [receipt] = await (await stage.send(21))
        answer: Any = receipt
        assert answer.json() == {"double": 42}
