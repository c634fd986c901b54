"""The commands on a real Kafka: partitions, retention, groups and places."""

from __future__ import annotations

import asyncio
import re
import secrets
import signal
from collections.abc import Callable

import pytest
from typer.testing import Result

from streamtools import Consumer, Producer, QueueAdmin
from streamtools.cli import output
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.kafka.tools import group_rows, kafka_tool
from tests.cli.conftest import Cli, Service, fail_messages, lines, received
from tests.drivers.kafka.raw import produce_raw

pytestmark = pytest.mark.real_kafka("admin calls")


@pytest.fixture
def url(kafka: KafkaAddress) -> str:
    return kafka.url


@pytest.fixture
def queue(cli: Cli, url: str) -> str:
    """A topic of the test's own, with ten messages in two partitions."""
    name = f"orders-{secrets.token_hex(4)}"
    assert cli("queues", "create", name, "--partitions", "2", "--replication", "1").exit_code == 0
    producer = Producer(name, url=url)

    async def fill() -> None:
        async with producer:
            for partition in (0, 1):
                await producer.send_many(["x"] * 5, partition=partition)

    asyncio.run(fill())
    return name


def test_a_topic_is_made_with_its_partitions(cli: Cli, queue: str, kafka: KafkaAddress) -> None:
    assert "PartitionCount: 2" in kafka_tool(kafka.bootstrap, "kafka-topics", "--describe", "--topic", queue)
    again = cli("queues", "create", queue, "--partitions", "3")
    assert (again.exit_code, again.stdout) == (1, "")
    assert f"queues alter {queue} --partitions" in again.stderr


def test_alter_changes_what_is_given_and_tells_what_holds(cli: Cli, queue: str, kafka: KafkaAddress) -> None:
    done = cli("queues", "alter", queue, "--partitions", "4", "--retention", "forever", "--yes")
    assert done.stdout == f"{queue}: 4 partitions, kept forever.\n"
    [told] = lines(
        cli("queues", "alter", queue, "--retention", "12h", "--retention-bytes", "64MiB", "--yes", "--json")
    )
    assert told == {
        "altered": queue, "partitions": 4, "replication": 1, "retention": 43200.0, "retention_bytes": 67108864
    }  # fmt: skip
    text = kafka_tool(kafka.bootstrap, "kafka-topics", "--describe", "--topic", queue)
    assert "PartitionCount: 4" in text
    assert "retention.ms=43200000" in text


@pytest.mark.parametrize("change", [["--partitions", "4"], ["--retention", "1h"], ["--retention-bytes", "1MB"]])
def test_what_cannot_be_undone_is_asked_first(cli: Cli, queue: str, change: list[str]) -> None:
    refused = cli("queues", "alter", queue, *change)
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert lines(cli("queues", "alter", queue, "--retention", "forever", "--json"))[0]["partitions"] == 2


def test_fewer_partitions_are_refused_and_it_says_so(cli: Cli, queue: str) -> None:
    refused = cli("queues", "alter", queue, "--partitions", "1", "--yes")
    assert refused.exit_code == 1
    assert "2 partitions, and Kafka takes none away" in refused.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--retention", "soon"), ("--retention", "5 parsecs"), ("--retention-bytes", "1XB")]
)
def test_an_amount_that_cannot_be_read_ends_with_2(cli: Cli, queue: str, option: str, value: str) -> None:
    refused = cli("queues", "alter", queue, option, value)
    assert refused.exit_code == 2
    assert "cannot be read" in refused.stderr


def test_altering_nothing_ends_with_2(cli: Cli, queue: str) -> None:
    assert cli("queues", "alter", queue).exit_code == 2


def test_seek_asks_and_moves_the_group(
    cli: Cli, queue: str, kafka: KafkaAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "at_terminal", lambda: True)
    refused = cli("queues", "seek", queue, "--to", "end", stdin="n\n")
    assert refused.exit_code == 1
    assert "has read nothing there yet" in refused.stderr
    assert group_rows(kafka.bootstrap, queue, queue) == {}
    assert cli("queues", "seek", queue, "--to", "end", stdin="y\n").exit_code == 0
    assert group_rows(kafka.bootstrap, queue, queue) == {0: (5, 5, 0), 1: (5, 5, 0)}
    again = cli("queues", "seek", queue, "--to", "2", "--partition", "1", stdin="y\n")
    assert "to 2 of" in again.stderr
    assert "is 0 behind now" in again.stderr
    assert again.stdout.endswith(f"{queue}: the group '{queue}' is 3 behind.\n")
    assert group_rows(kafka.bootstrap, queue, queue) == {0: (5, 5, 0), 1: (2, 5, 3)}


@pytest.mark.parametrize(("place", "committed"), [("1h", 0), ("0s", 5), ("2020-01-31T08:00", 0), ("beginning", 0)])
def test_a_place_may_be_a_time(cli: Cli, queue: str, kafka: KafkaAddress, place: str, committed: int) -> None:
    [group] = lines(cli("queues", "seek", queue, "--to", place, "--group", f"g-{queue}", "--yes", "--json"))
    assert [p["committed"] for p in group["partitions"]] == [committed, committed]
    assert {row[0] for row in group_rows(kafka.bootstrap, f"g-{queue}", queue).values()} == {committed}


def test_stats_show_the_lag_of_each_group(cli: Cli, queue: str) -> None:
    name = f"g-{queue}"
    for place in (["--to", "end"], ["--to", "1", "--partition", "0"]):
        assert cli("queues", "seek", queue, *place, "--group", name, "--yes").exit_code == 0
    [[info]] = lines(cli("queues", "stats", queue, "--json"))
    assert info["ready"] == 10
    [group] = info["groups"]
    assert (group["name"], group["lag"]) == (name, 4)
    table = cli("queues", "stats", queue).stdout
    assert info["oldest"] > 0
    assert re.search(rf"{queue} +{name} +0 +1 +5 +4 +-", table)


def test_a_queue_without_places_says_so(cli: Cli) -> None:
    for command in (["seek", "orders", "--to", "end", "--yes"], ["alter", "orders", "--partitions", "2"]):
        refused = cli("queues", *command, "--url", "asyncio://")
        assert refused.exit_code == 2
        assert "kafka://" in refused.stderr


# --- failed messages ----------------------------------------------------------------------------

#: Messages that failed, half of them "odd".
MANY = 400


@pytest.fixture
def failed(url: str) -> str:
    """A queue whose messages have all failed; its error queue is `<queue>.error`."""
    name = f"orders-{secrets.token_hex(4)}"
    payloads: list[object] = ["odd" if number % 2 else "even" for number in range(MANY)]
    fail_messages(url, name, payloads, ValueError, error_queue=f"{name}.error")
    return name


def waiting(cli: Cli, queue: str) -> int:
    return int(lines(cli("queues", "stats", queue, "--json"))[0][0]["ready"])


def test_failed_messages_are_listed_with_why_and_where_and_stay(cli: Cli, failed: str, kafka: KafkaAddress) -> None:
    errors = ("--queue", f"{failed}.error", "--json")
    for _ in range(2):
        [[group]] = lines(cli("errors", "list", *errors))
        assert (group["queue"], group["exception"], group["count"]) == (failed, "ValueError", MANY)
    [shown] = lines(cli("errors", "show", *errors, "--limit", "1"))
    assert shown["error"]["reason"] == "no luck with even"
    assert re.fullmatch(r"partition 0, offset \d+", shown["error"]["place"])
    assert re.search(r"place: +partition 0, offset \d+\n", cli("errors", "show", *errors[:2], "--limit", "1").stdout)
    assert group_rows(kafka.bootstrap, f"{failed}.error", f"{failed}.error") == {}


def test_those_chosen_go_back_once_and_the_others_stay(cli: Cli, failed: str, url: str) -> None:
    errors = ("--queue", f"{failed}.error", "--json")
    assert lines(cli("errors", "redrive", *errors, "--filter", "reason='with odd'", "--yes")) == [
        {"redriven": MANY // 2}
    ]
    assert waiting(cli, f"{failed}.error") == MANY // 2
    assert lines(cli("errors", "list", *errors))[0][0]["count"] == MANY // 2
    back = received(url, failed)
    assert len({message.id for message in back}) == len(back) == MANY // 2
    assert {message.body for message in back} == {b"odd"}
    assert lines(cli("errors", "purge", *errors, "--yes")) == [{"forgotten": MANY // 2}]
    assert waiting(cli, f"{failed}.error") == 0


def test_a_redrive_that_is_killed_loses_nothing(
    cli: Cli, failed: str, url: str, start: Callable[..., Service]
) -> None:
    first = start("errors", "redrive", "--queue", f"{failed}.error", "--yes")
    first.wait_until(lambda: waiting(cli, failed) > 0 or first.process.poll() is not None)
    first.end(signal.SIGKILL)
    cli("errors", "redrive", "--queue", f"{failed}.error", "--json", "--yes")
    assert waiting(cli, f"{failed}.error") == 0
    back = received(url, failed)
    assert len({message.id for message in back}) == MANY
    assert len(back) <= MANY + 100  # what was under way at once


def test_records_as_no_client_writes_them_are_shown_and_sent_back(
    cli: Cli, failed: str, kafka: KafkaAddress, url: str
) -> None:
    headers = [(b"\xff\xfename", b"\xff"), (b"null", None), (b"ce_errorqueue", failed.encode())]
    rows = [(b"\x00\x00\x00*", b"\xff", headers, 0), (b"\xff\xfe", None, headers, 1)]
    asyncio.run(produce_raw(kafka, f"{failed}.error", rows))
    errors = ("--queue", f"{failed}.error")
    for command in ("list", "show"):
        for options in ((), ("--json",)):
            shown = cli("errors", command, *errors, *options)
            assert shown.exit_code == 0, shown.stderr
    assert r"\xff\xfename" in cli("errors", "show", *errors, "--limit", "1000").stdout
    assert lines(cli("errors", "redrive", *errors, "--json", "--yes")) == [{"redriven": MANY + 2}]
    back = {message.key: message.body for message in received(url, failed)}
    assert (back[b"\x00\x00\x00*"], back[b"\xff\xfe"]) == (b"\xff", None)


def test_receive_without_ack_looks_beside_a_group_that_is_at_work(
    cli: Cli, queue: str, kafka: KafkaAddress, url: str
) -> None:
    async def look() -> Result:
        async with Consumer(queue, url=url, declare=False) as consumer, QueueAdmin(url=url) as admin:
            held = await consumer.receive(10, timeout=20)
            while len(held) < 10:
                held += await consumer.receive(10 - len(held), timeout=20)
            before = await admin.groups(queue)
            shown = await asyncio.to_thread(cli, "receive", queue, "--json")
            assert await admin.groups(queue) == before
            await asyncio.gather(*(delivery.ack() for delivery in held))  # it still holds them
            return shown

    assert [message["text"] for message in lines(asyncio.run(look()))] == ["x"] * 10
    assert group_rows(kafka.bootstrap, queue, queue) == {0: (5, 5, 0), 1: (5, 5, 0)}
    assert lines(cli("receive", queue, "--json", "--timeout", "0")) == []


def test_receive_without_ack_makes_no_group_and_moves_none(cli: Cli, queue: str, kafka: KafkaAddress) -> None:
    for _ in range(3):
        assert len(lines(cli("receive", queue, "--json", "--timeout", "0"))) == 10
    assert group_rows(kafka.bootstrap, queue, queue) == {}


def test_receive_without_ack_follows_what_arrives(
    cli: Cli, queue: str, kafka: KafkaAddress, start: Callable[..., Service]
) -> None:
    service = start("receive", queue, "--follow", "--json")
    service.wait_until(lambda: service.output.count('"text": "x"') == 10)
    cli("send", queue, "new")
    service.wait_until(lambda: '"text": "new"' in service.output)
    assert service.end() == 0
    assert group_rows(kafka.bootstrap, queue, queue) == {}


def test_receive_of_a_topic_that_is_not_there_says_so(cli: Cli, url: str) -> None:
    refused = cli("receive", "nowhere", "--timeout", "0")
    assert refused.exit_code == 1
    assert "There is no topic 'nowhere'" in refused.stderr


def test_a_redrive_comes_into_no_other_group_s_retries(cli: Cli, failed: str, kafka: KafkaAddress, url: str) -> None:
    other = f"{failed}-payouts"
    fail_messages(url, other, ["x"], ValueError, error_queue=f"{other}.error")
    cli("queues", "create", f"{other}.retry")
    planted = [
        (b"ce_errorqueue", failed.encode()),
        (b"streamtools-group", other.encode()),
        (b"streamtools-retries", f"{other}.retry".encode()),
    ]
    asyncio.run(produce_raw(kafka, f"{failed}.error", [(None, b'"planted"', planted, 0)]))
    before = waiting(cli, other)
    result = cli("errors", "redrive", "--queue", f"{failed}.error", "--json", "--from", failed, "--yes")
    assert lines(result) == [{"redriven": MANY + 1}]
    assert waiting(cli, other) == before
    assert b'"planted"' in {message.body for message in received(url, failed)}
