"""Producer: sends messages and returns once the broker holds them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, Self, Unpack

from pydantic import BaseModel

from streamtools import codec
from streamtools.driver import Options, ProducerHooks
from streamtools.engine.backoff import backoff_within
from streamtools.engine.endpoint import Endpoint, Wrapper
from streamtools.engine.messages.times import refusal, wrong_time
from streamtools.engine.options import parameters, read_options
from streamtools.engine.outbox import Outbox, current_outbox
from streamtools.engine.tasks.cancellation import stray_cancellation_as_lost
from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost, FeatureError, OptionError, SendError
from streamtools.message import NO_HEADERS, Drafts, Message, id_generator
from streamtools.options import AnyProducerOptions, AnySendOptions
from streamtools.protocols import SEND_OPTIONS, targets, that_can
from streamtools.receipt import Receipt as Receipt
from streamtools.registry import Registry
from streamtools.validation.checks import Declare, Seconds, check_headers, check_seconds, check_texts
from streamtools.wire import checked_key

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Protocol name to producer class.
PRODUCERS: Registry[Producer] = Registry("producer", targets("producer"))


class Gathering:
    """A producer's messages in an outbox.

    Parameters:
        producer: whose.
        options: the protocol's own. Messages with options cannot be sent with a consumer's acknowledgement.
    """

    def __init__(self, producer: Producer, options: Any = None) -> None:
        self._producer = producer
        self._options = options

    @property
    def place(self) -> object:
        """The producer's; None with options, because only the producer can send with them."""
        return self._producer.place if self._options is None else None

    async def prepare(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, unchanged."""
        return messages

    async def send_now(self, messages: Sequence[Message]) -> list[Receipt]:
        """Send them; returns once they are confirmed.

        Raises:
            SendError: some were refused.
        """
        here = self._producer._here()  # a handler in a thread may have given them in another event loop
        return await here._deliver(messages, here._no_options if self._options is None else self._options)


#: Queues that an error names at most.
PLACES: Final = 3


class TransportWrapper(Wrapper, Protocol):
    """What stands between a producer and its driver."""

    async def _send(self, batch: Sequence[Message], options: Any) -> Sequence[Receipt] | None: ...

    def for_producer(self, producer: Producer) -> TransportWrapper:
        """A wrapper for another producer: the twin in a second event loop."""
        ...


class Producer(ProducerHooks, Endpoint):
    """Sends messages to one queue.

    `Producer("orders", url="amqp://...")` picks the protocol by the URL; `PRODUCERS["rabbitmq"]("orders")`
    picks it by name. Safe to use from many tasks at once, and in any number of event loops, one after the other or in
    several threads: it has a connection in each, which is closed when that loop ends.

    Parameters:
        queue: the queue's name.
        url: the address, or a settings object such as `RabbitMQSettings(...)`; see `streamtools.settings`.
        declare: create the queue if it does not exist (True), never (False: sending to a missing queue is an error),
            or only check that it exists ("passive").
        send_timeout: seconds for which `send` keeps trying if the connection is lost.
        client_id: this producer's name, as the source of messages, and as the broker shows it with its connections.
        host: the host, for protocols whose address is only a host and a port (HTTP); others ignore it.
        port: the port, for the same protocols.
        outbox: in a handler, messages wait until the handler has succeeded, and are sent before its message is
            acknowledged. Otherwise, and elsewhere, `send` returns when the broker holds the message.
        options: options of the protocol; those of another built-in protocol are ignored, with a line in the log.
            RabbitMQ: `arguments`, `auto_delete`, `durable`, `error_arguments`, `error_declare`, `error_queue`,
            `exclusive`, `queue_type`. Kafka: `method`, `partitions`, `replication`. HTTP: `method`.

    Raises:
        ConfigurationError: a name, a URL or an option that cannot work.
        TypeError: an option that no protocol knows.
    """

    wrapper: TransportWrapper | None = None
    _no_options: Options
    _new_id: Callable[[], str]
    _outbox: bool
    _gathering: Gathering

    def __init_subclass__(cls, protocol: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if protocol is not None:
            cls._check_names(Producer)
            cls.protocol = protocol
            PRODUCERS[protocol] = cls

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        kind: Any = PRODUCERS.of_url(options.get("url")) if cls is Producer else cls
        return super().__new__(kind, *arguments, **options)  # type: ignore[no-any-return]

    def __init__(
        self,
        queue: str,
        *,
        url: str | ProtocolSettings | None = None,
        declare: Declare = True,
        send_timeout: Seconds = 30.0,
        client_id: str | None = None,
        host: str | None = None,
        port: int | None = None,
        outbox: bool = False,
        **options: Unpack[AnyProducerOptions],
    ) -> None:
        self._set_up(queue, url, declare, client_id, host, port)
        self.send_timeout: float = check_seconds("send_timeout", send_timeout)
        if not self.send_timeout:
            raise ConfigurationError("send_timeout=0 leaves no time to send anything.")
        self._read_options(options, Producer.__init__)
        #: Exchanges that are missing are made, where the protocol has exchanges.
        self.declares_exchanges: bool = declare is True
        self._no_options = self.send_options_class()
        ids = id_generator()
        self._new_id: Callable[[], str] = ids.__call__
        self._take_ids: Callable[[int], list[str]] = ids.take
        self._outbox = outbox
        self._gathering = Gathering(self)

    # --- for users ------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect and declare the queue. Safe to repeat; opens again after `close()`.

        Raises:
            ConnectError: the broker cannot be reached within `send_timeout`, or refuses us.
            QueueError: the queue is missing (declare="passive") or has other arguments.
        """
        here = self._reopen()
        await here._connect(time.monotonic() + self.send_timeout)
        return self

    async def send(
        self,
        payload: object,
        *,
        headers: Mapping[str, str] | None = None,
        key: str | bytes | None = None,
        type: str | None = None,  # noqa: A002 - the field's name everywhere
        delay: Seconds | None = None,
        ttl: Seconds | None = None,
        id: str | None = None,  # noqa: A002
        correlation_id: str | None = None,
        reply_to: str | None = None,
        tombstone: bool = False,
        **options: Unpack[AnySendOptions],
    ) -> Receipt:
        """Send one message. Returns when the broker holds it; with `outbox=True` in a handler, at once.

        Parameters:
            payload: `str` goes as UTF-8 text, `bytes` untouched, everything else as JSON.
            headers: the user's own, `str -> str`, 64 KiB at most.
            key: messages with the same key keep their order, for consumers with `ordered_by="key"`.
            type: the name of the kind of payload.
            delay: seconds, or a timedelta, before it may be received.
            ttl: seconds, or a timedelta, after which it is not handled any more.
            id: unique; to repeat a send safely, use the same. Generated if None: the same when a handler runs again.
            correlation_id: the id of the conversation; in a handler, that of the handled message when not given.
            reply_to: the address for a reply.
            tombstone: with a payload of None and a `key`: what the key names was deleted (`Features.tombstones`).
            options: the protocol's own. Kafka: `method`, `partition`, `timestamp`, `wait`. HTTP: `endpoint`,
                `header_tag`, `headers_tag`, `method`.

        Raises:
            SendError: the broker refused it, or did not confirm it within `send_timeout`.
            ConnectError: the broker refuses the connection for good, such as for a wrong password.
            TypeError: the payload, a header or an option has the wrong type.
        """
        here = self._here()
        meta = here._common(headers, key, type, delay, ttl, correlation_id, reply_to)
        message = here._tombstone(payload, id, meta) if tombstone else here._encode(payload, id, meta)
        return (await here._let_go([message], here._read_send_options(options)))[0]

    async def send_many(
        self,
        payloads: Iterable[object],
        *,
        headers: Mapping[str, str] | None = None,
        key: str | bytes | None = None,
        type: str | None = None,  # noqa: A002
        delay: Seconds | None = None,
        ttl: Seconds | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        **options: Unpack[AnySendOptions],
    ) -> list[Receipt]:
        """Send many messages in one confirmed batch, in order; parameters as for `send`.

        Raises:
            SendError: the broker is not known to hold some of them; `.refused` and `.unknown` have their ids,
                `.messages` has them.
            TypeError: one payload is given instead of several.
        """
        _check_several(payloads)
        here = self._here()
        meta = here._common(headers, key, type, delay, ttl, correlation_id, reply_to)
        batch = here._drafts(payloads, meta)
        return await here._let_go(batch, here._read_send_options(options, Producer.send_many)) if batch else []

    async def send_messages(self, batch: Sequence[Message]) -> list[Receipt]:
        """Send complete messages, each to its own `queue`; for copies and bridges.

        Raises:
            SendError: the broker is not known to hold some of them; `.messages` has exactly these, whatever their ids
                are. A message with an impossible time (NaN, infinity, milliseconds) is refused without the others.
            FeatureError: one is a tombstone, which this protocol cannot carry.
        """
        if not self.features.tombstones and any(message.body is None for message in batch):
            raise self._no_tombstones()
        here = self._here()
        for message in batch:  # most have no such time
            if (message.deliver_at is not None or message.expires_at is not None) and wrong_time(message) is not None:
                return await here._deliver_others(batch)
        return await here._deliver(batch, here._no_options) if batch else []

    async def flush(self) -> None:
        """Wait until all messages of `send(wait=False)` are confirmed or have failed.

        Raises:
            SendError: naming those that failed since the last `flush()`.
        """

    # --- the way of a message -------------------------------------------------------------------

    def _make_twin(self) -> Self:
        twin = super()._make_twin()
        if self.wrapper is not None:
            twin.wrapper = self.wrapper.for_producer(twin)
        return twin

    def _let_go(self, batch: Sequence[Message], options: Any) -> Coroutine[Any, Any, list[Receipt]]:
        """Send, or put into the outbox of the handler around this code."""
        box = current_outbox() if self._outbox else None
        return self._deliver(batch, options) if box is None else self._gather(batch, options, box)

    async def _gather(self, batch: Sequence[Message], options: Any, box: Outbox) -> list[Receipt]:
        if not self._connected:  # connecting makes the queue
            await self._connect(time.monotonic() + self.send_timeout)
        sender = self._gathering if options is self._no_options else Gathering(self, options)
        return [box.add(sender, message).receipt for message in batch]

    def _next_id(self) -> str:
        box = current_outbox()
        return (box.id(self.queue) if box is not None else None) or self._new_id()

    def _next_ids(self, number: int) -> list[str]:
        return self._take_ids(number) if current_outbox() is None else [self._next_id() for _ in range(number)]

    def _encode(self, payload: object, id: str | None, common: dict[str, Any]) -> Message:  # noqa: A002
        if id is not None:
            check_texts({"id": id})
        body, content_type = codec.encode(payload)
        new_id = self._new_id if current_outbox() is None else self._next_id
        return Message(body=body, content_type=content_type, id=id or new_id(), **common)

    def _tombstone(self, payload: object, id: str | None, common: dict[str, Any]) -> Message:  # noqa: A002
        if not self.features.tombstones:
            raise self._no_tombstones()
        if payload is not None or common["key"] is None:
            raise ConfigurationError("A tombstone has a key and no payload: send(None, key=..., tombstone=True).")
        check_texts({"id": id})
        return Message(body=None, id=id or self._next_id(), **common)

    def _no_tombstones(self) -> FeatureError:
        return FeatureError(
            f"{self.protocol!r} carries no tombstones (messages without a body): send a payload that says that the "
            f"key was deleted. {that_can('tombstones')} carries them."
        )

    def _drafts(self, payloads: Iterable[object], common: dict[str, Any]) -> Sequence[Message]:
        encoded = [codec.encode(payload) for payload in payloads]
        if not encoded:
            return []
        ids = self._next_ids(len(encoded))
        bodies, content_types = zip(*encoded, strict=True)
        if len(set(content_types)) == 1:
            return Drafts({**common, "content_type": content_types[0]}, bodies, ids)
        return [
            Message(**common, content_type=content_type, body=body, id=id)
            for (body, content_type), id in zip(encoded, ids, strict=True)
        ]

    def _common(
        self,
        headers: Mapping[str, str] | None,
        key: str | bytes | None,
        type: str | None,  # noqa: A002
        delay: Seconds | None,
        ttl: Seconds | None,
        correlation_id: str | None,
        reply_to: str | None,
    ) -> dict[str, Any]:
        """The fields of a message beside body, content type and id, checked."""
        if delay and not self.features.delay:
            raise FeatureError(
                f"{self.protocol!r} cannot delay messages: leave delay= away, or send it later yourself."
            )
        if not (type is None and correlation_id is None and reply_to is None):
            check_texts({"type": type, "correlation_id": correlation_id, "reply_to": reply_to})
        wait = 0.0 if delay is None else check_seconds("delay", delay)
        now = time.time()
        box = current_outbox()
        incoming = box.incoming if box is not None else None
        return {
            "queue": self.queue,
            "source": self.client_id,
            "time": now,
            "headers": check_headers(headers) if headers else NO_HEADERS,
            "deliver_at": now + wait if wait else None,
            "expires_at": None if ttl is None else now + check_seconds("ttl", ttl),
            "type": type,
            "key": None if key is None else checked_key(key),
            "correlation_id": correlation_id or (incoming and (incoming.correlation_id or incoming.id)),
            "causation_id": incoming and incoming.id,
            "reply_to": reply_to,
        }

    async def _deliver_others(self, batch: Sequence[Message]) -> NoReturn:
        """Send the messages whose times are right, and then refuse the others."""
        unfit = [message for message in batch if wrong_time(message) is not None]
        try:
            if others := [message for message in batch if wrong_time(message) is None]:
                await self._deliver(others, self._no_options)
        except SendError as error:
            raise refusal(unfit, error) from error
        raise refusal(unfit)

    async def _deliver(self, batch: Sequence[Message], options: Any) -> list[Receipt]:
        """Send through reconnects until the deadline; what is not confirmed then is named."""
        deadline = time.monotonic() + self.send_timeout
        failures: list[ConnectError] = []
        doubt = False  # the broker may hold some of it
        while True:
            connected, opened = False, 0
            try:
                if not self._connected:
                    await self._connect(deadline, failures)
                connected, opened = True, self._opened
                async with asyncio.timeout_at(_loop_time(deadline)):
                    receipts = await stray_cancellation_as_lost((self.wrapper or self)._send(batch, options))
                return _receipts(batch) if receipts is None else list(receipts)
            except TimeoutError as error:
                raise self._unconfirmed(batch, self._why_unconfirmed(), doubt=True) from error
            except SendError as error:
                error.messages = error.messages or error.among(batch, {*error.refused, *error.unknown})
                raise
            except ConnectError as error:
                failures.append(error)
                if connected and opened == self._opened:  # else another send has connected anew meanwhile
                    self._connected = False
                doubt = doubt or (connected and isinstance(error, ConnectionLost))
                if error.permanent:
                    raise
                delay = backoff_within(len(failures), deadline - time.monotonic())
                if not connected or delay is None:  # connecting has used up the time already
                    raise self._unconfirmed(batch, str(error), doubt=doubt) from error
                await asyncio.sleep(delay)

    async def _connect(self, deadline: float, before: Sequence[ConnectError] = ()) -> None:
        failures = [*before[-1:]]  # if no time is left for another attempt, this is the reason
        try:
            async with asyncio.timeout_at(_loop_time(deadline)), self._opening:
                await self._keep_connecting(deadline, failures)
        except TimeoutError as error:
            if failures:
                raise failures[-1] from error
            raise ConnectError(
                f"{self!r} was not connected within {self.send_timeout:g} s; does anything answer there?"
            ) from error

    def _unconfirmed(self, batch: Sequence[Message], why: str, *, doubt: bool) -> SendError:
        several = len(batch) > 1
        end = f"The broker may hold {'them' if several else 'it'}; send again with the same id to be sure."
        return SendError(
            f"{len(batch)} message{'s' if several else ''} to {_places(batch)} not confirmed within "
            f"{self.send_timeout:g} s: {why} {end if doubt else 'Nothing of it has reached the broker.'}",
            unknown=[m.id for m in batch],
            messages=batch,
        )

    def _read_send_options(self, given: Mapping[str, Any], verb: Callable[..., Any] | None = None) -> Options:
        if not given:
            return self._no_options
        verb = verb or Producer.send
        owner = f"{type(self).__name__}.{verb.__name__}"
        if "id" in given and "id" not in parameters(verb):
            raise OptionError(f"{owner} gives each message an id itself: await send(..., id=...) for each.")
        options, foreign = read_options(
            self.send_options_class, given, known=SEND_OPTIONS, own=parameters(verb), owner=owner
        )
        self._note_ignored(foreign)
        return options


def _check_several(payloads: object) -> None:
    """Check that these are several payloads, not one, of which the keys, letters or fields would be sent.

    Raises:
        TypeError: it is one payload.
    """
    record = isinstance(payloads, tuple) and hasattr(payloads, "_fields")
    if isinstance(payloads, AsyncIterable):
        how = "collect the payloads first, as in send_many([each async for each in payloads])"
    elif inspect.isawaitable(payloads):
        how = "await it first"
    elif isinstance(payloads, Message):
        how = "a message that is complete goes by send_messages([message])"
    elif isinstance(payloads, str | bytes | bytearray | memoryview | Mapping | BaseModel) or record:
        how = "write send(payload), or send_many([payload])"
    elif not isinstance(payloads, Iterable):
        how = "write send(payload), or send_many([payload])"
    else:
        return
    raise TypeError(f"send_many() takes a list of payloads, and this is one {type(payloads).__name__}: {how}.")


def _receipts(batch: Sequence[Message]) -> list[Receipt]:
    if isinstance(batch, Drafts):  # whose messages nobody has asked for
        return [Receipt(id, batch.common["queue"]) for id in batch.ids]
    return [Receipt(message.id, message.queue) for message in batch]


def _places(batch: Sequence[Message]) -> str:
    """The queues of a batch in words: a bus sends to many queues over one producer."""
    places = [repr(name) for name in dict.fromkeys(message.queue for message in batch)]
    return ", ".join(places) if len(places) <= PLACES else f"{places[0]} and {len(places) - 1} other queues"


def _loop_time(deadline: float) -> float:
    return asyncio.get_running_loop().time() + deadline - time.monotonic()
