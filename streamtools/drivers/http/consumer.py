"""HTTPConsumer: each request is a message, and the settlement of the message is the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Unpack
from urllib.parse import quote, unquote

from streamtools.consumer import Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.http.access import Access
from streamtools.drivers.http.options import (
    FEATURES,
    ConsumerOptions,
    HTTPConsumerParameters,
    check_queue,
    is_url,
    refuse_reply,
)
from streamtools.drivers.http.producer import HTTPProducer
from streamtools.drivers.http.request_queue import PendingRequest, RequestQueue
from streamtools.drivers.http.responses import settlement_response
from streamtools.drivers.http.server import SharedServer
from streamtools.drivers.http.tls import server_context
from streamtools.errors import Closed, ConfigurationError, ConnectError, SendError
from streamtools.message import Message
from streamtools.settings import HTTPSettings

#: If the settings have tokens, the handler does not get these headers.
CREDENTIALS: Final = frozenset({b"authorization"})

log: logging.Logger = logging.getLogger("streamtools")


class HTTPConsumer(Consumer, protocol="http"):
    """Takes requests to `/<queue name>` and answers them with what the handler returns.

    All consumers of one event loop with the same host and port share that port. With `port=0` the system chooses a
    free port, which `address` returns.

    The answer is 200 with the value that the handler returned, or 202 if it returned none, or the message was dropped
    or had expired. It is 400 if the body cannot be decoded, 404 for an unknown path, 405 for a wrong method, 408 if
    the body does not arrive, 413 if the body is larger than `max_body`, 422 if the body is not valid or the handler
    rejected the message, and 431 if there are too many headers. If the handler failed, the answer is 503 with
    Retry-After while the retry policy has attempts left, then 500. The sender counts the attempts in `ce-attempt`;
    the answer 503 tells it the next number. If `prefetch` requests already wait, further ones are answered 503 at
    once.

    The settings `tokens`, `client_ca`, `hosts` and `origins` say which requests are allowed. All others are answered
    401, 403 or 421. A content type that is not in the option `content_types` is answered 415.

    Parameters beyond those of `Consumer`:
        method: "POST" (the default), "GET" (the body if there is one, else the query as a flat
            mapping, in which repeated keys are a list), "DELETE" (likewise), "PUT" or "PATCH".
        max_body: the largest body in bytes, compressed or not; 1 MiB by default, from the settings.
        content_types: the content types to accept, such as ["application/json", "text/*"]; None for any.
    """

    features = FEATURES
    settings_class: ClassVar[type[HTTPSettings]] = HTTPSettings
    options_class: ClassVar[type[ConsumerOptions]] = ConsumerOptions
    settings: HTTPSettings
    options: ConsumerOptions
    _server: SharedServer | None = None
    _requests: RequestQueue | None = None
    _sender: HTTPProducer | None = None

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        def __init__(self, queue: str, **options: Unpack[HTTPConsumerParameters]) -> None: ...

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port to listen on; while the consumer is open, the port that it really has."""
        if self._server is not None:
            return self._server.address
        host, port = self.settings.address
        return (host if self.host is None else self.host), (port if self.port is None else self.port)

    @property
    def endpoint(self) -> str:
        """The URL that requests go to."""
        host, port = self.address
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.settings.tls else 'http'}://{host}:{port}{quote(self._path)}"

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        check_queue(queue)
        if is_url(queue):
            raise ConfigurationError(
                "A consumer takes the name of a queue, not a URL: give the address as url=, or as host= and port=."
            )

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        refuse_reply()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.options.method} {self.endpoint}>"

    @property
    def _path(self) -> str:
        return f"{unquote(self.settings.prefix)}/{self.queue}"

    async def _open(self) -> None:
        await self._close()
        settings = self.settings
        tls = await server_context(settings)
        terms = (settings.tls, settings.certfile, settings.keyfile, settings.client_ca)
        server = SharedServer.of(*self.address, tls, terms, Access.of(settings), settings.max_connections)
        requests = RequestQueue(
            self.queue,
            self.options.method,
            limit=self.prefetch,
            max_body=self.options.max_body or settings.max_body,
            body_timeout=settings.timeout,
            content_types=self.options.content_types,
            hidden=CREDENTIALS if settings.tokens else frozenset(),
        )
        await server.join(self._path, requests)
        self._server, self._requests = server, requests

    async def _receive(self, limit: int) -> Sequence[Delivery]:
        requests = self._requests
        calls = await requests.take(limit) if requests is not None else []
        if not calls:
            raise Closed(f"{self!r} was closed while it waited for requests.")
        return [Delivery(call.message, call) for call in calls]

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        results = [self._settle_one(settlement) for settlement in settlements if settlement.outgoing]
        for settlement in settlements:
            if not settlement.outgoing:
                _answer(settlement)
        # All are sent at once, so that a receiver that does not answer delays only its own messages.
        refused = [error for error in await asyncio.gather(*results) if error is not None]
        if refused:
            raise SendError(
                str(refused[0]),
                refused=[each for error in refused for each in error.refused],
                unknown=[each for error in refused for each in error.unknown],
                messages=[each for error in refused for each in error.messages],
            ) from refused[0]

    async def _settle_one(self, settlement: Settlement) -> SendError | None:
        """Send the handler's messages, and answer the request; return the error of sending if it failed."""
        # A reply goes only into the answer: nobody who sends a request may choose an address for us to send to.
        replies = [message for message in settlement.outgoing if message.intent == "reply"]
        call: PendingRequest = settlement.delivery.token
        outgoing = [message for message in settlement.outgoing if message.intent != "reply"]
        if outgoing and not call.done:
            try:
                await self._send_on(outgoing)
            except SendError as error:
                if not call.gone:
                    return error
                log.warning("%r: the client has left, and the messages of its handler are lost: %s", self, error)
        _answer(settlement, replies[-1] if replies else None)
        return None

    async def _send_on(self, messages: Sequence[Message]) -> None:
        if self._sender is None:
            self._sender = HTTPProducer(self.queue, url=self.settings, client_id=self.client_id)
        try:
            await self._sender.send_messages(messages)
        except SendError:
            raise
        except (
            ConnectError,
            ConfigurationError,
        ) as error:  # an error of that receiver must not reconnect our own port
            ids = [message.id for message in messages]
            raise SendError(str(error), refused=ids, messages=messages) from error

    async def _stop(self) -> None:
        if self._requests is not None and self._server is not None:
            self._requests.stop()
            self._server.drain()

    async def _close(self) -> None:
        requests, self._requests = self._requests, None
        server, self._server = self._server, None
        sender, self._sender = self._sender, None
        if requests is not None and server is not None:
            requests.close()
            await server.leave()
        if sender is not None:
            await sender.close()


def _answer(settlement: Settlement, reply: Message | None = None) -> None:
    call: PendingRequest = settlement.delivery.token
    call.answer(partial(settlement_response, settlement, reply))
