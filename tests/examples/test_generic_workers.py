"""The workers of examples/generic_workers, with a real mail server and a real folder."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message as Mail
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from streamtools import Consumer, background
from streamtools.jobs import receive_message_sync, send_message_sync
from tests.examples.test_examples import EXAMPLES, ROOT, running, wait_for

HERE = EXAMPLES / "generic_workers"
PATIENCE = 60


class MailServer:
    """Takes mail; is busy for the first one to `busy@`, and refuses all to `nobody@`."""

    def __init__(self) -> None:
        self.mails: list[Mail] = []
        self._arrived = threading.Condition()
        self._was_busy = False

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("nobody@"):
            return "550 no such user"
        if address.startswith("busy@") and not self._was_busy:
            self._was_busy = True
            return "451 try again later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        assert isinstance(envelope.content, bytes)
        with self._arrived:
            self.mails.append(message_from_bytes(envelope.content))
            self._arrived.notify_all()
        return "250 OK"

    def wait_for(self, number: int) -> None:
        """Until so many have come."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.mails) >= number, PATIENCE), self.mails


@pytest.fixture
def mail_server() -> Iterator[tuple[MailServer, int]]:
    server = MailServer()

    async def listen() -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: SMTP(server, loop=loop), "127.0.0.1", 0)

    async def close() -> None:
        listening.close()
        await listening.wait_closed()

    listening = background.run(listen())
    yield server, listening.sockets[0].getsockname()[1]
    background.run(close())


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    return f"sqlite:///{tmp_path}/workers.db"


@pytest.fixture
def environment(url: str, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "STREAMTOOLS_URL": url, "STORAGE": str(tmp_path / "storage")}


def send(url: str, to: str, /, **data: Any) -> None:
    send_message_sync(title=f"A job for {to}", message_type="Test", send_from="tests", send_to=to, data=data, url=url)


def failed(url: str) -> dict[str, str]:
    """The next message of the error queue: its data as JSON, and why."""

    async def take() -> dict[str, str]:
        async with Consumer("error", url=url) as errors:
            [delivery] = await errors.receive(timeout=PATIENCE)
            await delivery.ack()
        error = delivery.message.error
        assert error is not None
        return {"data": json.dumps(json.loads(delivery.message.body)["data"]), "reason": error.reason}

    return background.run(take())


def test_mails_are_sent_and_one_that_the_server_puts_off_is_sent_later(
    url: str, environment: dict[str, str], mail_server: tuple[MailServer, int], tmp_path: Path
) -> None:
    server, port = mail_server
    there = {**environment, "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(port), "MAIL_FROM": "lab@example.org"}
    send(url, "email", to=["ann@example.org", "bob@example.org"], subject="Grüße", body="It is ready.")
    send(url, "email", to=["busy@example.org"], subject="Later", body="Now.")

    with running(tmp_path / "log", there, "email_worker.py", cwd=HERE) as log:
        server.wait_for(2)
        wait_for(log, {"sent to 2, refused by 0", "sent to 1, refused by 0"})

    first, second = sorted(server.mails, key=lambda mail: str(mail["To"]))
    assert (first["To"], first["From"]) == ("ann@example.org, bob@example.org", "lab@example.org")
    assert first.get_payload().strip() == "It is ready."  # type: ignore[union-attr]
    assert second["Subject"] == "Later"
    assert first["Message-ID"] != second["Message-ID"]
    assert len(server.mails) == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"to": [], "subject": "x", "body": "y"}, "data.to"),
        ({"subject": "x", "body": "y"}, "data.to"),
        ({"to": ["a@b.c"], "subject": "x\nBcc: everyone@example.org", "body": "y"}, "no mail can be made of it"),
        ({"to": ["nobody@example.org"], "subject": "x", "body": "y"}, "no such user"),
    ],
    ids=["nobody to send to", "no field", "a forged header", "refused"],
)
def test_a_mail_that_cannot_be_sent_goes_to_the_error_queue(
    data: dict[str, Any],
    reason: str,
    url: str,
    environment: dict[str, str],
    mail_server: tuple[MailServer, int],
    tmp_path: Path,
) -> None:
    server, port = mail_server
    there = {**environment, "SMTP_HOST": "127.0.0.1", "SMTP_PORT": str(port)}
    send(url, "email", **data)

    with running(tmp_path / "log", there, "email_worker.py", cwd=HERE):
        error = failed(url)
    assert reason in error["reason"]
    assert server.mails == []


def test_a_folder_is_packed_and_the_sender_told(url: str, environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "storage" / "sample"
    (folder / "raw").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "raw" / "b.bin").write_bytes(b"\0" * 1000)
    (folder / "stolen.txt").symlink_to("/etc/hostname")  # leads out of the folder: left out
    for _ in range(2):  # the second time replaces the first
        send(url, "zip", folder="sample", archive="packages/sample.zip")

    answers = []
    with running(tmp_path / "log", environment, "zip_worker.py", cwd=HERE):
        while len(answers) < 2:
            found = receive_message_sync("tests", PATIENCE, url=url)
            assert found, (tmp_path / "log").read_text()
            answers += found

    assert [answer.data for answer in answers] == [{"archive": "packages/sample.zip", "files": 2}] * 2
    assert json.loads(answers[0].original_message)["data"]["folder"] == "sample"
    packages = tmp_path / "storage" / "packages"
    assert [path.name for path in packages.iterdir()] == ["sample.zip"]
    with zipfile.ZipFile(packages / "sample.zip") as packed:
        assert packed.namelist() == ["a.txt", "raw/b.bin"]
        assert packed.read("a.txt") == b"a"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"folder": "../outside", "archive": "x.zip"}, "not in the storage"),
        ({"folder": "sample", "archive": "/tmp/x.zip"}, "not in the storage"),
        ({"folder": ".", "archive": "x.zip"}, "not in the storage"),
        ({"folder": "nothing", "archive": "x.zip"}, "no folder"),
        ({"folder": "sample"}, "data.archive"),
    ],
)
def test_a_folder_that_cannot_be_packed_goes_to_the_error_queue(
    data: dict[str, str], reason: str, url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "storage" / "sample").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    send(url, "zip", **data)

    with running(tmp_path / "log", environment, "zip_worker.py", cwd=HERE):
        error = failed(url)
    assert reason in error["reason"]
