"""The demo: its numbers add up, on every protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ROOT, Cli, lines

#: 3,000 events, of which 49 are malformed and 112 go to a closed warehouse. One payment in ten is
#: tried twice, one in a hundred three times.
EXPECTED = {
    "orders": {"sent": 3000, "handled": 2951, "retried": 0, "dead_lettered": 49, "redriven": 0},
    "payments": {"sent": 2951, "handled": 2951, "retried": 325, "dead_lettered": 0, "redriven": 0},
    "shipments": {"sent": 2951, "handled": 2951, "retried": 0, "dead_lettered": 112, "redriven": 112},
}


def check(data: dict[str, Any]) -> None:
    assert data["queues"] == EXPECTED
    for name in ("sent", "handled", "retried", "dead_lettered", "redriven"):
        assert data[name] == sum(queue[name] for queue in data["queues"].values())
    assert data["sent"] == data["handled"] + data["dead_lettered"] - data["redriven"]
    assert data["left"] == data["dead_lettered"] - data["redriven"]
    assert data["adds_up"] is True
    assert data["rate"] == pytest.approx(data["handled"] / data["seconds"], rel=0.01)


@pytest.mark.parametrize("url", ["sqlite://", "asyncio://"])
def test_the_numbers_add_up(cli: Cli, url: str) -> None:
    check(lines(cli("demo", "--json", "--url", url))[0])


@pytest.mark.rabbitmq
def test_the_numbers_add_up_on_rabbitmq(cli: Cli, rabbitmq_vhost: Any) -> None:
    check(lines(cli("demo", "--json", "--url", rabbitmq_vhost.url))[0])


def test_on_a_database_of_ones_own_it_leaves_no_queue_behind(cli: Cli) -> None:
    check(lines(cli("demo", "--json"))[0])

    assert lines(cli("queues", "list", "--json")) == [[]]


def test_it_tells_people_what_happens(cli: Cli) -> None:
    result = cli("demo", "--url", "asyncio://")

    assert result.exit_code == 0
    assert "WarehouseClosed     112" in result.stdout
    assert "together    8,902     8,853       325             161        112" in result.stdout
    assert "The numbers add up" in result.stdout
    assert "STREAMTOOLS_URL=amqp://" in result.stdout


def test_its_last_line_can_be_typed_by_whoever_reads_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli("demo", "--url", "asyncio://").stdout.rstrip().endswith(" make demo")
    monkeypatch.chdir(tmp_path)
    assert " make demo" not in cli("demo", "--url", "asyncio://").stdout


def test_a_protocol_without_an_error_queue_is_refused(cli: Cli) -> None:
    result = cli("demo", "--json", "--url", "http://127.0.0.1:9000")

    assert result.exit_code == 2
    assert not result.stdout
    with pytest.raises(ValueError):
        json.loads(result.stderr)
