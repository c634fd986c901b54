"""Where replies may go, what they tell, and whose answer is believed."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from typing import Any

import pytest

from streamtools import Bus, ConfigurationError, Consumer, Message, MessageContext, Producer, RemoteError, Retry
from streamtools.bus.requests import FAILURE
from streamtools.engine.outbox import Outbox
from streamtools.producer import PRODUCERS
from streamtools.testing.waiting import eventually, reaches
from tests.bus.conftest import MakeBus
from tests.bus.contracts import PlaceOrder, Quote

#: Addresses that get no reply on any protocol.
NOWHERE = ["", "\n", "a\0b", "http://127.0.0.1:1/x?y=1", "streamtools.bindings", "Streamtools.delay.3", "error"]
#: Error queues of other services: what lies there is taken for what has failed.
NOWHERE += ["payouts.error", "payouts-error", "a.payouts_error"]
#: Those that get none on one protocol.
NOWHERE_ON = {
    "rabbitmq": ["amq.topic", "streamtools.undeliverable"],
    "kafka": ["__consumer_offsets", "prices.retry", "prices.retry.billing", "..", "a/b", "x" * 250],
}


def request(queue: str, reply_to: str, number: int) -> Message:
    """A request as another program could write it."""
    return Message(
        body=b'{"id": %d}' % number,
        queue=queue,
        id=secrets.token_hex(8),
        type="prices.Quote",
        content_type="application/json",
        intent="request",
        reply_to=reply_to,
    )


async def send(url: str, queue: str, *messages: Message) -> None:
    async with Producer(queue, url=url, declare=False) as producer:
        await producer.send_messages(messages)


class TestWhereRepliesMayGo:
    async def test_a_reply_that_may_not_go_costs_its_request_nothing(
        self, make: MakeBus, url: str, failed: Any, nothing_waits: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        runs: list[int] = []
        gone = [f"gone-{secrets.token_hex(4)}"]
        addresses = [*NOWHERE, *NOWHERE_ON.get(PRODUCERS.protocol(url), ()), *gone]
        prices = make("prices", retry=Retry(retries=1, delay=0, jitter=0))

        @prices.handler
        async def quote(command: Quote, context: MessageContext) -> int:
            runs.append(command.id)
            if command.id % 4 == 1:
                raise ValueError("unlucky")
            if command.id % 4 == 2:
                await context.reply("by hand")
            if command.id % 4 == 3:
                await prices.reply("by the bus")
            return command.id

        await prices.start()
        numbers = range(4 * len(addresses))
        await send(url, "prices", *(request("prices", addresses[n // 4], n) for n in numbers))
        await eventually(lambda: set(runs) == set(numbers), "each is run", timeout=30)
        rejected = await failed(len(addresses))
        await nothing_waits("prices")
        assert sorted(runs) == sorted([*numbers, *(n for n in numbers if n % 4 == 1)])
        assert all(m.intent == "request" and m.error.reason == "unlucky" for m in rejected)
        lines = [r for r in caplog.records if "is not answered" in r.message]
        assert len(lines) == 4 * (len(addresses) - len(gone))

    async def test_replies_narrows_the_addresses(
        self, make: MakeBus, url: str, waiting: Any, depth: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        runs: list[int] = []
        prices = make("prices", replies=["*.replies.*", "billing"])

        @prices.handler
        async def quote(command: Quote) -> int:
            runs.append(command.id)
            return command.id

        await prices.start()
        for queue in ("billing", "payments"):
            await make(queue).declare()
        await send(url, "prices", request("prices", "payments", 1), request("prices", "billing", 2))
        [reply] = await waiting("billing", 1)
        assert (reply.body, reply.intent) == (b"2", "reply")
        await reaches(runs, 2)
        assert await make(None).request(Quote(id=3), timeout=20) == 3
        assert await depth("payments") == 0
        assert "'payments' fits none of replies=['*.replies.*', 'billing']" in caplog.text

    @pytest.mark.parametrize("patterns", ["*.replies.*", [""], [7], 7])
    def test_patterns_that_are_none_are_refused(self, patterns: Any) -> None:
        with pytest.raises(ConfigurationError, match="replies="):
            Bus("prices", url="asyncio://", replies=patterns)

    async def test_a_route_answers_no_error_queue_either(self, caplog: pytest.LogCaptureFixture) -> None:
        runs: list[Any] = []
        async with Consumer("asked", url="asyncio://") as consumer, Producer("asked", url="asyncio://") as producer:

            @consumer()
            async def answer(msg: dict[str, Any]) -> str:
                runs.append(msg)
                return "an answer"

            task = asyncio.create_task(answer())
            await producer.send({"id": 1}, reply_to="error")
            await reaches(runs, 1)
            await eventually(lambda: "'error' takes no replies" in caplog.text)
            task.cancel()


class TestWhatAFailureTells:
    async def test_the_class_alone(self, make: MakeBus) -> None:
        prices = make("prices")

        @prices.handler
        async def quote(command: Quote) -> None:
            raise ConnectionError("postgresql://app:S3cret@db refused us")

        await prices.start()
        with pytest.raises(RemoteError, match="failed at 'prices': ConnectionError") as caught:
            await make(None).request(Quote(id=1), timeout=20)
        assert (caught.value.exception, caught.value.reason) == ("ConnectionError", "")
        assert "S3cret" not in str(caught.value)

    async def test_not_the_contracts_of_the_service(self, make: MakeBus) -> None:
        prices = make("prices")
        prices.register(PlaceOrder, lambda command: None)
        await prices.start()
        with pytest.raises(RemoteError) as caught:
            await make(None).request({"id": 1}, "prices", type="prices.PlaceOder", timeout=20)
        assert "PlaceOrder" not in str(caught.value)

    async def test_the_text_too_where_the_service_says_so(self, make: MakeBus) -> None:
        prices = make("prices", failure_texts=True)

        @prices.handler
        async def quote(command: Quote) -> None:
            raise ValueError("unlucky")

        await prices.start()
        with pytest.raises(RemoteError, match="failed at 'prices': ValueError: unlucky"):
            await make(None).request(Quote(id=1), timeout=20)

    async def test_a_result_that_cannot_be_sent_is_told_and_not_computed_again(
        self, make: MakeBus, nothing_waits: Any
    ) -> None:
        runs: list[int] = []
        prices = make("prices", retry=Retry(retries=3, delay=0, jitter=0))

        @prices.handler
        async def quote(command: Quote) -> object:
            runs.append(command.id)
            return object()

        await prices.start()
        with pytest.raises(RemoteError, match="TypeError"):
            await make(None).request(Quote(id=1), timeout=20)
        await nothing_waits("prices")
        assert runs == [1]


class TestWhoseAnswerIsBelieved:
    async def test_ids_of_requests_and_addresses_of_replies_cannot_be_guessed(self, make: MakeBus) -> None:
        seen: list[Message] = []
        prices, orders = make("prices", concurrency=5), make("orders")

        @prices.handler
        async def quote(command: Quote, message: Message) -> int:
            seen.append(message)
            return command.id

        @orders.handler
        async def place(command: PlaceOrder) -> None:
            for number in range(3):
                await orders.request(Quote(id=number), timeout=20)

        await prices.start()
        await orders.start()
        asker = make(None)
        for number in range(3):
            await asker.request(Quote(id=number), timeout=20)
        await asker.send(PlaceOrder(id=1))
        await reaches(seen, 6)
        for each in seen:
            assert len(each.id) == 32
            assert len({m.id[:8] for m in seen}) == 6  # nothing in common
            assert len((each.reply_to or "").rpartition(".")[2]) == 32
        # Within a handler it derives from the incoming message, and from a secret of the process.
        incoming = Message(body=b"", id="known", queue="prices")
        assert Outbox(incoming, "h").id("prices", b"q") == Outbox(incoming, "h").id("prices", b"q")
        code = "from streamtools import Message; from streamtools.engine.outbox import Outbox; "
        code += "print(Outbox(Message(body=b'', id='known', queue='prices'), 'h').id('prices', b'q'))"
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        out, _ = await other.communicate()
        assert out.strip()
        assert out.decode().strip() != Outbox(incoming, "h").id("prices", b"q")

    async def test_answers_of_others_are_dropped_with_a_log_line(
        self, make: MakeBus, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        begun, go = asyncio.Event(), asyncio.Event()
        asked: list[Message] = []
        prices = make("prices", concurrency=2)

        @prices.handler
        async def quote(command: Quote, message: Message) -> int:
            asked.append(message)
            begun.set()
            await go.wait()
            return command.id

        await prices.start()
        asker = make("asker")
        asking = asyncio.create_task(asker.request(Quote(id=1), timeout=60))
        await begun.wait()
        [real] = asked
        assert real.reply_to is not None
        forged = [
            {"causation_id": "1" * 32, "correlation_id": real.correlation_id},  # of another request
            {"causation_id": None, "correlation_id": "1" * 32},
            {"causation_id": None, "correlation_id": None, "id": real.id},
            {"causation_id": real.id[:-1] + "x", "correlation_id": real.id, "type": FAILURE},
        ]
        with caplog.at_level(logging.INFO, "streamtools"):
            for fields in forged:
                reply = Message(body=b"666", queue=real.reply_to, id=secrets.token_hex(8), intent="reply")
                await send(url, real.reply_to, reply.replace(**fields))
            await eventually(lambda: caplog.text.count("nobody asked for it") == len(forged), timeout=20)
        assert not asking.done()
        go.set()
        assert await asking == 1
