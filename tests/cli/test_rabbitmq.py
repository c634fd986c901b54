"""The commands on a real RabbitMQ, where looking, moving and closing take their time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.conftest import Cli, fail_messages, lines, received

pytestmark = pytest.mark.rabbitmq
#: More single acknowledgements than a quorum queue takes at once (32).
MANY = 150


@pytest.fixture
def url(rabbitmq_vhost: Any) -> str:
    """A virtual host that no other test uses."""
    return str(rabbitmq_vhost.url)


#: Names the queue to redrive to, as a script does.
NAMED = ("--from", "orders", "--yes")


@pytest.fixture
def failures(url: str) -> None:
    """Every other message of the error queue is odd."""
    fail_messages(url, "orders", ["odd" if number % 2 else "even" for number in range(2 * MANY)], ValueError)


def waiting(cli: Cli, queue: str) -> int:
    return int(lines(cli("queues", "stats", queue, "--json"))[0][0]["ready"])


@pytest.mark.usefixtures("failures")
def test_redriving_every_other_message_brings_each_back_once(cli: Cli, url: str) -> None:
    assert lines(cli("errors", "redrive", "--filter", "reason='with odd'", "--json", *NAMED)) == [{"redriven": MANY}]

    assert waiting(cli, "error") == MANY
    back = received(url, "orders")
    assert len({message.id for message in back}) == len(back) == MANY
    assert {message.body for message in back} == {b"odd"}


@pytest.mark.usefixtures("failures")
def test_what_was_looked_at_is_there_for_the_next_command(cli: Cli) -> None:
    assert lines(cli("errors", "list", "--json"))[0][0]["count"] == 2 * MANY
    assert lines(cli("errors", "purge", "-w", "reason='with odd'", "--yes", "--json")) == [{"forgotten": MANY}]
    assert lines(cli("errors", "redrive", "--json", *NAMED)) == [{"redriven": MANY}]
    assert waiting(cli, "error") == 0


def test_receive_leaves_or_takes_the_messages(cli: Cli) -> None:
    for text in ("one", "two"):
        cli("send", "orders", text, "--header", "a=ü")

    assert [m["text"] for m in lines(cli("receive", "orders", "--json"))] == ["one", "two"]
    assert [m["headers"] for m in lines(cli("receive", "orders", "--json", "--ack"))] == [{"a": "ü"}] * 2
    assert lines(cli("receive", "orders", "--json", "--timeout", "0")) == []


def test_a_missing_queue_is_an_error(cli: Cli) -> None:
    for command in (["receive", "nowhere"], ["queues", "stats", "nowhere"], ["queues", "delete", "nowhere", "--yes"]):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")


def test_a_wrong_password_is_named_but_not_shown(cli: Cli, url: str) -> None:
    wrong = url.replace("guest:guest", "guest:geheim")

    result = cli("send", "orders", "one", "--url", wrong)

    assert result.exit_code == 1
    assert "geheim" not in result.output
