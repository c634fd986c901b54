"""Makes the response to each request: from a settlement, or because the request cannot become a message.

A response can always be written, whatever a message or an error contains: invalid characters are replaced, and if
that is not enough, this one request is answered 500.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, assert_never

from aiohttp import web
from pydantic_core import to_json

from streamtools import codec
from streamtools.delivery import Settlement
from streamtools.drivers.http.headers import CE_ATTEMPT
from streamtools.errors import DecodeError, Reject, leaves, safe_str
from streamtools.message import Message
from streamtools.verdicts import VerdictKind

log: logging.Logger = logging.getLogger("streamtools")

#: After this many seconds, a request that was not handled should be sent again.
RETRY_AFTER: Final = 1
#: The most characters of an error's text in a response, and of a text in each of its problems.
LONGEST: Final = 4000
LONGEST_PART: Final = 500
#: The most problems that a response lists.
PROBLEMS: Final = 10
#: The header `Server`; aiohttp's own would tell its version.
SERVER: Final = "streamtools"


def settlement_response(settlement: Settlement, reply: Message | None = None) -> web.Response:
    """Return the response for a settlement. Never raises.

    Parameters:
        reply: the handler's reply; it is used if the handler returned nothing.
    """
    message = settlement.delivery.message
    try:
        return _verdict_response(settlement, message, reply)
    except Exception:
        log.exception("The answer to message %s of %r cannot be written.", message.id, message.queue)
        return respond(500, {"error": "The message was settled, but its answer cannot be written."})


def _verdict_response(settlement: Settlement, message: Message, reply: Message | None) -> web.Response:
    match settlement.verdict.kind:
        case VerdictKind.ACK:
            if reply is not None and settlement.result is None:
                return _body(reply.body or b"", reply.content_type or codec.BINARY)
            return _result_response(settlement.result, message)
        case VerdictKind.DROP:
            return respond(202)
        case VerdictKind.RETRY:
            delay = max(0, math.ceil(settlement.verdict.delay))
            error_response = {"error": "The handler failed; send the message again.", "id": message.id}
            return respond(503, error_response, **{"Retry-After": str(delay), CE_ATTEMPT: str(message.attempt + 1)})
        case VerdictKind.REJECT:
            return _failure_response(settlement, message)
        case VerdictKind.RELEASE:
            return unavailable(str(message.attempt))
    assert_never(settlement.verdict.kind)


def unavailable(attempt: str, why: str = "The service is stopping; send the message again.") -> web.Response:
    """Return 503: no handler has seen the message, so the sender should send it again as the same attempt."""
    return respond(503, {"error": why}, **{"Retry-After": str(RETRY_AFTER), CE_ATTEMPT: attempt})


def error_response(status: int, why: str, **headers: str) -> web.Response:
    """Return a response with an error status, and the reason as JSON."""
    return respond(status, {"error": why}, **headers)


def cut_off(status: int, why: str) -> web.Response:
    """Return an error for a request that was not read to its end; its connection is closed afterwards."""
    response = error_response(status, why)
    response.force_close()
    return response


def wrong_method(method: str, allowed: Iterable[str]) -> web.Response:
    """Return 405, or the response to OPTIONS."""
    methods = {*allowed, "OPTIONS"}
    allow = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
    if method == "OPTIONS":
        return respond(204, Allow=allow)
    return error_response(405, f"{method} is not accepted here; allowed: {allow}.", Allow=allow)


def respond(status: int, content: Mapping[str, Any] | None = None, **headers: str) -> web.Response:
    """Return a response with JSON, or without a body."""
    headers["Server"] = SERVER
    if content is None:
        return web.Response(status=status, headers=headers)
    headers["Content-Type"] = codec.JSON
    return web.Response(status=status, headers=headers, body=_json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    try:
        return to_json(content, fallback=safe_str)
    except ValueError:  # a lone surrogate: a handler's error may quote any text
        text = json.dumps(content, ensure_ascii=False, default=safe_str)
        return text.encode("utf-8", "replace")


def _result_response(result: object, message: Message) -> web.Response:
    if result is None:
        return respond(202)
    try:
        body, content_type = codec.encode(result)
    except Exception:  # a user's value may raise anything when it is serialised, and the client waits for an answer
        log.exception("The handler of %r returned a value that cannot be sent.", message.queue)
        return respond(500, {"error": "The message was handled, but its answer cannot be sent.", "id": message.id})
    return _body(body, content_type)


def _body(body: bytes, content_type: str) -> web.Response:
    return web.Response(status=200, headers={"Server": SERVER, "Content-Type": content_type}, body=body)


def _failure_response(settlement: Settlement, message: Message) -> web.Response:
    error = settlement.error
    if isinstance(error, DecodeError):
        return _invalid_response(error, message)
    if isinstance(error, BaseExceptionGroup):
        error = next((each for each in leaves(error) if isinstance(each, Reject)), error)
    if isinstance(error, Reject) or settlement.error is None:
        return respond(422, {"error": _brief(settlement.verdict.reason), "id": message.id})
    # The text of the error goes to the log only: it may hold what the client must not see.
    return respond(500, {"error": "The handler failed.", "id": message.id, "attempts": message.attempt})


def _invalid_response(error: DecodeError, message: Message) -> web.Response:
    # Another status here is another one in `ANSWERED` (bus/requests.py), too.
    content: dict[str, Any] = {"error": _brief(str(error)), "id": message.id}
    if not error.errors or any(e.get("type") == "json_invalid" for e in error.errors):
        return respond(400, content)
    return respond(422, {**content, "errors": [_validation_error(each) for each in error.errors[:PROBLEMS]]})


def _validation_error(problem: Mapping[str, Any]) -> dict[str, Any]:
    """Return one problem, shortened so that its size does not depend on the request."""
    parts = {name: _brief(value, LONGEST_PART) for name, value in problem.items()}
    return parts | {"loc": [_brief(part, LONGEST_PART) for part in problem.get("loc", ())[:PROBLEMS]]}


def _brief(value: Any, longest: int = LONGEST) -> Any:
    return value if not isinstance(value, str) or len(value) <= longest else f"{value[:longest]}…"
