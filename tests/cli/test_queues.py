"""`streamtools queues`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from streamtools.cli import output
from tests.cli.conftest import Cli, Service, lines


def test_list_names_every_queue_with_its_numbers(cli: Cli) -> None:
    cli("send", "orders", "{}")
    cli("queues", "create", "empty")

    found = lines(cli("queues", "list", "--json"))[0]

    assert [(info["name"], info["ready"]) for info in found] == [("empty", 0), ("orders", 1)]
    table = cli("queues", "list").stdout
    assert "orders" in table
    assert "ready" in table


def test_list_of_nothing_says_so_on_stderr(cli: Cli) -> None:
    result = cli("queues", "list")

    assert (result.exit_code, result.stdout) == (0, "")
    assert "no queue" in result.stderr


def test_stats_of_a_missing_queue_ends_with_1(cli: Cli) -> None:
    result = cli("queues", "stats", "nowhere")

    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_creating_twice_is_fine(cli: Cli) -> None:
    assert cli("queues", "create", "orders").exit_code == 0
    assert lines(cli("queues", "create", "orders", "--json")) == [{"created": "orders"}]


@pytest.mark.parametrize("command", ["purge", "delete"])
def test_without_a_terminal_nothing_is_destroyed_unless_yes(cli: Cli, command: str) -> None:
    cli("send", "orders", "{}")

    refused = cli("queues", command, "orders")

    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert lines(cli("queues", "stats", "orders", "--json"))[0][0]["ready"] == 1
    assert cli("queues", command, "orders", "--yes").exit_code == 0


def test_purge_says_how_many(cli: Cli) -> None:
    cli("send", "orders", "{}")
    cli("send", "orders", "{}")

    assert lines(cli("queues", "purge", "orders", "--yes", "--json")) == [{"purged": "orders", "messages": 2}]
    assert lines(cli("queues", "stats", "orders", "--json"))[0][0]["ready"] == 0


def test_delete_removes_the_queue(cli: Cli) -> None:
    cli("send", "orders", "{}")

    cli("queues", "delete", "orders", "--yes")

    assert lines(cli("queues", "list", "--json")) == [[]]


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", 1, 1)])
def test_at_a_terminal_it_asks_first(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    cli("send", "orders", "{}")
    monkeypatch.setattr(output, "at_terminal", lambda: True)

    result = cli("queues", "purge", "orders", stdin=f"{answer}\n")

    assert result.exit_code == code
    assert "1 message in 'orders'" in result.stderr
    assert lines(cli("queues", "stats", "orders", "--json"))[0][0]["ready"] == left


@pytest.mark.parametrize("name", ["", "a" * 300, "a\nb"])
def test_a_name_that_cannot_be_ends_with_2(cli: Cli, name: str) -> None:
    result = cli("queues", "create", name)

    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_a_password_is_never_shown(cli: Cli) -> None:
    result = cli("queues", "list", "--url", "sqlite://user:geheim@host/x.db")

    assert result.exit_code == 2
    assert "geheim" not in result.output


@pytest.mark.parametrize(
    "url", ["http://user:geheim/1@host", "amqp://user:geheim/1@host", "amqp://user:geheim@host:port/"]
)
def test_a_password_that_makes_the_url_unreadable_is_not_shown_either(cli: Cli, url: str) -> None:
    result = cli("queues", "list", "--url", url)

    assert result.exit_code == 2
    assert "geheim" not in result.output


LOOKING = [
    ("queues", "list"), ("queues", "stats", "orders"), ("queues", "purge", "orders", "--yes"),
    ("queues", "delete", "orders", "--yes"), ("errors", "list"), ("errors", "show"), ("errors", "redrive"),
    ("errors", "purge", "--yes"), ("receive", "orders"),
]  # fmt: skip


@pytest.mark.parametrize("command", LOOKING, ids=" ".join)
def test_looking_makes_no_file(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    result = cli(*command)

    assert list(tmp_path.iterdir()) == []
    if command != ("queues", "list"):
        assert result.exit_code == 1
        assert "There is no file" in result.stderr


@pytest.mark.parametrize("url", ["sqlite:///x.db", "asyncio://"])
def test_an_option_that_no_protocol_knows_ends_with_2(cli: Cli, tmp_path: Path, url: str) -> None:
    result = cli("queues", "create", "orders", "-o", "queue_typ=quorum", "--url", url)

    assert result.exit_code == 2
    assert "Did you mean 'queue_type'" in result.stderr


def test_http_has_no_queues_and_says_what_has(cli: Cli) -> None:
    result = cli("queues", "list", "--url", "http://127.0.0.1:9000")

    assert result.exit_code == 2
    assert "no queues to look at" in result.stderr
    assert "sqlite://" in result.stderr


def test_a_kafka_that_is_not_there_is_one_line(start: Callable[..., Service]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        running = start("queues", "list", "--url", f"kafka://127.0.0.1:{taken.getsockname()[1]}")

        assert running.wait() == 1

    assert len(running.output.splitlines()) == 1, running.output
    assert "cannot be reached" in running.output
