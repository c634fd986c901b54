"""HTTPProducer: each message is a request, and the answer confirms the message."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Unpack
from urllib.parse import quote, urlencode

import aiohttp
from pydantic_core import from_json
from yarl import URL

from streamtools import codec
from streamtools.driver import Options
from streamtools.drivers.http.headers import CE_ATTEMPT, encode_headers, transfer_coding
from streamtools.drivers.http.options import (
    FEATURES,
    QUERY_METHODS,
    HTTPProducerParameters,
    HTTPSendManyParameters,
    HTTPSendParameters,
    ProducerOptions,
    SendOptions,
    check_queue,
    is_url,
    refuse_reply,
)
from streamtools.drivers.http.tls import client_context
from streamtools.drivers.http.troubles import passes
from streamtools.engine.backoff import backoff
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.engine.tls import warn_unverified
from streamtools.errors import (
    Closed,
    ConfigurationError,
    ConnectError,
    ConnectionLost,
    DecodeError,
    ResponseError,
    SendError,
)
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.settings import HTTPSettings
from streamtools.validation.bodies import TooLarge, can_decompress, decompressed

#: The most connections of one producer; further sends wait until a connection is free.
CONNECTIONS: Final = 1000
#: The most seconds to wait for a new connection.
CONNECT_TIMEOUT: Final = 10.0
#: The longest header of an answer, in bytes.
MAX_FIELD: Final = 16 * 1024
#: Content encodings of an answer that the producer decompresses.
ENCODINGS: Final = "gzip, deflate"
#: The producer gives up this many seconds before `send_timeout`: its error says more than that of its base class.
MARGIN: Final = 0.05
#: The most of an answer that an error's text quotes, in characters.
EXCERPT: Final = 200
#: The longest text that is read as a time, in characters.
TIME_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class HTTPReceipt(Receipt):
    """The answer to a request, which `send` returns.

    Attributes:
        status: the HTTP status code, 200 to 299.
        headers: the headers of the answer, found in upper or lower case.
        body: the body of the answer, decompressed.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the JSON data of the body.

        Raises:
            DecodeError: the body is not JSON; it is empty (status 202) if the handler returned no value.
        """
        try:
            return from_json(self.body)
        except ValueError as error:
            raise DecodeError(f"The answer {self.status} is not JSON: {error}") from error


@dataclass(slots=True)
class _Request:
    """The request for a message; it is made once, and used for every attempt to send it."""

    method: str
    url: URL
    headers: dict[str, str] = field(repr=False)
    body: bytes
    attempt: int

    @property
    def where(self) -> str:
        """The method and the URL, as an error names them."""
        return f"{self.method} {_shown(self.url)}"


class _Sending:
    """The state of one call of `send` or `send_many`: after a reconnect, only unanswered messages are sent again."""

    def __init__(self, options: Any, number: int, deadline: float) -> None:
        self.options = options
        self.deadline = deadline
        self.requests: list[_Request | None] = [None] * number
        self.receipts: list[HTTPReceipt | None] = [None] * number
        self.refusals: dict[int, ResponseError] = {}
        #: The position of the message whose answer is awaited.
        self.asking = 0


class HTTPProducer(Producer, protocol="http"):
    """Sends each message as a request, and returns the answer.

    The queue is a name, whose messages go to `/<name>` at the address, or it is an absolute URL. One session with up
    to 1000 connections serves all tasks; the messages of a batch are sent one after the other, in order. `declare`
    has no effect.

    Until `send_timeout` is over, a request is sent again, with the same `ce-id`, if the connection fails, if the
    answer is 408, 425, 502, 503 or 504, or if it is 429 or any 5xx with `Retry-After`, which says how long to wait.
    If the connection fails while the answer is awaited, nobody knows whether the request was handled. So the receiver
    may get the same `ce-id` twice; a handler that must not act twice has to remember the ids that it has handled. Any
    other error is raised at once, also if an answer takes longer than the setting `timeout`.

    Parameters beyond those of `Producer`:
        method: the method of every send that does not choose another; "POST" by default.
    """

    features = FEATURES
    settings_class: ClassVar[type[HTTPSettings]] = HTTPSettings
    options_class: ClassVar[type[ProducerOptions]] = ProducerOptions
    send_options_class: ClassVar[type[SendOptions]] = SendOptions
    settings: HTTPSettings
    options: ProducerOptions
    _session: aiohttp.ClientSession | None = None

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        async def send(  # type: ignore[override]
            self, payload: object, **options: Unpack[HTTPSendParameters]
        ) -> HTTPReceipt: ...
        async def send_many(  # type: ignore[override]
            self, payloads: Iterable[object], **options: Unpack[HTTPSendManyParameters]
        ) -> list[HTTPReceipt]: ...

    def __init__(self, queue: str, **options: Unpack[HTTPProducerParameters]) -> None:
        super().__init__(queue, **options)
        self._leaving = asyncio.Event()
        self._base = self._base_url()
        #: Our token is sent to this origin only, and not to other addresses that a queue or an option names.
        self._origin = URL(self._base).origin()
        self._target = self._url_of(queue)
        if is_url(queue):
            self.queue: str = queue.partition("?")[0]  # the query may hold a secret, and a queue's name is logged

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        check_queue(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        refuse_reply()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.queue!r} at {self._base}>"

    # --- addresses ------------------------------------------------------------------------------

    def _base_url(self) -> str:
        host, port = self.settings.address
        host, port = self.host or host, self.port or port
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.settings.tls else 'http'}://{host}:{port}{self.settings.prefix}"

    def _url_of(self, queue: str) -> URL:
        if is_url(queue):
            return URL(queue)
        # A "/" in a name is kept readable, unless that makes an empty segment of the path.
        safe = "" if "//" in f"/{queue}/" else "/"
        return URL(f"{self._base}/{quote(queue, safe=safe)}", encoded=True)

    def _request(self, message: Message, options: SendOptions) -> _Request:
        if (body := message.body) is None:
            raise ConfigurationError("'http' cannot carry a message without a body (a tombstone); 'kafka' can.")
        if message.deliver_at is not None and message.deliver_at > time.time():
            raise ConfigurationError("'http' cannot delay messages: send it later, or by a protocol with a broker.")
        if message.intent == "reply":
            refuse_reply()
        method = options.method or self.options.method
        if options.content_type is not None:
            message = message.replace(content_type=options.content_type)
        headers = encode_headers(message)
        headers[CE_ATTEMPT] = str(message.attempt)
        if options.endpoint is not None:
            url = URL(options.endpoint)
        else:
            url = self._target if message.queue == self.queue else self._url_of(message.queue)
        if not self.settings.verify and url.scheme == "https":
            warn_unverified(self.settings, (url.host or "", url.port or 443))
        if self.settings.tokens and "authorization" not in map(str.lower, headers) and url.origin() == self._origin:
            headers["Authorization"] = f"Bearer {self.settings.tokens[0].get_secret_value()}"
        if method not in QUERY_METHODS or (query := _as_query(message)) is None:
            return _Request(method, url, headers, body, message.attempt)
        headers.pop("Content-Type", None)
        return _Request(method, _with_query(url, query), headers, b"", message.attempt)

    # --- the hooks ------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._leaving.clear()
        if self._session is not None and not self._session.closed:
            return  # the session itself replaces lost connections
        tls = await client_context(self.settings)
        if self.settings.tls:
            warn_unverified(self.settings, self.settings.address)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "streamtools", "Accept-Encoding": ENCODINGS},
            auto_decompress=False,  # aiohttp does not limit the size of the decompressed body
            skip_auto_headers=["Content-Type"],
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            max_field_size=MAX_FIELD,
        )

    async def _deliver(self, batch: Sequence[Message], options: Options) -> list[Receipt]:
        deadline = time.monotonic() + self.send_timeout - min(MARGIN, self.send_timeout / 10)
        sending: Any = _Sending(options, len(batch), deadline)
        try:
            return await super()._deliver(batch, sending)
        except SendError as error:
            request = sending.requests[sending.asking]
            if request is None or not isinstance(error.__cause__, TimeoutError):
                raise
            # On a busy event loop the timeout of the whole batch can end at the same moment as that of one answer.
            late = _no_answer(request.where, batch[sending.asking], self.settings.timeout)
            _name_left(late, batch, sending, sending.asking)
            raise late from error

    async def _send(self, batch: Sequence[Message], options: _Sending) -> Sequence[Receipt]:
        sending = options
        for position, message in enumerate(batch):
            if sending.receipts[position] is not None or position in sending.refusals:
                continue  # answered before the connection was lost
            request = sending.requests[position]
            if request is None:
                request = sending.requests[position] = self._request(message, sending.options)
            sending.asking = position
            try:
                sending.receipts[position] = await self._call(message, request, sending.deadline)
            except ResponseError as error:
                sending.refusals[position] = error
                if passes(error.status, error.headers):  # `send_timeout` is over, for the messages behind it too
                    _name_left(error, batch, sending, position)
                    raise
            except SendError as error:
                _name_left(error, batch, sending, position)
                raise
        if sending.refusals:
            first = next(iter(sending.refusals.values()))
            _name_left(first, batch, sending, len(batch))
            raise first
        return [receipt for receipt in sending.receipts if receipt is not None]

    async def _close(self) -> None:
        self._leaving.set()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # --- one message ----------------------------------------------------------------------------

    async def _call(self, message: Message, request: _Request, deadline: float) -> HTTPReceipt:
        failures = 0
        while True:
            status, headers, body = await self._exchange(message, request, deadline)
            if 200 <= status < 300:
                return HTTPReceipt(message.id, message.queue, status, headers, body)
            failures += 1
            # The delays are spread, so that requests that were refused together do not come again together.
            delay = _retry_after(headers) * random.uniform(1, 1.25) or backoff(failures)  # nosec B311: a pause
            if not passes(status, headers) or time.monotonic() + delay >= deadline:
                raise _response_error(message, request, status, headers, body)
            if status == 503:
                request.attempt = _next_attempt(headers, request.attempt)
                request.headers[CE_ATTEMPT] = str(request.attempt)
            await self._pause(delay)

    async def _exchange(
        self, message: Message, request: _Request, deadline: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        where = request.where
        if self._session is None:
            raise self._was_closed()
        try:
            async with asyncio.timeout(min(self.settings.timeout, deadline - time.monotonic())):
                async with self._session.request(
                    request.method, request.url, headers=request.headers, data=request.body or None,
                    allow_redirects=False,
                ) as response:  # fmt: skip
                    body = await self._read(response, where, message)
                    return response.status, response.headers, body
        except aiohttp.ConnectionTimeoutError as error:
            raise ConnectError(f"{where}: no connection within {CONNECT_TIMEOUT:g} s.") from error
        except TimeoutError as error:
            raise _no_answer(where, message, self.settings.timeout) from error
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            raise ConnectError(f"{where}: TLS failed: {error}.", permanent=True) from error
        except aiohttp.ClientConnectorError as error:
            raise ConnectError(f"{where}: cannot connect: {error.strerror or error}.") from error
        except aiohttp.ClientResponseError as error:
            why = _printable(" ".join(error.message.split()))
            raise SendError(f"{where}: the answer is not HTTP: {why}.", unknown=[message.id]) from error
        except aiohttp.ClientError as error:
            if self._session is None:
                raise self._was_closed() from error
            raise ConnectionLost(f"{where}: the connection ended before the answer: {error}.") from error

    async def _read(self, response: aiohttp.ClientResponse, where: str, message: Message) -> bytes:
        """Read the body of an answer. If the body of an error is too large or cannot be decoded, return no body.

        Raises:
            SendError: the answer is a success, but its body is too large or cannot be decoded.
        """
        limit = self.settings.max_answer
        body = bytearray()
        try:
            while chunk := await response.content.readany():
                body += chunk
                if len(body) > limit:
                    raise TooLarge("The body is too large.")
            if (coding := transfer_coding(response.headers)) is not None:
                raise DecodeError(f"its Transfer-Encoding is {coding!r}, which this client does not decode")
            encoding = response.headers.get("Content-Encoding", "")
            return decompressed(bytes(body), encoding, limit) if can_decompress(encoding) else bytes(body)
        except DecodeError as error:
            if not 200 <= response.status < 300:
                return b""
            why = f"over {limit} bytes (max_answer=)" if isinstance(error, TooLarge) else f"unreadable: {error}"
            raise SendError(
                f"{where} was answered {response.status}, so the message was accepted, but the answer is {why}.",
                unknown=[message.id],
            ) from error

    async def _pause(self, delay: float) -> None:
        if await is_set_within(self._leaving, delay):
            raise self._was_closed()

    def _was_closed(self) -> Closed:
        return Closed(f"{self!r} was closed; call open() to use it again.")


def _as_query(message: Message) -> str | None:
    """Return the payload as a query if it is a flat mapping of scalars and lists of scalars; else None."""
    if message.content_type != codec.JSON:
        return None
    try:
        data = from_json(message.body or b"")
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    pairs = []
    for name, value in data.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str | int | float) for v in values):
            return None  # a query cannot express None, an empty list or a nested value
        pairs += [(name, _scalar(v)) for v in values]
    return urlencode(pairs)


def _scalar(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_query(url: URL, query: str) -> URL:
    if not query:
        return url
    return URL(f"{url}{'&' if url.raw_query_string else '?'}{query}", encoded=True)


def _shown(url: URL) -> str:
    """Return the URL without its query, which is data and may hold a secret."""
    return str(url.with_query(None).with_fragment(None))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of `Retry-After`, a number or a date (RFC 9110, section 10.2.3); 0 without that header."""
    text = headers.get("Retry-After", "")[:TIME_LENGTH].strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _next_attempt(headers: Mapping[str, str], attempt: int) -> int:
    """Return the next attempt: the number that our consumer answered, else one more.

    Our consumer answers the same number again if no handler has seen the message.
    """
    text = headers.get(CE_ATTEMPT, "")
    return max(1, int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else attempt + 1


def _response_error(
    message: Message, request: _Request, status: int, headers: Mapping[str, str], body: bytes
) -> ResponseError:
    why = _printable(body[: 4 * EXCERPT].decode("utf-8", "replace"))
    if 300 <= status < 400:
        where = _printable(headers.get("Location", "its new address").partition("?")[0])
        why = f"redirects are not followed; send to {where} instead"
    return ResponseError(
        f"{request.method} {_shown(request.url)} was answered {status}{': ' if why else ''}{why}",
        status=status, headers=headers, body=body, refused=[message.id],
    )  # fmt: skip


def _printable(text: str) -> str:
    """Return the beginning of a peer's text, escaped so that it cannot forge a log line or control a terminal."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:EXCERPT])


def _name_left(error: SendError, batch: Sequence[Message], sending: _Sending, position: int) -> None:
    """Name in the error the messages refused so far, and those not sent because the one at `position` failed."""
    refused = [m for place, m in enumerate(batch) if place in sending.refusals or place > position]
    error.refused = tuple(m.id for m in refused)
    unknown = [batch[position]] if error.unknown else []
    error.messages = (*unknown, *refused)


def _no_answer(where: str, message: Message, timeout: float) -> SendError:
    return SendError(
        f"{where} was not answered in time ({timeout:g} s for one answer, send_timeout for all). The message may "
        "still be handled; send it again with the same id= to be sure.",
        unknown=[message.id],
    )
