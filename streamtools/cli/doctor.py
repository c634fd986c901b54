"""`streamtools doctor`: checks the configuration and the connection, and says how to fix what is wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from secrets import token_hex
from typing import TYPE_CHECKING, Final, Literal

import typer

from streamtools.cli import output
from streamtools.cli.session import Json, Url, address, drive, safe_address, source
from streamtools.protocols import LIBRARIES, URL_VARIABLE
from streamtools.text.installation import DISTRIBUTION

if TYPE_CHECKING:
    from streamtools.features import Features

#: Libraries that every protocol uses.
COMMON: Final = ("pydantic", "uvloop")
#: The most seconds of one step.
STEP_TIMEOUT: Final = 10.0

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        state: the result.
        found: the result in words.
        next: the line to type next, if something is wrong.
    """

    name: str
    state: State
    found: str
    next: str = ""


def doctor(*, url: Url = None, json: Json = False) -> None:
    """Check the configuration and the connection.

    Says which settings are used, where they come from, whether they work, and what to do if not. Sends one message
    through a temporary queue, which it deletes. Ends with 1 when something is wrong.
    """
    examination = Doctor(url)
    if examination.prepare():
        drive(examination.talk())
    checks = examination.checks
    if json:
        output.print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(output.FAILED)


class Doctor:
    """Runs one check after the other; if a check fails, those that depend on it are skipped."""

    def __init__(self, url: str | None) -> None:
        self._given = url
        self._url = address(url)
        #: The results so far.
        self.checks: list[Check] = []

    def prepare(self) -> bool:
        """Run the checks that need no connection; return False if connecting cannot work."""
        self._software()
        return self._address() and self._driver()

    async def talk(self) -> None:
        """Run the checks that need the broker."""
        if await self._step("connection", self._connect):
            await self._step("round trip", self._probe)
            await self._step("admin", self._look)

    def _add(self, name: str, state: State, found: str, then: str = "") -> None:
        self.checks.append(Check(name=name, state=state, found=found, next=then))

    # --- without a connection -------------------------------------------------------------------

    def _software(self) -> None:
        python = ".".join(map(str, sys.version_info[:3]))
        self._add("streamtools", "ok", f"{_version(DISTRIBUTION) or 'not installed as a package'}, Python {python}")
        found = [f"{name} {number}" for name in COMMON if (number := _version(name))]
        self._add("libraries", "ok", ", ".join(found))

    def _address(self) -> bool:
        from streamtools.errors import ConfigurationError

        where = source(self._given)
        try:
            shown = safe_address(self._given)
        except ConfigurationError as error:
            fix = f"export {URL_VARIABLE}=..., such as amqp://user:password@host/vhost"
            self._add("address", "failed", f"from {where}: {error}", fix)
            return False
        self._add("address", "ok", f"{shown}, from {where}")
        return True

    def _driver(self) -> bool:
        from streamtools.admin import ADMINS
        from streamtools.consumer import CONSUMER_LOOPS
        from streamtools.errors import ConfigurationError
        from streamtools.producer import PRODUCERS

        try:
            protocol = CONSUMER_LOOPS.protocol(self._url)
            self._features: Features = CONSUMER_LOOPS[protocol].features
            PRODUCERS[protocol]
            self._has_admin = protocol in ADMINS and self._features.admin
        except ConfigurationError as error:
            self._add("driver", "failed", str(error))
            return False
        found = [f"{name} {_version(name)}" for name in LIBRARIES.get(protocol, ())]
        if protocol == "sqlite":
            import sqlite3

            found = [f"SQLite {sqlite3.sqlite_version}"]
        self._add("driver", "ok", ", ".join([protocol, *found]))
        return True

    # --- with a connection ----------------------------------------------------------------------

    async def _step(self, name: str, step: Callable[[], Awaitable[tuple[State, str]]]) -> bool:
        """Run one check that needs the broker; an error becomes its result."""
        from streamtools.errors import StreamToolsError

        try:
            state, found = await step()
        except StreamToolsError as error:
            self._add(name, "failed", str(error), self._advice(name))
            return False
        self._add(name, state, found)
        return True

    def _advice(self, name: str) -> str:
        if name == "connection" and source(self._given) == "the default":
            return f"export {URL_VARIABLE}=..., if the broker is elsewhere"
        return f"streamtools doctor{' --url ...' if self._given else ''}, after you have fixed that"

    async def _connect(self) -> tuple[State, str]:
        from streamtools.producer import Producer

        if self._features.listens:
            return "skipped", "this protocol has no broker: a running consumer listens at that address"
        begin = time.monotonic()
        producer = Producer(self._queue("connection"), url=self._url, declare=False, send_timeout=STEP_TIMEOUT)
        async with producer:
            return "ok", f"in {1000 * (time.monotonic() - begin):.0f} ms"

    async def _probe(self) -> tuple[State, str]:
        from streamtools.consumer import Consumer
        from streamtools.producer import Producer

        if self._features.listens:
            return "skipped", "it needs a running consumer"
        queue = self._queue("probe")
        try:
            async with (
                Producer(queue, url=self._url, send_timeout=STEP_TIMEOUT) as producer,
                Consumer(queue, url=self._url, error_queue=queue, connect_timeout=STEP_TIMEOUT) as consumer,
            ):
                begin = time.monotonic()
                receipt = await producer.send({"probe": True})
                deliveries = await consumer.receive(timeout=STEP_TIMEOUT)
                if [delivery.message.id for delivery in deliveries] != [receipt.id]:
                    return "failed", f"sent one message to {queue!r}, but it did not arrive within {STEP_TIMEOUT:g} s"
                await deliveries[0].ack()
                return "ok", f"sent, received and acknowledged in {1000 * (time.monotonic() - begin):.0f} ms"
        finally:
            await self._remove(queue)

    async def _look(self) -> tuple[State, str]:
        from streamtools.admin import QueueAdmin
        from streamtools.errors import ConnectError

        if not self._has_admin:
            return "skipped", "this protocol has no queues to look at"
        async with QueueAdmin(url=self._url) as admin:
            try:
                infos = await admin.list()
            except ConnectError as error:
                if any(check.state == "failed" for check in self.checks):
                    raise
                # The connection for messages works, as the checks before have shown.
                return "warning", f"{error} Everything but listing queues works without it."
        waiting = sum(info.ready + (info.delayed or 0) for info in infos)
        text = f"{output.counted(len(infos), 'queue')}, "
        text += f"{waiting:,} message{' waits' if waiting == 1 else 's wait'}"
        failed = next((info.ready for info in infos if info.name == "error"), 0)
        if failed:
            return "warning", f"{text}; {failed:,} failed: streamtools errors list"
        return "ok", text

    def _queue(self, purpose: str) -> str:
        return f"streamtools-doctor-{purpose}-{token_hex(4)}"

    async def _remove(self, queue: str) -> None:
        from streamtools.admin import QueueAdmin
        from streamtools.errors import StreamToolsError

        with suppress(StreamToolsError):  # it was never created, or the connection is gone, which the check reports
            async with QueueAdmin(url=self._url) as admin:
                await admin.delete(queue)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(checks: Sequence[Check]) -> None:
    signs = {"ok": "ok", "warning": "warning", "failed": "FAILED", "skipped": "skipped"}
    output.print_table(
        output.table("", "check", "", "found"), [(check.name, signs[check.state], check.found) for check in checks]
    )
    for check in checks:
        if check.next:
            output.say(f"Next, for {check.name}: {check.next}")
    if all(check.state != "failed" for check in checks):
        output.say("All is well.")
