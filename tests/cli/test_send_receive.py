"""`streamtools send` and `streamtools receive`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Service, lines, received

NOT_UTF8 = b"\xff\xfe\x00"


def test_send_prints_the_id_of_the_message(cli: Cli, url: str) -> None:
    result = cli("send", "orders", '{"id": 1}')

    assert result.exit_code == 0
    assert result.stdout.strip() == received(url, "orders")[0].id


def test_json_goes_as_json_byte_for_byte(cli: Cli, url: str) -> None:
    cli("send", "orders", '{"price": 1.10,  "name": "Zoë"}')

    message = received(url, "orders")[0]
    assert message.body == '{"price": 1.10,  "name": "Zoë"}'.encode()
    assert message.content_type == "application/json"


@pytest.mark.parametrize("text", ["hello there", "{not json", "NaN"])
def test_what_is_not_json_goes_as_text(cli: Cli, url: str, text: str) -> None:
    cli("send", "orders", text)

    message = received(url, "orders")[0]
    assert message.body == text.encode()
    assert message.content_type == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("text", "noted"), [('{"id": 1', True), ("[1", True), ("hello there", False), ('{"id": 1}', False)]
)
def test_what_looks_like_json_and_is_none_is_pointed_out(cli: Cli, text: str, noted: bool) -> None:
    result = cli("send", "orders", text)

    assert result.exit_code == 0
    assert ("is not JSON" in result.stderr and "is sent as text" in result.stderr) == noted


def test_raw_bytes_come_from_standard_input(cli: Cli, url: str) -> None:
    cli("send", "orders", "-", "--raw", stdin=NOT_UTF8)

    message = received(url, "orders")[0]
    assert message.body == NOT_UTF8
    assert message.content_type == "application/octet-stream"


def test_bytes_that_are_not_text_need_raw(cli: Cli) -> None:
    result = cli("send", "orders", "-", stdin=NOT_UTF8)

    assert result.exit_code == 2
    assert "--raw" in result.stderr


def test_headers_key_and_type_go_along(cli: Cli, url: str) -> None:
    cli("send", "orders", "{}", "--header", "a=1", "-H", "b=x=y", "--key", "k", "--type", "shop.Order")

    message = received(url, "orders")[0]
    assert dict(message.headers) == {"a": "1", "b": "x=y"}
    assert (message.key, message.type) == ("k", "shop.Order")


def test_a_delayed_message_is_not_there_yet(cli: Cli) -> None:
    cli("send", "orders", "{}", "--delay", "60", "--ttl", "90")

    assert lines(cli("receive", "orders", "--timeout", "0", "--json")) == []
    assert lines(cli("queues", "stats", "orders", "--json"))[0][0]["delayed"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["{}", "--header", "novalue"],
        ["{}", "--header", "streamtools-id=1"],
        [],
        ["{}", "--file", "x"],
        ["{}", "--key"],
    ],
)
def test_wrong_usage_ends_with_2(cli: Cli, arguments: list[str]) -> None:
    result = cli("send", "orders", *arguments)

    assert result.exit_code == 2
    assert result.stderr
    assert not result.stdout


def test_a_file_goes_line_by_line_in_order(cli: Cli, url: str, tmp_path: Path) -> None:
    file = tmp_path / "orders.jsonl"
    file.write_text("".join(f'{{"id": {number}}}\n' for number in range(1_203)) + "\n")

    result = cli("send", "orders", "--file", str(file))

    assert "1,203 messages sent to orders." in result.stderr
    assert [json.loads(message.body)["id"] for message in received(url, "orders")] == list(range(1_203))


def test_a_file_with_a_broken_line_sends_nothing(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "orders.jsonl"
    file.write_text('{"id": 1}\n{"id": \n')

    result = cli("send", "orders", "--file", str(file))

    assert result.exit_code == 1
    assert "line 2 is not JSON" in result.stderr
    assert lines(cli("queues", "list", "--json")) == [[]]


def test_a_broken_line_goes_with_raw(cli: Cli, url: str, tmp_path: Path) -> None:
    file = tmp_path / "orders.jsonl"
    file.write_text('{"id": 1}\n{"id": \n')

    assert len(lines(cli("send", "orders", "--file", str(file), "--raw", "--json"))) == 2
    assert received(url, "orders")[1].body == b'{"id": '


def test_a_file_may_come_from_standard_input(cli: Cli, url: str) -> None:
    result = cli("send", "orders", "--file", "-", stdin='{"id": 1}\n{"id": 2}\n')

    assert result.exit_code == 0
    assert len(received(url, "orders")) == 2


def test_a_missing_file_ends_with_2(cli: Cli) -> None:
    result = cli("send", "orders", "--file", "missing.jsonl")

    assert result.exit_code == 2
    assert "missing.jsonl cannot be read" in result.stderr


def test_receive_leaves_the_messages_where_they_are(cli: Cli) -> None:
    sent = [cli("send", "orders", f'{{"id": {number}}}').stdout.strip() for number in range(3)]

    for _ in range(2):
        seen = lines(cli("receive", "orders", "--json", "--timeout", "0.1"))
        assert [message["id"] for message in seen] == sent
        assert [message["payload"] for message in seen] == [{"id": 0}, {"id": 1}, {"id": 2}]


def test_receive_with_ack_takes_them_out(cli: Cli) -> None:
    cli("send", "orders", "one")
    cli("send", "orders", "two")

    assert [message["text"] for message in lines(cli("receive", "orders", "--json", "--ack", "--max", "1"))] == [
        "one"
    ]
    assert [message["text"] for message in lines(cli("receive", "orders", "--json", "--timeout", "0.1"))] == ["two"]


def test_receive_shows_people_the_headers_and_the_body(cli: Cli) -> None:
    cli("send", "orders", '{"name": "Zoë"}', "--header", "channel=web", "--type", "shop.Order")

    result = cli("receive", "orders", "--timeout", "0.1")

    assert "channel: web" in result.stdout
    assert '"name": "Zoë"' in result.stdout
    assert "stay in orders" in result.stderr


def test_a_body_cannot_steer_the_terminal(cli: Cli) -> None:
    cli("send", "orders", "\x1b[2J\x1b]0;gone\x07 [bold]markup[/bold]")

    shown = cli("receive", "orders", "--timeout", "0.1").stdout

    assert "\x1b" not in shown
    assert r"\x1b[2J" in shown
    assert "[bold]markup[/bold]" in shown


def test_a_body_that_is_not_text_is_shown_in_base64(cli: Cli) -> None:
    cli("send", "orders", "-", "--raw", stdin=NOT_UTF8)

    assert lines(cli("receive", "orders", "--json", "--timeout", "0.1"))[0]["base64"] == "//4A"


def test_a_queue_that_does_not_exist_is_an_error_not_a_new_queue(cli: Cli) -> None:
    result = cli("receive", "nowhere", "--timeout", "0")

    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert lines(cli("queues", "list", "--json")) == [[]]


def test_follow_shows_what_arrives_until_it_is_ended(cli: Cli, start: type[Service]) -> None:
    cli("queues", "create", "orders")
    service = start("receive", "orders", "--follow", "--ack", "--json")

    for text in ("one", "two"):
        cli("send", "orders", text)
        service.wait_until(lambda text=text: f'"text": "{text}"' in service.output)
    # What is shown is acknowledged right after: ended in between, it would be shown again.
    service.wait_until(lambda: lines(cli("queues", "stats", "orders", "--json"))[0][0]["in_hand"] == 0)

    assert service.end() == 0
    assert lines(cli("receive", "orders", "--json", "--timeout", "0")) == []


def test_what_follow_only_looked_at_is_back_at_once_after_its_end(cli: Cli, start: type[Service]) -> None:
    cli("send", "orders", "one")
    service = start("receive", "orders", "--follow", "--json")
    service.wait_until(lambda: '"text": "one"' in service.output)

    begin = time.monotonic()
    assert service.end() == 0
    assert len(lines(cli("receive", "orders", "--json", "--timeout", "5"))) == 1
    assert time.monotonic() - begin < 30  # not after the lease of 30 s


def test_who_looks_where_there_is_no_broker_is_told_who_listens(cli: Cli) -> None:
    result = cli("receive", "orders", "--url", "http://127.0.0.1:0", "--timeout", "0.1")

    assert result.exit_code == 0, result.output
    assert "http://127.0.0.1:0 has no queues to read: this command itself listens there" in result.stderr
