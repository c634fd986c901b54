"""`streamtools send` and `streamtools receive`."""

from __future__ import annotations

import asyncio
import base64
import json as json_module
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final

import typer

from streamtools.cli import output
from streamtools.cli.session import Json, Url, address, drive, plain_errors
from streamtools.wire import key_text

if TYPE_CHECKING:
    from streamtools.delivery import Delivery
    from streamtools.driver import Reader
    from streamtools.message import Message
    from streamtools.producer import Producer

#: The number of messages that are sent or received together.
BATCH: Final = 500
#: The most messages that `receive` holds without --ack.
HOLD: Final = 1_000
#: The number of messages that `receive` shows without --max and --follow.
SHOWN: Final = 10

Header = Annotated[list[str] | None, typer.Option("--header", "-H", metavar="NAME=VALUE", help="May be repeated.")]


def send(
    queue: Annotated[str, typer.Argument(metavar="QUEUE", help="The queue; created if it does not exist.")],
    payload: Annotated[
        str | None, typer.Argument(metavar="PAYLOAD", help="JSON, or text; - reads standard input.")
    ] = None,
    *,
    url: Url = None,
    header: Header = None,
    key: Annotated[str | None, typer.Option(help="Messages of one key keep their order.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="The name of the kind of payload.")] = None,
    delay: Annotated[float, typer.Option(min=0, help="Seconds before it may be received.")] = 0.0,
    ttl: Annotated[float | None, typer.Option(min=0, help="Seconds after which it is not handled any more.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="JSON lines, one message each; - is stdin.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the bytes as they are.")] = False,
    json: Json = False,
) -> None:
    """Send a message, or each line of a file.

    The id of a message is printed when the broker holds it. A payload that is JSON is sent as JSON, byte for byte;
    any other as text. Without --raw, every line of a file must be JSON, which is checked before the first one is
    sent. Lines are sent in confirmed batches of 500.
    """
    fields = {"headers": _headers(header or []), "key": key, "type": type_}
    template = Template(fields, delay=delay, ttl=ttl, raw=raw)
    if (payload is None) == (file is None):
        output.fail("say what to send: a payload, - for standard input, or --file.", output.USAGE)
    with plain_errors():
        producer = _producer(queue, url)
    if file is not None:
        size = _check_file(file, template)
        with open_lines(file) as stream, output.Bar("Sending") as bar:
            bar.expect(size)
            sent = drive(_send_lines(producer, stream, template, bar, as_json=json))
        output.note(f"{output.counted(sent, 'message')} sent to {queue}.")
    else:
        data = sys.stdin.buffer.read() if payload == "-" else (payload or "").encode("utf-8", "surrogateescape")
        drive(_send_one(producer, data, template, as_json=json))


def _headers(texts: Sequence[str]) -> dict[str, str]:
    from streamtools.validation.checks import check_headers

    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals:
            output.fail(f"--header {name!r} has no value: write --header name=value.", output.USAGE)
    with plain_errors():
        return check_headers({name: value for name, _, value in pairs})


class Template:
    """Makes the messages of one command from bytes, with the fields that they have in common.

    `Producer.send(data)` would parse JSON and write it again, but it must arrive as it was typed.
    """

    def __init__(self, fields: Mapping[str, Any], *, delay: float, ttl: float | None, raw: bool) -> None:
        from streamtools.message import id_generator
        from streamtools.validation.checks import check_seconds

        with plain_errors():
            check_seconds("--delay", delay)
            check_seconds("--ttl", ttl or 0.0)
        self._fields = fields
        self._delay = delay
        self._ttl = ttl
        self._raw = raw
        self._new_id = id_generator()

    def check(self, producer: Producer) -> None:
        """Check that the protocol can do what the options ask for.

        Raises:
            FeatureError: the protocol cannot delay messages.
        """
        if self._delay and not producer.features.delay:
            from streamtools.errors import FeatureError

            raise FeatureError(f"{producer.protocol!r} cannot delay messages: leave --delay out.")

    def make(self, body: bytes, queue: str) -> Message:
        """Return a message with this body."""
        from streamtools.message import Message

        now = time.time()
        return Message(
            body=body,
            queue=queue,
            id=self._new_id(),
            time=now,
            content_type=self._content_type(body),
            deliver_at=now + self._delay if self._delay else None,
            expires_at=None if self._ttl is None else now + self._ttl,
            **self._fields,
        )

    def _content_type(self, body: bytes) -> str:
        from streamtools import codec

        if self._raw:
            return codec.BINARY
        why = why_not_json(body)
        if why is None:
            return codec.JSON
        if body.lstrip()[:1] in (b"{", b"["):
            output.note(f"note: the payload is not JSON ({why}), so it is sent as text.")
        try:
            body.decode()
        except UnicodeDecodeError:
            output.fail("the payload is neither JSON nor UTF-8 text; send it with --raw.", output.USAGE)
        return codec.TEXT

    def check_lines(self, file: Path) -> None:
        """Check that every line of a file is JSON; with --raw any line is accepted.

        Raises:
            typer.Exit: a line is not JSON.
        """
        with file.open("rb") as stream:
            for number, line in _lines(stream):
                self.check_line(number, line)

    def check_line(self, number: int, line: bytes) -> None:
        """Check that a line is JSON; with --raw any line is accepted.

        Raises:
            typer.Exit: the line is not JSON.
        """
        if not self._raw and (why := why_not_json(line)):
            output.fail(f"line {number} is not JSON: {why}. Correct it, or send the lines unchanged with --raw.")


def why_not_json(data: bytes) -> str | None:
    """Return what is wrong with this JSON; None if nothing is wrong."""
    try:
        json_module.loads(data, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _producer(queue: str, url: str | None) -> Producer:
    from streamtools.producer import Producer

    if address(url).startswith("asyncio:"):
        output.note("note: asyncio:// queues exist only inside this process; no other program gets this message.")
    return Producer(queue, url=address(url))


async def _send_one(producer: Producer, data: bytes, template: Template, *, as_json: bool) -> None:
    async with producer:
        template.check(producer)
        receipts = await producer.send_messages([template.make(data, producer.queue)])
    _print_ids(receipts, as_json)


async def _send_lines(
    producer: Producer, stream: BinaryIO, template: Template, bar: output.Bar, *, as_json: bool
) -> int:
    sent = 0
    lines = _lines(stream)
    async with producer:
        template.check(producer)
        # Read in a thread: standard input may block, and the connection must stay alive meanwhile.
        while batch := await asyncio.to_thread(lambda: list(islice(lines, BATCH))):
            for number, line in batch:
                template.check_line(number, line)
            receipts = await producer.send_messages([template.make(line, producer.queue) for _, line in batch])
            sent += len(receipts)
            bar.advance(sum(len(line) + 1 for _, line in batch))
            if as_json:
                _print_ids(receipts, as_json)
    return sent


def open_lines(file: Path) -> AbstractContextManager[BinaryIO]:
    """Return the open file; for `-` standard input, which is not closed at the end."""
    return nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb")


def _check_file(file: Path, template: Template) -> int | None:
    """Check every line of a file before the first is sent; return the file's size, None for standard input."""
    if str(file) == "-":
        return None
    try:
        template.check_lines(file)
        return file.stat().st_size
    except OSError as error:
        output.fail(f"{file} cannot be read: {error.strerror}.", output.USAGE)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def _print_ids(receipts: Sequence[Any], as_json: bool) -> None:
    for receipt in receipts:
        if as_json:
            output.print_json({"id": receipt.id, "queue": receipt.queue})
        else:
            output.say(receipt.id)


def receive(
    queue: Annotated[str, typer.Argument(metavar="QUEUE", help="The queue; it must exist.")],
    *,
    url: Url = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    maximum: Annotated[
        int | None, typer.Option("--max", "-n", min=1, help=f"Messages at most; {SHOWN} unless --follow.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the next one, unless --follow.")] = 1.0,
    ack: Annotated[bool, typer.Option("--ack/--no-ack", help="Take them out of the queue.")] = False,
    json: Json = False,
) -> None:
    """Show messages. They stay in the queue, unless --ack.

    Without --ack, the messages go back in their order when the command ends, and no consumer gets them until then. On
    Kafka the consumers of the group continue meanwhile. With --ack, each message is acknowledged after it was
    printed, and is then gone.
    """
    limit = maximum if maximum is not None or follow else SHOWN
    show = _show_json if json else _show
    with plain_errors():
        viewer = Viewer(queue, address(url), limit, show, ack=ack)
    if (where := viewer.listens_at) is not None:
        output.note(f"note: {where} has no queues to read: this command itself listens there for messages.")
    try:
        drive(viewer.run(None if follow else timeout))
    except typer.Exit as end:
        if not follow or end.exit_code < 128:
            raise
    if not json:
        viewer.summary()


class Viewer:
    """Receives and shows messages.

    Parameters:
        limit: the most messages to show; None for no limit.
        show: prints a message.
        ack: whether to remove each message from the queue after it was shown.
    """

    def __init__(
        self, queue: str, url: str, limit: int | None, show: Callable[[Delivery], None], *, ack: bool
    ) -> None:
        from streamtools.admin import QueueAdmin
        from streamtools.consumer import Consumer

        self._queue = queue
        self._show = show
        self._ack = ack
        self._limit = limit
        #: The most messages to show; without --ack, not more than can be held unacknowledged.
        self._most = limit if ack else min(limit or HOLD, HOLD)
        self._prefetch = min(self._most or BATCH, HOLD)
        self._consumer = Consumer(queue, url=url, declare=False, prefetch=self._prefetch)
        self._source: Reader = self._consumer
        if not ack and self._consumer.features.admin:
            self._source = QueueAdmin(url=url)._viewer(queue, self._most or HOLD) or self._consumer
        self._shown = 0

    @property
    def listens_at(self) -> str | None:
        """The address at which this command itself listens, for protocols without a broker; None for others."""
        return self._consumer.settings.safe_url if self._consumer.features.listens else None

    async def run(self, timeout: float | None) -> None:
        """Show messages until the limit is reached, or until none comes for `timeout` seconds."""
        await self._source.open()
        try:
            while (room := self._room()) > 0:
                batch = await self._source.receive(room, timeout=timeout)
                if not batch:
                    break
                await self._take(batch)
        finally:
            await self._source.close()
        if not self._ack and self._shown == HOLD != self._limit:
            output.note(f"note: {HOLD:,} messages are held, which is the most; with --ack they leave the queue.")

    def _room(self) -> int:
        left = self._prefetch if self._most is None else self._most - self._shown
        return min(BATCH, self._prefetch, left)

    async def _take(self, batch: Sequence[Delivery]) -> None:
        for delivery in batch:
            self._show(delivery)
            self._shown += 1
        sys.stdout.flush()  # if nobody reads our output any more, this raises, and nothing is acknowledged
        if self._ack:
            await asyncio.gather(*(delivery.ack() for delivery in batch))

    def summary(self) -> None:
        """Print how many messages were shown, and whether they are still in the queue."""
        if not self._shown:
            output.note(f"{self._queue} has no message that is due.")
        else:
            what = "taken out of" if self._ack else "shown; they stay in"
            output.note(f"{output.counted(self._shown, 'message')} {what} {self._queue}.")


def as_data(message: Message) -> dict[str, Any]:
    """Return a message as JSON data, without fields that are not set; a body that is not text is in base64."""
    fields = ("id", "queue", "type", "source", "content_type", "correlation_id", "reply_to", "intent")
    data: dict[str, Any] = {name: value for name in fields if (value := getattr(message, name)) is not None}
    if message.key is not None:
        data |= (
            {"key_base64": base64.b64encode(message.key).decode()}
            if isinstance(message.key, bytes)
            else {"key": message.key}
        )
    for name in ("time", "deliver_at", "expires_at"):
        if (seconds := getattr(message, name)) is not None:
            data[name] = output.moment(seconds)
    return data | {"attempt": message.attempt, "headers": dict(message.headers), **_body(message)}


def _body(message: Message) -> dict[str, Any]:
    if message.body is None:
        return {"tombstone": True}
    if (message.content_type or "json").partition(";")[0].endswith("json"):
        # If the body is not JSON after all, or is nested too deeply to be written again, it is shown as text.
        with suppress(ValueError, RecursionError):
            payload = json_module.loads(message.body, parse_constant=_not_json)
            json_module.dumps(payload, indent=2)
            return {"payload": payload}
    with suppress(UnicodeDecodeError):
        return {"text": message.body.decode()}
    return {"base64": base64.b64encode(message.body).decode()}


def body_text(message: Message) -> str:
    """Return the body as a person reads it."""
    body = _body(message)
    if "payload" in body:
        return json_module.dumps(body["payload"], ensure_ascii=False, indent=2)
    if message.body is None:
        return "(no body: a tombstone)"
    return str(body.get("text", f"({len(message.body):,} bytes that are not text)"))


def _show_json(delivery: Delivery) -> None:
    output.print_json(as_data(delivery.message))


def _show(delivery: Delivery) -> None:
    message = delivery.message
    facts = [output.moment(message.time), message.type, message.key and f"key {key_text(message.key)}"]
    if message.attempt > 1:
        facts.append(f"attempt {message.attempt}")
    output.say(f"--- {message.id}  {'  '.join(fact for fact in facts if fact)}")
    for name, value in message.headers.items():
        output.say(f"{name}: {value}")
    output.say_block(body_text(message))
