"""Messages that want to deceive the person at the terminal, or the program that reads the JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from streamtools import Message, Producer
from streamtools.message import ErrorDetails
from tests.cli.conftest import Cli

#: Forges the head of a message, sets the title of the terminal, clears it, turns the direction of writing.
HOSTILE = "x\n--- forged\r\x1b]0;title\x07\x1b[2J\x9b2J\u202e\u2066\u2028\x7f"


@pytest.fixture
def planted(url: str) -> None:
    """Such messages in a queue and in the error queue."""
    error = ErrorDetails(
        queue="orders", handler=HOSTILE, exception=HOSTILE, reason=HOSTILE, traceback=HOSTILE, omitted=HOSTILE,
        first_failed=1.0, last_failed=2.0, attempts=3,
    )  # fmt: skip
    data = [json.dumps({HOSTILE: HOSTILE}), json.dumps(HOSTILE, ensure_ascii=False)]
    bodies = [HOSTILE.encode(), *(text.encode() for text in data)]
    queues = ["orders", "error"]
    messages = [
        Message(
            body=body, queue=queue, id=f"{number}{HOSTILE}", type=HOSTILE, key=HOSTILE, source=HOSTILE,
            content_type="text/plain" if number == 0 else "application/json",
            headers={f"h{HOSTILE}": HOSTILE}, error=error if queue == "error" else None,
        )
        for queue in queues
        for number, body in enumerate(bodies)
    ]  # fmt: skip

    async def plant() -> None:
        for queue in queues:
            async with Producer(queue, url=url) as producer:
                await producer.send_messages([message for message in messages if message.queue == queue])

    asyncio.run(plant())


COMMANDS: list[list[str]] = [
    ["errors", "list", "--queue", "\udceb"],
    ["errors", "redrive", "--to", "\udceb"],
    ["queues", "stats", "\udceb"],
    ["queues", "create", "\udceb"],
    ["queues", "delete", "\udceb", "--yes"],
    ["receive", "\udceb"],
    ["send", "\udceb", "{}"],
    ["send", "orders", "{}", "--key", "\udceb"],
    ["send", "orders", "{}", "--type", "\udceb"],
    ["receive", "orders"],
    ["errors", "list"],
    ["errors", "show"],
    ["errors", "redrive", "--dry-run"],
    ["errors", "purge", "--dry-run"],
    ["errors", "show", HOSTILE],
    ["errors", "list", "--queue", HOSTILE],
    ["errors", "list", "--filter", f"nonsense{HOSTILE}=1"],
    ["queues", "stats", f"{HOSTILE}"],
    ["queues", "list"],
    ["receive", HOSTILE],
    ["send", HOSTILE, "{}"],
    ["send", "orders", "{}", "--header", HOSTILE],
    ["send", "orders", "--file", f"/tmp/{HOSTILE}"],
    ["run", HOSTILE],
    ["queues", "list", "--url", f"sqlite:///{HOSTILE}"],
    ["queues", "list", "--url", f"{HOSTILE}://"],
]


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c)[:25].encode("unicode_escape").decode())
@pytest.mark.parametrize("as_json", [False, True])
def test_no_command_sends_it_to_the_terminal(cli: Cli, command: list[str], as_json: bool) -> None:
    result: Any = cli(*command, *(["--json"] if as_json else []))
    if result.exit_code == 2 and "No such option" in result.stderr:
        return
    for line in (result.stdout + result.stderr).split("\n"):
        assert line.replace("\t", "").isprintable(), line
        assert not line.startswith("--- forged")
    if as_json and result.stdout:
        for line in result.stdout.splitlines():
            json.loads(line)
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
