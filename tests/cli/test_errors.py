"""`streamtools errors`."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from streamtools import Message, Producer
from streamtools.cli import output
from streamtools.message import ErrorDetails
from tests.cli.conftest import Cli, fail_messages, lines, received

#: Names the queues to redrive to, as a script does.
NAMED = ("--from", "orders", "--from", "payments", "--yes")


class CardRefused(Exception):
    """The customer's card is no good."""


@pytest.fixture
def failures(url: str) -> None:
    """Three orders failed by ValueError, two payments by CardRefused."""
    fail_messages(url, "orders", [{"id": 1}, {"id": 2}, {"id": 3}], ValueError, headers={"shop": "north"}, key="k")
    fail_messages(url, "payments", ["first", "second"], CardRefused, type="shop.Payment")


def waiting(cli: Cli, queue: str) -> int:
    return int(lines(cli("queues", "stats", queue, "--json"))[0][0]["ready"])


@pytest.mark.usefixtures("failures")
class TestList:
    def test_groups_by_source_queue_and_exception(self, cli: Cli) -> None:
        groups = lines(cli("errors", "list", "--json"))[0]

        assert [(g["queue"], g["exception"].rpartition(".")[2], g["count"]) for g in groups] == [
            ("orders", "ValueError", 3),
            ("payments", "CardRefused", 2),
        ]

    def test_shows_people_a_table(self, cli: Cli) -> None:
        table = cli("errors", "list").stdout

        assert "CardRefused" in table
        assert "no luck with second" in table

    def test_leaves_the_messages_where_they_are(self, cli: Cli) -> None:
        for _ in range(3):
            cli("errors", "list")

        assert waiting(cli, "error") == 5

    def test_takes_a_filter(self, cli: Cli) -> None:
        groups = lines(cli("errors", "list", "--filter", "queue=payments", "--json"))[0]

        assert [group["count"] for group in groups] == [2]


@pytest.mark.usefixtures("failures")
class TestShow:
    def test_tells_all_that_is_known(self, cli: Cli) -> None:
        found = lines(cli("errors", "show", "--filter", "exception=CardRefused first", "--json"))

        assert len(found) == 1
        error = found[0]["error"]
        assert error["queue"] == "payments"
        assert error["reason"] == "no luck with first"
        assert error["attempts"] == 1
        assert "raise error" in error["traceback"]
        assert found[0]["text"] == "first"

    def test_by_id(self, cli: Cli) -> None:
        example = lines(cli("errors", "list", "--json"))[0][0]["example"]

        result = cli("errors", "show", example)

        assert result.exit_code == 0
        assert example in result.stdout
        assert "header shop" in result.stdout
        assert "ValueError" in result.stdout

    @pytest.mark.parametrize("command", [("redrive",), ("purge", "--yes"), ("purge", "--dry-run")], ids=" ".join)
    def test_an_unknown_id_is_nothing_done(self, cli: Cli, command: tuple[str, ...]) -> None:
        result = cli("errors", command[0], "nobody", *command[1:])

        assert result.exit_code == 1
        assert "holds no message for 1 of the ids" in result.stderr

    def test_of_an_unknown_id_ends_with_1(self, cli: Cli) -> None:
        result = cli("errors", "show", "nobody")

        assert result.exit_code == 1
        assert "no such message" in result.stderr


@pytest.mark.usefixtures("failures")
class TestRedrive:
    def test_puts_each_back_once_as_it_was(self, cli: Cli, url: str) -> None:
        ids = {message["id"] for message in lines(cli("errors", "show", "--json"))}

        assert lines(cli("errors", "redrive", "--json", *NAMED)) == [{"redriven": 5}]

        assert waiting(cli, "error") == 0
        back = received(url, "orders") + received(url, "payments")
        assert {message.id for message in back} == ids
        assert len(back) == 5
        assert {message.attempt for message in back} == {1}
        assert {message.error for message in back} == {None}
        assert [message.body for message in back] == [b'{"id":1}', b'{"id":2}', b'{"id":3}', b"first", b"second"]
        assert [dict(message.headers) for message in back][:3] == [{"shop": "north"}] * 3
        assert [message.key for message in back][:3] == ["k"] * 3

    def test_by_filter_leaves_the_others(self, cli: Cli) -> None:
        result = cli(
            "errors",
            "redrive",
            "--filter",
            "queue=orders",
            "--filter",
            "exception=ValueError",
            "--from",
            "orders",
            "--from",
            "payments",
            "--yes",
        )

        assert "3 messages of error redriven." in result.stdout
        assert (waiting(cli, "orders"), waiting(cli, "error")) == (3, 2)

    def test_dry_run_changes_nothing(self, cli: Cli) -> None:
        told = lines(cli("errors", "redrive", "--filter", "queue=orders", "--dry-run", "--json"))[0]

        assert (told["redriven"], told["would_be"], len(told["ids"])) == (0, 3, 3)
        assert waiting(cli, "error") == 5
        assert (
            "3 of 5 messages would be redriven" in cli("errors", "redrive", "-w", "queue=orders", "--dry-run").stdout
        )

    def test_to_another_queue(self, cli: Cli) -> None:
        cli("queues", "create", "inspection")

        cli("errors", "redrive", "--to", "inspection", "--yes")

        assert waiting(cli, "inspection") == 5

    def test_limit(self, cli: Cli) -> None:
        assert lines(cli("errors", "redrive", "--limit", "2", "--json", *NAMED)) == [{"redriven": 2}]
        assert waiting(cli, "error") == 3

    def test_by_id(self, cli: Cli, url: str) -> None:
        wanted = lines(cli("errors", "list", "--json"))[0][0]["example"]

        assert lines(cli("errors", "redrive", wanted, "--json", *NAMED)) == [{"redriven": 1}]
        assert [message.id for message in received(url, "orders")] == [wanted]

    def test_to_a_queue_that_is_gone_keeps_the_messages(self, cli: Cli) -> None:
        cli("queues", "delete", "orders", "--yes")

        result = cli("errors", "redrive", "--filter", "queue=orders", *NAMED)

        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert waiting(cli, "error") == 5


@pytest.mark.usefixtures("failures")
class TestPurge:
    def test_needs_yes_without_a_terminal(self, cli: Cli) -> None:
        result = cli("errors", "purge")

        assert result.exit_code == 2
        assert "5 failed messages" in result.stderr
        assert waiting(cli, "error") == 5

    def test_forgets_all(self, cli: Cli) -> None:
        assert lines(cli("errors", "purge", "--yes", "--json")) == [{"forgotten": 5}]
        assert waiting(cli, "error") == 0

    def test_forgets_only_what_the_filter_means(self, cli: Cli) -> None:
        assert lines(cli("errors", "purge", "-w", "exception=CardRefused", "--yes", "--json")) == [{"forgotten": 2}]
        assert waiting(cli, "error") == 3

    def test_dry_run_needs_no_yes(self, cli: Cli) -> None:
        assert lines(cli("errors", "purge", "--dry-run", "--json"))[0]["would_be"] == 5
        assert waiting(cli, "error") == 5


def test_a_filter_that_does_not_exist_names_the_near_ones(cli: Cli) -> None:
    result = cli("errors", "list", "--filter", "exeption=ValueError")

    assert result.exit_code == 2
    assert "'exception'" in result.stderr


def test_without_an_error_queue_it_says_where_to_look(cli: Cli) -> None:
    result = cli("errors", "list")

    assert result.exit_code == 1
    assert "--queue NAME" in result.stderr


class TestWhatCannotGoHome:
    """Messages that do not say where they failed, or whose queue has gone."""

    @pytest.fixture(autouse=True)
    def _failures(self, url: str, failures: None) -> None:
        async def put() -> None:
            async with Producer("error", url=url) as producer:
                await producer.send("put here by hand", id="lost")

        asyncio.run(put())

    def test_the_others_are_redriven_as_the_dry_run_says(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        said = cli("errors", "redrive", "--dry-run")
        assert (said.exit_code, "5 of 6 messages would be redriven" in said.stdout) == (1, True)
        assert "--to QUEUE" in said.stderr and "lost" in said.stderr

        monkeypatch.setattr(output, "at_terminal", lambda: True)
        done = cli("errors", "redrive", stdin="y\n")

        assert (done.exit_code, "5 messages of error redriven" in done.stdout) == (1, True)
        assert "--to QUEUE" in done.stderr and "queue=" not in done.stderr
        assert (waiting(cli, "error"), waiting(cli, "orders"), waiting(cli, "payments")) == (1, 3, 2)
        assert cli("errors", "redrive", "--to", "orders", "--yes").exit_code == 0
        assert (waiting(cli, "error"), waiting(cli, "orders")) == (0, 4)

    def test_one_queue_that_has_gone_stops_no_other(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        cli("queues", "delete", "payments", "--yes")

        said = cli("errors", "redrive", "--dry-run", "--json")
        assert (said.exit_code, json.loads(said.stdout)["would_be"]) == (1, 3)
        assert "there is no queue 'payments'" in said.stderr

        monkeypatch.setattr(output, "at_terminal", lambda: True)
        done = cli("errors", "redrive", stdin="y\n")

        assert done.exit_code == 1
        assert (waiting(cli, "error"), waiting(cli, "orders")) == (3, 3)
        assert "2 messages of error cannot move: there is no queue 'payments'" in done.stderr
        assert "unknown where it failed (lost)" in done.stderr, "both reasons are told"

    def test_an_empty_target_is_none(self, cli: Cli) -> None:
        result = cli("errors", "redrive", "--to", "", "--yes")
        assert (result.exit_code, "at least one character" in result.stderr) == (2, True)
        assert (waiting(cli, "error"), waiting(cli, "orders")) == (6, 0)

    def test_a_target_of_any_length_is_shown_in_a_line(self, cli: Cli, url: str) -> None:
        async def plant() -> None:
            async with Producer("error", url=url) as producer:
                error = ErrorDetails(queue="q" * 70_000)
                await producer.send_messages([Message(body=b"1", queue="error", id="forged", error=error)])

        asyncio.run(plant())
        said = cli("errors", "redrive", "--dry-run")
        assert "there is no queue 'qqq" in said.stderr
        assert len(said.stderr) < 1000
        assert len(cli("errors", "list").stdout) < 10_000

    def test_what_is_parked_keeps_why_it_failed_and_goes_home_from_there(self, cli: Cli) -> None:
        cli("queues", "create", "parked")
        assert cli("errors", "redrive", "--filter", "queue=payments", "--to", "parked", "--yes").exit_code == 0
        [shown, _] = lines(cli("errors", "show", "--queue", "parked", "--json"))
        assert (shown["error"]["queue"], shown["error"]["reason"]) == ("payments", "no luck with first")

        assert cli("errors", "redrive", "--queue", "parked", *NAMED).exit_code == 0
        assert (waiting(cli, "parked"), waiting(cli, "payments")) == (0, 2)


NESTED = [b"[" * 900 + b"]" * 900, b"[" * 330 + b"]" * 330]
DEEP = [b"[" * 100_000, b'{"a":' * 50_000, *NESTED, b"1" * 5000, b'"\\ud800"']


@pytest.mark.parametrize("body", DEEP, ids=range(len(DEEP)))
@pytest.mark.parametrize("command", [("errors", "show", "--queue"), ("receive",), ("errors", "list", "--queue")])
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_body_that_nothing_can_read_is_shown(
    cli: Cli, url: str, body: bytes, command: tuple[str, ...], form: tuple[str, ...]
) -> None:
    async def put() -> None:
        async with Producer("deep", url=url) as producer:
            message = Message(body=body, queue="deep", id="deep", content_type="application/json")
            await producer.send_messages([message, message.replace(id="other", body=b'"fine"')])

    asyncio.run(put())

    result = cli(*command, "deep", *form)

    assert (result.exit_code, "fine" in result.stdout or "list" in command) == (0, True)


@pytest.mark.parametrize("option", ["--delay", "--ttl"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e12", "-1"])
def test_a_time_that_never_comes_is_refused(cli: Cli, option: str, value: str) -> None:
    result = cli("send", "orders", "{}", option, value)
    assert result.exit_code != 0 and option in result.stderr and "Traceback" not in result.stderr


@pytest.mark.usefixtures("failures")
class TestWhereARedriveGoes:
    """Where a message failed stands in the message, which whoever may write to the error queue may have written."""

    @pytest.fixture(autouse=True)
    def _planted(self, url: str, cli: Cli) -> None:
        cli("queues", "create", "payouts")
        error = ErrorDetails(queue="payouts", exception="ValueError", reason="no luck")

        async def plant() -> None:
            async with Producer("error", url=url) as producer:
                message = Message(body=b"{}", queue="error", id="planted", error=error)
                nowhere = [
                    dataclasses.replace(error, queue=name) for name in ("streamtools.bindings", "\n", "x" * 300)
                ]
                await producer.send_messages(
                    [message, *(message.replace(id=f"n{n}", error=e) for n, e in enumerate(nowhere))]
                )

        asyncio.run(plant())

    def test_it_is_shown_and_asked(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = cli("errors", "redrive")
        assert asked.exit_code == 2
        assert "3 to 'orders', 2 to 'payments', 1 to 'payouts'?" in asked.stderr
        assert "--from QUEUE" in asked.stderr
        monkeypatch.setattr(output, "at_terminal", lambda: True)
        assert cli("errors", "redrive", stdin="n\n").exit_code == 1
        assert waiting(cli, "error") == 9
        assert "6 messages of error redriven" in cli("errors", "redrive", stdin="y\n").stdout
        assert (waiting(cli, "orders"), waiting(cli, "payouts"), waiting(cli, "error")) == (3, 1, 3)

    def test_a_script_names_the_queues(self, cli: Cli) -> None:
        refused = cli("errors", "redrive", "--yes")
        assert refused.exit_code == 1
        assert "1 to 'payouts'" in refused.stderr
        assert "--from orders --from payments --from payouts" in refused.stderr
        assert (waiting(cli, "orders"), waiting(cli, "payouts"), waiting(cli, "error")) == (0, 0, 9)
        named = cli("errors", "redrive", "--yes", "--from", "orders")
        assert (named.exit_code, named.stdout) == (0, "3 messages of error redriven.\n")
        assert (waiting(cli, "orders"), waiting(cli, "payouts"), waiting(cli, "error")) == (3, 0, 6)

    def test_a_yes_is_about_the_queues_that_were_shown(
        self, cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoys = [f"a{n:02}" for n in range(20)]
        for name in decoys:
            cli("queues", "create", name)

        async def plant() -> None:
            async with Producer("error", url=url) as producer:
                errors = [ErrorDetails(queue=name, exception="ValueError") for name in decoys]
                await producer.send_messages(
                    [Message(body=b"{}", queue="error", id=f"decoy{n}", error=e) for n, e in enumerate(errors)]
                )

        asyncio.run(plant())
        said = cli("errors", "redrive", "--dry-run")
        assert "'a19', and to 3 more queues" in said.stderr.replace("1 to ", "")
        monkeypatch.setattr(output, "at_terminal", lambda: True)
        done = cli("errors", "redrive", stdin="y\n")
        assert (done.exit_code, "20 messages of error redriven." in done.stdout) == (1, True)
        assert "--from orders --from payments --from payouts" in done.stderr
        assert (waiting(cli, "payouts"), waiting(cli, "a00")) == (0, 1)

    def test_a_dry_run_tells_it(self, cli: Cli) -> None:
        assert "3 to 'orders', 2 to 'payments', 1 to 'payouts'" in cli("errors", "redrive", "--dry-run").stderr
        assert "They would go: 3 to 'orders'." in cli("errors", "redrive", "--dry-run", "--from", "orders").stderr

    def test_what_comes_meanwhile_goes_nowhere_else(
        self, cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def late(question: str, *, yes: bool) -> None:
            async def plant() -> None:
                async with Producer("error", url=url) as producer:
                    error = ErrorDetails(queue="salaries", reason="no luck")
                    await producer.send_messages([Message(body=b"", queue="error", id="late", error=error)])

            asyncio.run(plant())

        cli("queues", "create", "salaries")
        monkeypatch.setattr(output, "confirm", late)
        cli("errors", "redrive")
        assert (waiting(cli, "orders"), waiting(cli, "salaries")) == (3, 0)

    @pytest.mark.parametrize("name", ["orders.error", "orders-error"])
    def test_from_a_queue_s_own_error_queue_it_goes_to_that_queue_alone(self, cli: Cli, url: str, name: str) -> None:
        async def plant() -> None:
            async with Producer(name, url=url) as producer:
                error = ErrorDetails(queue="orders", reason="no luck")
                message = Message(body=b"", queue=name, id="own", error=error)
                planted = message.replace(id="planted", error=dataclasses.replace(error, queue="payouts"))
                await producer.send_messages([message, planted])

        asyncio.run(plant())
        done = cli("errors", "redrive", "--queue", name, "--yes")
        assert (done.exit_code, done.stdout) == (1, f"1 message of {name} redriven.\n")
        assert (waiting(cli, "orders"), waiting(cli, "payouts"), waiting(cli, name)) == (1, 0, 1)
