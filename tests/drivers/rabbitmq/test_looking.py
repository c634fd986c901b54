"""Looking changes nothing: whatever is looked at, how often, in which queue, by whom, beside whom."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from pamqp import commands
from pamqp.common import FieldTable

from streamtools.admin import QueueAdmin
from streamtools.drivers.rabbitmq import RabbitMQAdmin, RabbitMQConsumer, RabbitMQProducer
from streamtools.drivers.rabbitmq.looking import put_back, reader
from streamtools.drivers.rabbitmq.looking.reader import RabbitMQReader
from streamtools.engine.loop import SUSPECT
from streamtools.errors import QueueError, Reject
from streamtools.settings import RabbitMQSettings
from tests.brokers.address import ROOT, RabbitMQAddress
from tests.brokers.rabbitmq import RabbitMQNode
from tests.cli.conftest import Cli
from tests.cli.conftest import cli as cli  # noqa: PLC0414 - a fixture
from tests.faults.proxy import Proxy
from tests.faults.waiting import wait_until

pytestmark = pytest.mark.rabbitmq

#: More often than any default delivery limit, in the everyday run.
LOOKS = 25
LIMIT = {"delivery-limit": 20}

QUEUES: dict[str, FieldTable] = {
    "quorum": {"x-queue-type": "quorum"},
    "quorum with a limit": {"x-queue-type": "quorum", "x-delivery-limit": 2},
    "quorum that lets nothing come back": {"x-queue-type": "quorum", "x-delivery-limit": 0},
    "quorum, one active consumer": {"x-queue-type": "quorum", "x-single-active-consumer": True},
    "quorum with a time to live": {"x-queue-type": "quorum", "x-message-ttl": 3_600_000},
    "quorum that refuses": {"x-queue-type": "quorum", "x-max-length": 30, "x-overflow": "reject-publish"},
    "quorum that drops": {"x-queue-type": "quorum", "x-max-length": 30},
    "quorum as we made them": {
        "x-queue-type": "quorum", "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "error",
        "x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish",
    },
    "classic": {"x-queue-type": "classic"},
    "classic with priorities": {"x-queue-type": "classic", "x-max-priority": 5},
    "classic, one active consumer": {"x-queue-type": "classic", "x-single-active-consumer": True},
}  # fmt: skip


@pytest.fixture(params=["no policy", "policy"])
def with_policy(request: pytest.FixtureRequest, rabbitmq_vhost: RabbitMQAddress) -> None:
    """With and without a policy that limits deliveries."""
    if request.param == "policy":
        vhost = rabbitmq_vhost.url.rpartition("/")[2]
        policy = {"pattern": ".*", "apply-to": "queues", "definition": LIMIT}
        rabbitmq_vhost.manage("PUT", f"policies/{vhost}/limit", policy)


@pytest.fixture
async def admin(url: str) -> AsyncIterator[QueueAdmin]:
    async with RabbitMQAdmin(url=url) as opened:
        yield opened


async def fill(channel: AbstractChannel, queue: str, number: int, arguments: FieldTable, **declare: Any) -> None:
    """A queue of another program's, with messages that came in different ways and carry what copies may spoil."""
    await channel.queue_declare(queue, arguments=arguments, **({"durable": True} | declare))
    exchange = f"events-of-{queue}"
    await channel.exchange_declare(exchange, exchange_type="topic")
    await channel.queue_bind(queue, exchange, "order.#")
    for number_ in range(number):
        through_exchange = number_ % 3 == 1
        properties = commands.Basic.Properties(
            message_id=str(number_),
            headers={"n": number_, "nested": {"a": [1, None]}, "x-death": [{"queue": "elsewhere", "count": 1}]},
            priority=3,
            delivery_mode=1 + number_ % 2,
            correlation_id="c",
            content_type="text/plain",
        )
        await channel.basic_publish(
            b"%d" % number_,
            exchange=exchange if through_exchange else "",
            routing_key=f"order.{number_}" if through_exchange else queue,
            properties=properties,
        )


async def contents(channel: AbstractChannel, queue: str) -> list[tuple[Any, ...]]:
    """All that is in the queue, taken out of it, in order: with what the broker says of each."""
    found = []
    while (got := await channel.basic_get(queue, no_ack=True)).delivery.name != "Basic.GetEmpty":
        headers = dict(got.header.properties.headers or {})
        count = headers.pop("x-delivery-count", 0)
        properties = got.header.properties
        found.append((
            got.body, got.delivery.routing_key, count, headers, properties.message_id, properties.priority,
            properties.delivery_mode, properties.correlation_id, properties.content_type, properties.user_id,
            properties.expiration,
        ))  # fmt: skip
    return found


@pytest.mark.usefixtures("with_policy")
@pytest.mark.parametrize("kind", QUEUES)
async def test_a_queue_of_any_kind_is_as_it_was(url: str, foreign: AbstractChannel, kind: str) -> None:
    await fill(foreign, "looked", 30, QUEUES[kind])
    await fill(foreign, "not-looked", 30, QUEUES[kind])

    for _ in range(LOOKS):
        async with RabbitMQAdmin(url=url) as admin:
            seen = await admin.peek("looked", 7)
            assert [message.body for message in seen] == [b"%d" % number for number in range(7)]
            assert (await admin.stats("looked")).ready == 30

    if "one active" in kind and "quorum" in kind:
        return  # it gives nothing out to basic.get
    looked = await contents(foreign, "looked")
    assert looked == [
        (body, key.replace("not-looked", "looked"), *rest)
        for body, key, *rest in await contents(foreign, "not-looked")
    ]


@pytest.mark.parametrize("most", [10_000, 10])
async def test_a_queue_without_any_limit_is_as_it_was(
    foreign: AbstractChannel,
    admin: QueueAdmin,
    rabbitmq_vhost: RabbitMQAddress,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    if rabbitmq_vhost.manage("GET", "overview")["rabbitmq_version"].startswith("3."):
        pytest.skip("RabbitMQ 3 takes -1 for a limit that is exceeded at once")
    monkeypatch.setattr(reader, "MOST", most)
    await fill(foreign, "unlimited", 30, {"x-queue-type": "quorum", "x-delivery-limit": -1})

    for _ in range(LOOKS):
        assert [m.body for m in await admin.peek("unlimited", 7)] == [b"%d" % number for number in range(7)]

    assert [body for body, *_ in await contents(foreign, "unlimited")] == [b"%d" % number for number in range(30)]


@pytest.mark.usefixtures("with_policy")
async def test_each_command_that_looks_leaves_failed_messages_as_they_are(
    cli: Cli, rabbitmq_vhost: RabbitMQAddress, url: str, foreign: AbstractChannel
) -> None:
    consumer = RabbitMQConsumer("orders", url=url)

    @consumer()
    async def fail(msg: bytes) -> None:
        raise Reject("no")

    async with RabbitMQProducer("orders", url=url) as producer, consumer, RabbitMQAdmin(url=url) as admin:
        ids = [receipt.id for receipt in await producer.send_many([b"%d" % n for n in range(20)])]
        loop = asyncio.create_task(fail())
        await wait_until(lambda: _holds(admin, "error", 20))
        loop.cancel()
        await asyncio.wait({loop})

    def look() -> None:
        for _ in range(LOOKS // 5):
            for command in (
                ("errors", "list"), ("errors", "show", ids[3]), ("errors", "redrive", "--dry-run"),
                ("receive", "error", "--max", "5", "--timeout", "0.5"), ("queues", "stats", "error"), ("doctor",),
                ("errors", "purge", "--dry-run"), ("errors", "redrive", "no-such-id"),
            ):  # fmt: skip
                result = cli(*command, "--url", url)
                assert result.exit_code == 0 or command[0] == "doctor" or "no-such-id" in command, result.output

    await asyncio.to_thread(look)

    found = await contents(foreign, "error")
    assert [message_id for *_, message_id, _, _, _, _, _, _ in found] == ids
    assert {count for _, _, count, *_ in found} == {0}
    assert await contents(foreign, "streamtools.undeliverable") == []


async def _holds(admin: QueueAdmin, queue: str, number: int) -> bool:
    try:
        return (await admin.stats(queue)).ready == number
    except QueueError:
        return False


async def test_what_was_looked_at_is_no_suspect(url: str, admin: QueueAdmin) -> None:
    async with RabbitMQProducer("orders", url=url) as producer:
        await producer.send_many(range(5))
    for _ in range(LOOKS):
        await admin.peek("orders", 10)

    async with RabbitMQConsumer("orders", url=url, prefetch=5) as consumer:
        taken = await consumer.receive(5, timeout=10)
        assert all(delivery.redeliveries < SUSPECT for delivery in taken)


async def test_those_not_chosen_to_be_moved_are_as_they_were(foreign: AbstractChannel, admin: QueueAdmin) -> None:
    await fill(foreign, "source", 30, QUEUES["quorum with a limit"])
    await foreign.queue_declare("target", durable=True)

    for number in range(10):
        assert await admin.move("source", "target", where=lambda m, n=number: m.body == b"%d" % (3 * n)) == 1  # type: ignore[misc]

    left = await contents(foreign, "source")
    assert [body for body, *_ in left] == [b"%d" % number for number in range(30) if number % 3]
    assert {count for _, _, count, *_ in left} == {0}
    assert len(await contents(foreign, "target")) == 10


@pytest.mark.parametrize("kind", ["quorum with a limit", "quorum that lets nothing come back"])
async def test_a_queue_of_more_than_fits_in_hand_is_gone_through_in_parts(
    foreign: AbstractChannel, admin: QueueAdmin, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    await fill(foreign, "long", 60, QUEUES[kind])
    monkeypatch.setattr(reader, "MOST", 25)

    for _ in range(LOOKS):
        assert [m.body for m in await admin.peek("long", 7)] == [b"%d" % number for number in range(7)]

    left = await contents(foreign, "long")
    assert [body for body, *_ in left] == [b"%d" % number for number in range(60)]
    assert {count for _, _, count, *_ in left} == {0}


@pytest.mark.parametrize("most", [10_000, 10])
async def test_a_policy_that_lets_nothing_come_back_loses_nothing(
    foreign: AbstractChannel, url: str, rabbitmq_vhost: RabbitMQAddress, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    vhost = rabbitmq_vhost.url.rpartition("/")[2]
    policy = {"pattern": ".*", "apply-to": "queues", "definition": {"delivery-limit": 0}}
    rabbitmq_vhost.manage("PUT", f"policies/{vhost}/none", policy)
    await fill(foreign, "strict", 30, QUEUES["quorum"])
    monkeypatch.setattr(reader, "MOST", most)

    for _ in range(5):
        async with RabbitMQAdmin(url=url) as admin:
            assert [m.body for m in await admin.peek("strict", 7)] == [b"%d" % number for number in range(7)]

    assert [body for body, *_ in await contents(foreign, "strict")] == [b"%d" % number for number in range(30)]


@pytest.mark.parametrize("configure", [".*", "^$"])
async def test_a_stream_is_refused(
    foreign: AbstractChannel, as_user: Callable[[str, str, str], str], cli: Cli, configure: str
) -> None:
    await foreign.queue_declare("stream", durable=True, arguments={"x-queue-type": "stream"})
    await foreign.basic_publish(b"1", routing_key="stream")
    theirs = as_user(configure, ".*", ".*")

    async def is_counted() -> bool:
        return (await foreign.queue_declare("stream", passive=True)).message_count == 1

    await wait_until(is_counted)
    async with RabbitMQAdmin(url=theirs) as admin:
        with pytest.raises(QueueError, match="a stream is not a queue"):
            await admin.peek("stream")
    result = await asyncio.to_thread(cli, "errors", "list", "--queue", "stream", "--url", theirs)
    assert "a stream is not a queue" in result.output
    assert "has consumed yet" not in result.output


async def test_large_messages_are_gone_through_in_parts(
    foreign: AbstractChannel, admin: QueueAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    await foreign.queue_declare("large", durable=True, arguments=QUEUES["quorum with a limit"])
    for number in range(12):
        body = b"%d" % number + bytes(1_000_000)
        await foreign.basic_publish(body, routing_key="large")
    monkeypatch.setattr(reader, "MOST_BYTES", 3_000_000)

    for _ in range(5):
        assert [m.body[:2].strip(b"\0") for m in await admin.peek("large", 2) if m.body] == [b"0", b"1"]

    assert [body.strip(b"\0") for body, *_ in await contents(foreign, "large")] == [b"%d" % n for n in range(12)]


async def test_who_does_not_wait_sees_all_over_a_slow_network(foreign: AbstractChannel, url: str) -> None:
    await foreign.queue_declare("far", durable=True, arguments=QUEUES["quorum with a limit"])
    for number in range(30):
        await foreign.basic_publish(b"%d" % number + bytes(100_000), routing_key="far")
    settings = RabbitMQSettings.from_url(url)
    async with Proxy(*settings.addresses[0], latency=0.1) as proxy:
        far = url.replace(f":{settings.addresses[0][1]}/", f":{proxy.port}/")
        reader = RabbitMQReader("far", RabbitMQSettings.from_url(far), most=30, client_id=None)
        await reader.open()
        seen = 0
        while batch := await reader.receive(30, timeout=0):
            seen += len(batch)
        await reader.close()
    assert seen == 30


async def test_two_who_look_at_once_both_see_all(foreign: AbstractChannel, url: str) -> None:
    await fill(foreign, "shared", 30, QUEUES["quorum with a limit"])

    async def look() -> None:
        async with RabbitMQAdmin(url=url) as admin:
            for _ in range(5):
                assert len(await admin.peek("shared", 30)) == 30

    await asyncio.gather(look(), look(), look())

    assert [body for body, *_ in await contents(foreign, "shared")] == [b"%d" % number for number in range(30)]


async def test_who_finds_the_queue_being_looked_at_is_told(
    foreign: AbstractChannel, admin: QueueAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(foreign, "shared", 3, QUEUES["quorum"])
    monkeypatch.setattr(put_back, "LOCK_TIMEOUT", 0.2)
    first = admin._reader("shared", 3)
    await first.open()
    try:
        with pytest.raises(QueueError, match="Somebody else is reading the queue 'shared'"):
            await admin.peek("shared")
    finally:
        await first.close()

    assert len(await admin.peek("shared")) == 3


async def test_a_consumer_at_work_beside_it_gets_each_message_once(
    foreign: AbstractChannel, url: str, admin: QueueAdmin
) -> None:
    await foreign.queue_declare("busy", durable=True, arguments=QUEUES["quorum with a limit"])
    handled: list[int] = []
    consumer = RabbitMQConsumer("busy", url=url)

    @consumer()
    async def handle(msg: int) -> None:
        handled.append(msg)

    async with consumer, RabbitMQProducer("busy", url=url) as producer:
        loop = asyncio.create_task(handle())
        for start in range(0, 1000, 50):
            await producer.send_many(range(start, start + 50))
            await admin.peek("busy", 10)
        await wait_until(lambda: len(handled) >= 1000)
        loop.cancel()
        await asyncio.wait({loop})

    assert sorted(handled) == list(range(1000))


LOOKER = """
import asyncio, sys
from streamtools.drivers.rabbitmq import RabbitMQAdmin
async def main():
    async with RabbitMQAdmin(url=sys.argv[1]) as admin:
        print("ready", flush=True)
        while True:
            await admin.peek("killed", 5)
asyncio.run(main())
"""


async def test_to_be_killed_while_looking_loses_nothing(foreign: AbstractChannel, url: str) -> None:
    await fill(foreign, "killed", 200, QUEUES["quorum"])
    for _ in range(8):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LOOKER, url, cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        await asyncio.sleep(random.uniform(0, 0.2))  # anywhere in a look
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def all_are_back() -> bool:
        answer = await foreign.queue_declare("killed", passive=True)
        return (answer.message_count or 0) >= 200

    await wait_until(all_are_back)
    bodies = [body for body, *_ in await contents(foreign, "killed")]
    assert set(bodies) == {b"%d" % number for number in range(200)}


async def test_to_end_receive_by_ctrl_c_changes_nothing(foreign: AbstractChannel, url: str) -> None:
    await fill(foreign, "followed", 5, QUEUES["quorum with a limit"])
    for number in range(5):
        command = ("-m", "streamtools", "receive", "followed", "--follow", "--json", "--url", url)
        process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(5 + number):
            assert await asyncio.wait_for(process.stdout.readline(), 20)
        await foreign.basic_publish(b"more", routing_key="followed")
        assert await asyncio.wait_for(process.stdout.readline(), 20)
        process.send_signal(signal.SIGINT)  # it is asking for more just now
        await process.wait()

    found = await contents(foreign, "followed")
    assert [body for body, *_ in found] == [*(b"%d" % number for number in range(5)), *[b"more"] * 5]
    assert {count for _, _, count, *_ in found} == {0}


async def test_a_topic_is_kept_and_the_way_of_a_delay_is_none(
    foreign: AbstractChannel, url: str, admin: QueueAdmin
) -> None:
    async with RabbitMQConsumer("orders", url=url) as consumer, RabbitMQProducer("orders", url=url) as producer:
        await producer.send("delayed", delay=0.1)
        await foreign.queue_bind("orders", "amq.topic", "shop.#")
        [delivery] = await consumer.receive(timeout=10)  # held until then
        before = delivery.message.topic
        await delivery.release()
    await foreign.basic_publish(b"event", exchange="amq.topic", routing_key="shop.placed")
    await wait_until(lambda: _holds(admin, "orders", 2))
    for _ in range(3):
        seen = await admin.peek("orders")
        assert {(m.body, m.topic) for m in seen} == {(b"delayed", before), (b"event", "shop.placed")}

    async with RabbitMQConsumer("orders", url=url, prefetch=2) as consumer:
        taken = [*await consumer.receive(2, timeout=10), *await consumer.receive(1, timeout=2)]
        assert {(d.message.body, d.message.topic) for d in taken} == {(b"delayed", before), (b"event", "shop.placed")}


async def test_cc_routes_a_message_nowhere_again(foreign: AbstractChannel, admin: QueueAdmin) -> None:
    for name in ("to", "copy"):
        await foreign.queue_declare(name, durable=True, arguments=QUEUES["quorum with a limit"])
    properties = commands.Basic.Properties(headers={"CC": ["copy"], "BCC": ["copy"]})
    await foreign.basic_publish(b"1", routing_key="to", properties=properties)

    for _ in range(LOOKS):
        assert len(await admin.peek("to")) == 1

    [(_, key, _, headers, *_)] = await contents(foreign, "to")
    assert (key, headers) == ("to", {"CC": ["copy"]})
    assert len(await contents(foreign, "copy")) == 1


async def test_nothing_of_ours_is_left_behind(
    foreign: AbstractChannel, admin: QueueAdmin, rabbitmq_vhost: RabbitMQAddress
) -> None:
    await fill(foreign, "orders", 5, QUEUES["quorum"])
    await admin.peek("orders")

    vhost = rabbitmq_vhost.url.rpartition("/")[2]
    names = [
        row["name"] for kind in ("queues", "exchanges") for row in rabbitmq_vhost.manage("GET", f"{kind}/{vhost}")
    ]
    assert not [name for name in names if name.startswith("streamtools.look")]


async def test_a_queue_that_ends_with_its_last_consumer_outlives_a_look(
    foreign: AbstractChannel, admin: QueueAdmin
) -> None:
    await fill(foreign, "passing", 5, {}, auto_delete=True)

    for _ in range(3):
        assert len(await admin.peek("passing")) == 5
    assert (await admin.stats("passing")).ready == 5


@pytest.fixture
def as_user(rabbitmq_vhost: RabbitMQAddress) -> Callable[[str, str, str], str]:
    """Make a user with just these permissions (configure, write, read); its URL."""
    vhost = rabbitmq_vhost.url.rpartition("/")[2]

    def make(configure: str, write: str, read: str) -> str:
        name = f"u{secrets.token_hex(4)}"
        rabbitmq_vhost.manage("PUT", f"users/{name}", {"password": "p", "tags": ""})
        permissions = {"configure": configure, "write": write, "read": read}
        rabbitmq_vhost.manage("PUT", f"permissions/{vhost}/{name}", permissions)
        return rabbitmq_vhost.url.replace("guest:guest", f"{name}:p")

    return make


@pytest.mark.parametrize("kind", QUEUES)
@pytest.mark.parametrize("most", [10_000, 4])
async def test_who_may_read_and_write_but_make_nothing_can_look(
    foreign: AbstractChannel,
    as_user: Callable[[str, str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    most: int,
) -> None:
    await fill(foreign, "orders", 6, QUEUES[kind])
    monkeypatch.setattr(reader, "MOST", most)

    for _ in range(4):
        async with RabbitMQAdmin(url=as_user("^$", "^amq[.]default$", "^orders$")) as admin:
            assert len(await admin.peek("orders", 3)) == 3

    answer = await foreign.queue_declare("orders", passive=True)
    assert answer.message_count == 6
    if "quorum, one active" not in kind:  # it gives nothing out to basic.get
        found = await contents(foreign, "orders")
        assert [body for body, *_ in found] == [b"%d" % number for number in range(6)]
        assert {count for _, _, count, *_ in found} == {0}


async def test_a_queue_that_ends_with_its_last_consumer_outlives_a_look_of_who_may_make_nothing(
    foreign: AbstractChannel, as_user: Callable[[str, str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(foreign, "passing", 5, {}, auto_delete=True)
    monkeypatch.setattr(reader, "MOST", 4)

    async with RabbitMQAdmin(url=as_user("^$", "^amq[.]default$", "^passing$")) as admin:
        for _ in range(3):
            assert len(await admin.peek("passing", 2)) == 2
    assert [body for body, *_ in await contents(foreign, "passing")] == [b"%d" % number for number in range(5)]


async def test_who_may_make_an_exchange_and_not_bind_it_leaves_none_behind(
    foreign: AbstractChannel, as_user: Callable[[str, str, str], str], rabbitmq_vhost: RabbitMQAddress
) -> None:
    await fill(foreign, "orders", 6, QUEUES["quorum with a limit"])
    looks = "^streamtools[.]look[.]"

    async with RabbitMQAdmin(url=as_user(looks, "^amq[.]default$", "^orders$")) as admin:
        for _ in range(3):
            assert len(await admin.peek("orders")) == 6

    rows = rabbitmq_vhost.manage("GET", f"exchanges/{rabbitmq_vhost.url.rpartition('/')[2]}")
    assert not [row["name"] for row in rows if row["name"].startswith("streamtools.look")]
    assert [body for body, *_ in await contents(foreign, "orders")] == [b"%d" % number for number in range(6)]


async def test_who_may_not_write_is_told_and_nothing_is_counted(
    foreign: AbstractChannel, as_user: Callable[[str, str, str], str]
) -> None:
    await fill(foreign, "orders", 3, QUEUES["quorum with a limit"])

    async with RabbitMQAdmin(url=as_user("^$", "^$", "^orders$")) as admin:
        for _ in range(5):
            with pytest.raises(QueueError, match="may not write to the default exchange"):
                await admin.peek("orders")

    assert {count for _, _, count, *_ in await contents(foreign, "orders")} == {0}


async def test_a_message_of_another_user_is_looked_at(
    foreign: AbstractChannel, as_user: Callable[[str, str, str], str]
) -> None:
    await fill(foreign, "orders", 1, QUEUES["quorum with a limit"])
    properties = commands.Basic.Properties(user_id="guest", headers={"a": 1})
    await foreign.basic_publish(b"theirs", routing_key="orders", properties=properties)

    async with RabbitMQAdmin(url=as_user("streamtools[.]look[.].*", ".*", ".*")) as admin:
        for _ in range(LOOKS):
            assert [m.body for m in await admin.peek("orders")] == [b"0", b"theirs"]


@pytest.mark.slow
@pytest.mark.usefixtures("with_policy")
async def test_a_thousand_looks_at_a_thousand_failed_messages(foreign: AbstractChannel, admin: QueueAdmin) -> None:
    number = int(os.environ.get("STREAMTOOLS_TEST_LOOKS", "100"))  # 1000 takes two minutes
    await fill(foreign, "failed", number, QUEUES["quorum as we made them"])
    for _ in range(number):
        assert len(await admin.peek("failed", number)) == number

    found = await contents(foreign, "failed")
    assert [body for body, *_ in found] == [b"%d" % n for n in range(number)]
    assert {count for _, _, count, *_ in found} == {0}


async def test_the_queue_of_what_has_nowhere_to_go_forgets_nothing(
    url: str, foreign: AbstractChannel, admin: QueueAdmin
) -> None:
    async with RabbitMQConsumer("orders", url=url):  # makes all of them
        pass
    await foreign.basic_publish(b"kept", routing_key="streamtools.undeliverable")

    for _ in range(LOOKS):  # each of which the broker counts
        await wait_until(lambda: _holds(admin, "streamtools.undeliverable", 1))
        got = await foreign.basic_get("streamtools.undeliverable")
        await foreign.basic_nack(got.delivery.delivery_tag or 0, requeue=True)

    await wait_until(lambda: _holds(admin, "streamtools.undeliverable", 1))
    assert [m.body for m in await admin.peek("streamtools.undeliverable")] == [b"kept"]


async def test_one_that_stands_as_it_was_made_before_is_used(url: str, foreign: AbstractChannel) -> None:
    quorum: FieldTable = {"x-queue-type": "quorum"}
    await foreign.queue_declare("streamtools.undeliverable", durable=True, arguments=quorum)

    async with RabbitMQConsumer("orders", url=url), RabbitMQProducer("orders", url=url) as producer:
        await producer.send(1, delay=0.1)


async def test_while_the_broker_takes_no_messages_a_look_says_so_and_counts_nothing(
    own_rabbitmq: RabbitMQNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put_back, "TRIAL_TIMEOUT", 1.0)
    async with RabbitMQProducer("orders", url=own_rabbitmq.url) as producer:
        await producer.send_many(range(3))
    async with RabbitMQAdmin(url=own_rabbitmq.url) as admin:
        await asyncio.to_thread(own_rabbitmq.raise_alarm)
        try:
            for _ in range(3):
                with pytest.raises(QueueError, match="takes no messages now"):
                    await admin.peek("orders")
        finally:
            await asyncio.to_thread(own_rabbitmq.clear_alarm)
        assert [message.body for message in await admin.peek("orders")] == [b"0", b"1", b"2"]
    connection = await aiormq.connect(own_rabbitmq.url)
    assert {count for _, _, count, *_ in await contents(await connection.channel(), "orders")} == {0}
    await connection.close()
