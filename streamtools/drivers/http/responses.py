"""What each request is answered: from a settlement, or because it never became a message.

Whatever stands in a message or an error, its answer can be written: texts are mended, and what still fails is
answered 500, for that one request.
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

#: Seconds after which a request that was not handled is to be sent again.
RETRY_AFTER: Final = 1
#: Characters of a text in the answer to a refused request, and of a text in each of its problems.
LONGEST: Final = 4000
LONGEST_PART: Final = 500
#: Problems that such an answer lists.
PROBLEMS: Final = 10
#: In place of aiohttp's, which names its version.
SERVER: Final = "streamtools"


def settlement_response(settlement: Settlement, reply: Message | None = None) -> web.Response:
    """The answer that a verdict stands for; never raises.

    Parameters:
        reply: what the handler replied, where it returned nothing.
    """
    message = settlement.delivery.message
    try:
        return _verdict_response(settlement, message, reply)
    except Exception:
        log.exception("Message %s of %r cannot be answered as it should be.", message.id, message.queue)
        return respond(500, {"error": "The message has its verdict, but its answer cannot be written."})


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
    """503: the message did not reach a handler, so that it is to come again as the same attempt."""
    return respond(503, {"error": why}, **{"Retry-After": str(RETRY_AFTER), CE_ATTEMPT: attempt})


def error_response(status: int, why: str, **headers: str) -> web.Response:
    """An error status with the reason as JSON."""
    return respond(status, {"error": why}, **headers)


def cut_off(status: int, why: str) -> web.Response:
    """An error status before the request was read to its end, so that its connection cannot go on."""
    response = error_response(status, why)
    response.force_close()
    return response


def wrong_method(method: str, allowed: Iterable[str]) -> web.Response:
    """405, or the answer to OPTIONS."""
    methods = {*allowed, "OPTIONS"}
    allow = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
    if method == "OPTIONS":
        return respond(204, Allow=allow)
    return error_response(405, f"{method} is not taken here; allowed: {allow}.", Allow=allow)


def respond(status: int, content: Mapping[str, Any] | None = None, **headers: str) -> web.Response:
    """A response with JSON, or without a body."""
    headers["Server"] = SERVER
    if content is None:
        return web.Response(status=status, headers=headers)
    headers["Content-Type"] = codec.JSON
    return web.Response(status=status, headers=headers, body=_json(content))


def _json(content: Mapping[str, Any]) -> bytes:
    try:
        return to_json(content, fallback=safe_str)
    except ValueError:  # a lone surrogate: what a handler raised may quote any text
        text = json.dumps(content, ensure_ascii=False, default=safe_str)
        return text.encode("utf-8", "replace")


def _result_response(result: object, message: Message) -> web.Response:
    if result is None:
        return respond(202)
    try:
        body, content_type = codec.encode(result)
    except Exception:  # whatever a value of the user's does when it is serialised, someone waits for an answer
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
    # Not the error's own text: it is the log's, and may hold what no caller is to see.
    return respond(500, {"error": "The handler failed.", "id": message.id, "attempts": message.attempt})


def _invalid_response(error: DecodeError, message: Message) -> web.Response:
    # Another status here is another one in `ANSWERED` (bus/requests.py), too.
    content: dict[str, Any] = {"error": _brief(str(error)), "id": message.id}
    if not error.errors or any(e.get("type") == "json_invalid" for e in error.errors):
        return respond(400, content)
    return respond(422, {**content, "errors": [_validation_error(each) for each in error.errors[:PROBLEMS]]})


def _validation_error(problem: Mapping[str, Any]) -> dict[str, Any]:
    """One problem, cut to a size that does not depend on the request."""
    parts = {name: _brief(value, LONGEST_PART) for name, value in problem.items()}
    return parts | {"loc": [_brief(part, LONGEST_PART) for part in problem.get("loc", ())[:PROBLEMS]]}


def _brief(value: Any, longest: int = LONGEST) -> Any:
    return value if not isinstance(value, str) or len(value) <= longest else f"{value[:longest]}…"
