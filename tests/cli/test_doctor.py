"""`streamtools doctor`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.cli.conftest import Cli, fail_messages, lines


def states(cli: Cli, *arguments: str) -> dict[str, Any]:
    result = cli("doctor", "--json", *arguments)
    return {check["name"]: check["state"] for check in json.loads(result.stdout)}


def test_all_is_well_on_the_embedded_database(cli: Cli) -> None:
    assert set(states(cli).values()) == {"ok"}
    result = cli("doctor")
    assert result.exit_code == 0
    assert "All is well." in result.stdout
    assert "from STREAMTOOLS_URL" in result.stdout


def test_the_probe_leaves_no_queue_behind(cli: Cli) -> None:
    cli("doctor")

    assert lines(cli("queues", "list", "--json")) == [[]]


def test_failed_messages_are_pointed_out(cli: Cli, url: str) -> None:
    fail_messages(url, "orders", [1], ValueError)

    assert states(cli)["admin"] == "warning"
    assert "streamtools errors list" in cli("doctor").stdout


@pytest.mark.parametrize(
    ("url", "failed"),
    [
        ("amqq://user:geheim@host/", "address"),
        ("amqp://user:geheim@127.0.0.1:9/", "connection"),
        ("sqlite:////nowhere/at/all/x.db", "connection"),
    ],
)
def test_what_is_wrong_is_named_with_the_line_to_type_next(cli: Cli, url: str, failed: str) -> None:
    result = cli("doctor", "--url", url, "--json")

    assert result.exit_code == 1
    check = json.loads(result.stdout)[-1]
    assert (check["name"], check["state"]) == (failed, "failed")
    assert check["next"]
    assert "geheim" not in result.output


@pytest.mark.rabbitmq
def test_all_is_well_on_rabbitmq(cli: Cli, rabbitmq_vhost: Any) -> None:
    url = f"{rabbitmq_vhost.url}?management_url={quote(rabbitmq_vhost.management_url, safe='')}"

    result = cli("doctor", "--url", url, "--json")

    assert {check["state"] for check in json.loads(result.stdout)} == {"ok"}, result.stdout
    assert "aio-pika" in result.stdout


def test_of_a_damaged_file_nothing_is_said_to_work(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "damaged.db"
    for _ in range(3):
        cli("send", "orders", "x" * 30_000, "--url", f"sqlite:///{path}")
    data = bytearray(path.read_bytes())
    data[4096:20_000] = os.urandom(20_000 - 4096)
    path.write_bytes(bytes(data))

    result = cli("doctor", "--url", f"sqlite:///{path}", "--json")

    assert result.exit_code == 1
    assert "damaged" in result.stdout and "works without" not in result.stdout


@pytest.mark.rabbitmq
def test_without_the_management_plugin_it_says_what_does_not_work(cli: Cli, rabbitmq_vhost: Any) -> None:
    result = cli("doctor", "--url", f"{rabbitmq_vhost.url}?management_url=http://127.0.0.1:9", "--json")

    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert (checks["round trip"]["state"], checks["admin"]["state"]) == ("ok", "warning")
    assert "rabbitmq_management" in checks["admin"]["found"]
