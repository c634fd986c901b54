"""A reader who does all that a page says, in an empty directory."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.pages.markdown import ROOT, Block, Page
from tests.pages.notebook import Notebook
from tests.pages.terminal import Terminal, check, shims

#: How pages write the address of a RabbitMQ and of a Kafka; the tests' own stand in for them.
RABBITMQ = "amqp://guest:guest@localhost/"
KAFKA = "kafka://localhost:9092"
#: Ports that pages name; free ones stand in for them.
PORTS = ("9000", "8080")


def broker_of(block: Block) -> str | None:
    """Which broker it runs on; None for none."""
    if block.language in ("python", "console"):
        for name, address in (("rabbitmq", RABBITMQ), ("kafka", KAFKA)):
            if address in block.text:
                return name
    return None


class Reader:
    """Runs the blocks of a page in order: files are written, commands typed, Python run; see `markdown`.

    Parameters:
        directory: an empty one.
        broker: a RabbitMQ or a Kafka. Without one the blocks that need it are left out; with one they alone are
            run, on the files that the page writes.
    """

    def __init__(self, directory: Path, broker: RabbitMQAddress | KafkaAddress | None = None) -> None:
        self._broker = broker
        self._page = directory / "page"
        self._page.mkdir()
        self._stand_ins = self._addresses()
        environment = self._environment(shims(directory / "bin"))
        self._terminal = Terminal(self._page, environment, self._as_run, self._as_written)
        self._notebook = Notebook(self._page, environment)

    def read(self, page: Page) -> None:
        """Do what it says; an AssertionError names the block that does not hold."""
        blocks = page.blocks
        try:
            for position, block in enumerate(blocks):
                if not block.title and broker_of(block) != (self._broker and self._broker.broker):
                    continue
                try:
                    self._do(block, blocks[position + 1 :])
                except AssertionError as error:
                    raise AssertionError(f"{page.path}, line {block.line}: {self._as_written(str(error))}") from None
            self._terminal.close()
            self._notebook.close()
        finally:
            self._terminal.kill()
            self._notebook.kill()

    def _do(self, block: Block, following: Sequence[Block]) -> None:
        if block.title:
            self._write(block.title, self._as_run(block.text))
        elif block.language == "python":
            promised = following[0].text if following and following[0].language == "text" else ""
            check(promised, self._as_written(self._notebook.run(self._as_run(block.text))))
        elif block.language == "console":
            self._terminal.run(block.text)

    def _write(self, name: str, text: str) -> None:
        file = self._page / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
        if file.suffix == ".py":
            code = f"import runpy; runpy.run_path({name!r}, run_name='page')"
            done = self._terminal.python(code)
            assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

    # --- what stands in for what ----------------------------------------------------------------

    def _addresses(self) -> dict[str, str]:
        found = {port: _free_port() for port in PORTS}
        if isinstance(self._broker, RabbitMQAddress):
            found[RABBITMQ] = self._broker.url
        elif self._broker is not None:
            found[KAFKA] = self._broker.url.rstrip("/")
        return found

    def _environment(self, programs: Path) -> Mapping[str, str]:
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "120",
            "HTTP_PORT": self._stand_ins["9000"],
        }
        if isinstance(self._broker, RabbitMQAddress) and self._broker.management_url is not None:
            environment["RMQ_MANAGEMENT_URL"] = self._broker.management_url
        return environment

    def _as_run(self, text: str) -> str:
        for written, used in self._stand_ins.items():
            text = re.sub(rf"(?<!\w){re.escape(written)}", used, text)
        return text

    def _as_written(self, text: str) -> str:
        for written, used in self._stand_ins.items():
            if written == RABBITMQ:
                address = urlsplit(used)
                text = text.replace(f"{address.netloc.rpartition('@')[2]}{address.path}", "localhost:5672/%2F")
                text = text.replace(address.netloc.rpartition("@")[2], "localhost:5672")
            elif written == KAFKA:
                text = text.replace(urlsplit(used).netloc, urlsplit(written).netloc)
            else:
                text = text.replace(used, written)
        return text


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])
