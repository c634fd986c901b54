"""RequestQueue: keeps the requests to one consumer from their arrival to their answer."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from aiohttp import web
from aiohttp.http import HttpProcessingError, HttpVersion11

from streamtools import codec
from streamtools.drivers.http import responses
from streamtools.drivers.http.connections import _Connection
from streamtools.drivers.http.headers import CE_ATTEMPT, decode_headers, meta_size, size_of, transfer_coding
from streamtools.drivers.http.options import QUERY_METHODS
from streamtools.errors import DecodeError
from streamtools.message import NO_HEADERS, Message, id_generator
from streamtools.validation.bodies import TooLarge, can_decompress, decompressed
from streamtools.validation.checks import HEADERS_LIMIT
from streamtools.validation.forms import FORM, read_pairs, write_form

log: logging.Logger = logging.getLogger("streamtools")

#: The most requests that the handlers get in one turn of the event loop.
TAKEN_AT_ONCE: Final = 16
BUSY: Final = "Too many requests are waiting; send the message again."


class Refused(Exception):  # noqa: N818 - the client's error, not ours
    """Ends a request with this answer, before it becomes a message."""

    def __init__(self, response: web.Response) -> None:
        super().__init__(response.status)
        self.response = response


class PendingRequest:
    """A request that became a message, and waits for its answer.

    Attributes:
        message: the message that the request became.
        answered: done when an answer was given.
    """

    __slots__ = ("_make", "_request", "answered", "message")

    def __init__(self, request: web.BaseRequest, message: Message) -> None:
        self.message: Message = message
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._make: Callable[[], web.Response] | None = None

    @property
    def done(self) -> bool:
        """Whether an answer was given."""
        return self.answered.done()

    @property
    def gone_away(self) -> bool:
        """Whether the client has left."""
        return self._request.transport is None

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more: the client has left, or an answer was given."""
        return self.gone_away or self.answered.done()

    def answer(self, make: Callable[[], web.Response]) -> None:
        """Give the answer; only the first call counts.

        Parameters:
            make: makes the response just before it is sent, so that many large responses are never all in memory.
        """
        if not self.answered.done():
            self._make = make
            self.answered.set_result(None)

    def response(self) -> web.Response:
        """Return the response, after an answer was given."""
        make, self._make = self._make, None  # break a reference cycle
        if make is None or self.gone_away:
            return responses.unavailable(str(self.message.attempt))  # nobody reads this response
        return make()


class RequestQueue:
    """Turns the requests of one method and one path into messages, and holds them until they are received.

    Parameters:
        queue: the queue's name.
        method: the method of the requests.
        limit: the most requests that wait to be received; further ones are answered 503.
        max_body: the largest body, in bytes, compressed or not.
        body_timeout: seconds until a body must have arrived.
        content_types: the content types to accept, such as "text/*"; None for any.
        hidden: headers that the handler does not get, in lower case.
    """

    def __init__(
        self,
        queue: str,
        method: str,
        *,
        limit: int,
        max_body: int,
        body_timeout: float,
        content_types: tuple[str, ...] | None = None,
        hidden: frozenset[bytes] = frozenset(),
    ) -> None:
        self._content_types = content_types
        self._hidden = hidden
        self.method = method
        #: If true, no request is accepted any more; those that a consumer has received are still answered.
        self.stopped: bool = False
        #: If true, all requests were answered.
        self.closed: bool = False
        self._queue = queue
        self._limit = limit
        self.max_body = max_body
        self._body_timeout = body_timeout
        self._new_id = id_generator()
        self._waiting: deque[PendingRequest] = deque()
        self._unanswered: set[PendingRequest] = set()
        self._reading: set[asyncio.Timeout] = set()
        self._arrival = asyncio.Event()

    # --- for the consumer -----------------------------------------------------------------------

    async def take(self, limit: int) -> list[PendingRequest]:
        """Wait for requests, and return up to `limit`; return none if closed. A cancellation loses no request.

        It returns only a few at once, so that their responses are sent, and connections are served, before the next
        requests are handled.
        """
        limit = min(limit, TAKEN_AT_ONCE)
        if self._waiting:
            await asyncio.sleep(0)
        while not self.closed:
            taken: list[PendingRequest] = []
            while self._waiting and len(taken) < limit:
                call = self._waiting.popleft()
                if call.gone:
                    _send_back(call)  # the client has left, and sends the message again
                else:
                    taken.append(call)
            if taken:
                return taken
            self._arrival.clear()
            await self._arrival.wait()
        return []

    def stop(self) -> None:
        """Accept no more requests, and answer 503 to those that no consumer has received."""
        self.stopped = True
        while self._waiting:
            _send_back(self._waiting.popleft())
        for limit in self._reading:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        """Stop, and answer 503 to all requests that have no answer yet."""
        self.stop()
        self.closed = True
        for call in self._unanswered:
            _send_back(call)
        self._arrival.set()

    # --- for the server -------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Make a message of a request, wait for its settlement, and return the response."""
        try:
            self._check_open(request)
            _check_transfer(request)
            self._check_content_type(request)
            if (body := self._body_at_once(request)) is None:
                body = await self._read(request)
                self._check_open(request)
            if isinstance(request.protocol, _Connection):
                request.protocol.whole()
            message = self._message(request, body)
        except Refused as refusal:
            return refusal.response
        call = PendingRequest(request, message)
        self._waiting.append(call)
        self._unanswered.add(call)
        self._arrival.set()
        try:
            await call.answered
        finally:
            self._unanswered.discard(call)
        response = call.response()
        if self.stopped:
            response.force_close()
        return response

    def _check_open(self, request: web.BaseRequest) -> None:
        if self.stopped:
            response = responses.unavailable(attempt_of(request))
            response.force_close()
            raise Refused(response)
        if len(self._waiting) >= self._limit and not self._make_room():
            raise Refused(responses.unavailable(attempt_of(request), BUSY))

    def _check_content_type(self, request: web.BaseRequest) -> None:
        taken = self._content_types
        if taken is None or (self.method in QUERY_METHODS and not request.body_exists):
            return
        media = codec.media_type(request.headers.get("Content-Type"))
        if media not in taken and f"{media.partition('/')[0]}/*" not in taken:
            raise Refused(
                responses.error_response(415, "This content type is not accepted here.", Accept=", ".join(taken))
            )

    def _make_room(self) -> bool:
        for call in self._waiting:
            if call.gone:
                _send_back(call)
        self._waiting = deque(call for call in self._waiting if not call.done)
        return len(self._waiting) < self._limit

    def _body_at_once(self, request: web.BaseRequest) -> bytes | None:
        """The body if it came in one piece with the headers, as most do; None if it has to be waited for."""
        content = request.content
        if not content.is_eof() or content.exception() is not None:
            return None
        body = content.read_nowait()
        if len(body) > self.max_body:
            raise self._too_large()
        return body

    async def _read(self, request: web.BaseRequest) -> bytes:
        length = request.content_length
        if length is not None and length > self.max_body:
            raise self._too_large()
        try:
            return await self._read_slowly(request)
        except (ConnectionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and request.transport is not None:
                raise  # without a transport, aiohttp's RuntimeError says that the connection was closed
            log.debug("A client left while the body of its request to %r arrived.", self._queue)
            _forget_frames(error)
            raise Refused(responses.cut_off(400, "The body did not arrive.")) from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            _forget_frames(error)
            raise Refused(responses.cut_off(400, f"The body cannot be read: {type(error).__name__}.")) from None

    async def _read_slowly(self, request: web.BaseRequest) -> bytes:
        if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # these bytes do not belong to the answer
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout) as limit:
                self._reading.add(limit)
                try:
                    while chunk := await request.content.readany():
                        body += chunk
                        if len(body) > self.max_body:
                            raise self._too_large()
                finally:
                    self._reading.discard(limit)
        except TimeoutError:
            self._check_open(request)
            raise Refused(responses.cut_off(408, f"The body took over {self._body_timeout:g} s.")) from None
        return bytes(body)

    def _too_large(self) -> Refused:
        return Refused(responses.cut_off(413, f"The body is over {self.max_body} bytes."))

    def _message(self, request: web.BaseRequest, body: bytes) -> Message:
        raw = request.raw_headers
        if self._hidden:
            raw = tuple(each for each in raw if each[0].lower() not in self._hidden)
        fields, headers = decode_headers(raw)
        size = sum(len(n) + len(v) for n, v in headers.items())
        if size_of(raw) > HEADERS_LIMIT:  # only such long headers, which are rare, are measured exactly
            size = max(size, meta_size(raw))
        if size > HEADERS_LIMIT:
            raise Refused(responses.error_response(431, f"The headers are over {HEADERS_LIMIT} bytes."))
        encoding = fields.get("content_encoding")
        if not body and self.method in QUERY_METHODS:
            body = _query(request.raw_path)
            fields |= {"content_type": FORM, "content_encoding": None}
        elif encoding is not None and can_decompress(encoding):
            body = self._undone(body, encoding)
            del fields["content_encoding"]
        fields["id"] = fields.get("id") or self._new_id()
        return Message(body=body, queue=self._queue, headers=headers or NO_HEADERS, **fields)

    def _undone(self, body: bytes, encoding: str) -> bytes:
        try:
            return decompressed(body, encoding, self.max_body)
        except TooLarge:
            raise self._too_large() from None
        except DecodeError as error:
            raise Refused(responses.error_response(400, str(error))) from error


def _check_transfer(request: web.BaseRequest) -> None:
    if (coding := transfer_coding(request.headers)) is not None:
        why = f"Transfer-Encoding {coding!r} is not decoded here: compress the body with Content-Encoding instead."
        raise Refused(responses.cut_off(501, why))


def _forget_frames(error: BaseException) -> None:
    """Free what the error's traceback holds: aiohttp's stream keeps the error, and the frames keep the body."""
    error.__traceback__ = None


def attempt_of(request: web.BaseRequest) -> str:
    """Return the number of the attempt, as the sender says it."""
    text = request.headers.get(CE_ATTEMPT, "")
    return text if text.isascii() and text.isdigit() and len(text) < 10 else "1"


def _send_back(call: PendingRequest) -> None:
    def make() -> web.Response:
        response = responses.unavailable(str(call.message.attempt))
        response.force_close()
        return response

    call.answer(make)


def _query(raw_path: str) -> bytes:
    query = raw_path.partition("#")[0].partition("?")[2]
    try:
        return write_form(read_pairs(query.encode("utf-8", "surrogateescape")))
    except ValueError as error:
        raise Refused(responses.error_response(400, "The query is not percent-encoded UTF-8.")) from error
