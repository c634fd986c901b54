"""Every error that streamtools raises, in one tree.

```text
StreamToolsError
├── ConfigurationError        wrong settings, names, options; raised at start-up, never retried
│   ├── UnknownProtocol       no such protocol, or its extra is not installed
│   ├── FeatureError          the protocol cannot do what was asked
│   ├── OptionError           an option that no protocol knows; a TypeError, too
│   └── QueueError            a queue is missing, or exists with other arguments
├── ConnectError              the broker cannot be reached, or refuses us
│   └── ConnectionLost        the connection ended; the base class reconnects
├── SendError                 messages that the broker does not hold (.refused, .unknown)
│   └── ResponseError         an HTTP peer answered 4xx or 5xx (.status, .headers, .body)
├── RequestTimeout            no reply came in time
├── RemoteError               the handler of a request failed, on the other side
├── DecodeError               a body is not what its content type or the handler's annotation says
├── Closed                    used after close()
├── HandlerError              a handler or a loop ended in a way that cannot go on
└── Signal                    not failures: what a handler raises to choose the verdict itself
    ├── Reject                to the error queue, without any retry
    ├── RetryLater            retry after a delay of the handler's choice
    └── Drop                  acknowledge and forget
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, Final

from streamtools.text.escaping import guard_log

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from typing import Protocol, TypeVar

    class _Identified(Protocol):
        @property
        def id(self) -> str: ...

    Sent = TypeVar("Sent", bound=_Identified)

guard_log()  # every module that logs imports this one

#: Errors of a group that its text tells of, at most.
SHOWN: Final = 5
#: Errors and groups within one group that are looked at.
GROUPED: Final = 10_000
#: Where files lie whose functions are nobody's own.
_NOT_THEIRS: Final = (str(Path(asyncio.__file__).parent), str(Path(__file__).parent))

#: Delays are shorter, in seconds: ten years. Times far beyond have no form on the wire.
LONGEST: Final = 10 * 366 * 86400.0


class StreamToolsError(Exception):
    """The root of every error that streamtools raises on purpose."""


class ConfigurationError(StreamToolsError, ValueError):
    """Settings, names or options that cannot work; raised before any message moves."""


class UnknownProtocol(ConfigurationError, KeyError):
    """No protocol has this name, or the client library of one is not installed."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # not KeyError's own, which puts the sentence into quotes


class FeatureError(ConfigurationError):
    """The protocol cannot do what was asked; the text names what to use instead."""


class OptionError(ConfigurationError, TypeError):
    """An option that no protocol knows; a TypeError as well, as for any argument that a function does not take."""


class QueueError(ConfigurationError):
    """A queue is missing, or it exists with arguments other than those asked for."""


class ConnectError(StreamToolsError, ConnectionError):
    """The broker could not be reached, or it refused these credentials or this address.

    Parameters:
        message: what happened and what to do about it.
        permanent: trying again cannot help (a wrong password, a missing virtual host).
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ConnectionLost(ConnectError):
    """A connection that worked has ended; what was in flight has an unknown fate."""


class SendError(StreamToolsError):
    """Some messages of a batch are not known to be held by the broker.

    Attributes:
        refused: ids of the messages that the broker said no to; it does not hold them.
        unknown: ids of the messages whose confirmation never came; it may hold them.
        unfit: those of `refused` that can never be taken as they are: too large, with a name that is too long, or
            with a text that no wire carries. To send them again cannot help; to send less beside the body can.
        early: those of `refused` that nothing can hold until they are due. Once they are due they can be sent.
        messages: the messages of `refused` and `unknown` themselves, as they were given to the send. This is the
            exact answer where several messages of one call have the same id: send these again, not all of that id.
    """

    def __init__(
        self,
        message: str,
        *,
        refused: Sequence[str] = (),
        unknown: Sequence[str] = (),
        unfit: Sequence[str] = (),
        early: Sequence[str] = (),
        messages: Sequence[object] = (),
    ) -> None:
        super().__init__(message)
        self.messages: Sequence[Any] = tuple(messages)
        self.unfit: tuple[str, ...] = tuple(unfit)
        self.early: tuple[str, ...] = tuple(early)
        self.refused: tuple[str, ...] = tuple(refused)
        self.unknown: tuple[str, ...] = tuple(unknown)

    def among(self, messages: Iterable[Sent], ids: Collection[str]) -> list[Sent]:
        """Those of `messages` that this error is about: by themselves where the driver tells them apart.

        Parameters:
            ids: of `refused`, `unknown` or `unfit`.
        """
        own = frozenset(map(id, self.messages))
        return [m for m in messages if m.id in ids and (not own or id(m) in own)]


class ResponseError(SendError):
    """An HTTP peer answered with an error status.

    Attributes:
        status: the HTTP status code.
        headers: the response headers.
        body: the response body, as received.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        refused: Sequence[str] = (),
    ) -> None:
        super().__init__(message, refused=refused)
        self.status = status
        self.headers = headers
        self.body = body


class RequestTimeout(StreamToolsError, TimeoutError):
    """No reply came in time; the request may have been handled all the same."""


class RemoteError(StreamToolsError):
    """The handler of a request failed, on the other side.

    Attributes:
        exception: the class name of what it raised there.
        reason: the text of it.
    """

    def __init__(self, message: str, *, exception: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.exception = exception
        self.reason = reason


class DecodeError(StreamToolsError, ValueError):
    """A body does not decode, or does not validate; retrying cannot help.

    Attributes:
        errors: one mapping per problem found, as pydantic lists them; empty for undecodable bytes.
    """

    def __init__(self, message: str, *, errors: Sequence[Mapping[str, object]] = ()) -> None:
        super().__init__(message)
        self.errors: tuple[Mapping[str, object], ...] = tuple(errors)


class Closed(StreamToolsError, RuntimeError):
    """The producer or consumer was closed and is not to be used again before `open()`."""


class HandlerError(StreamToolsError, RuntimeError):
    """A handler misbehaved in a way that is not an ordinary exception, or a loop cannot go on."""


class Signal(StreamToolsError):
    """Raised by a handler to choose the verdict itself; not a failure of the framework."""


class Reject(Signal):
    """To the error queue at once, without a retry.

    Parameters:
        reason: kept with the message in the error queue.
    """

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(Signal):
    """Retry this message, after `delay` (seconds, or a timedelta), or after the policy's own delay when None.

    Raises:
        ConfigurationError: the delay is no number, negative, or ten years or more.
    """

    def __init__(self, delay: float | timedelta | None = None, reason: str = "the handler asked for a retry") -> None:
        super().__init__(reason)
        if isinstance(delay, timedelta):
            delay = delay.total_seconds()
        given: object = delay
        if given is not None and not (isinstance(given, int | float) and 0 <= given < LONGEST):
            raise ConfigurationError(
                f"RetryLater({delay!r}) is out of range: seconds from 0 to ten years, and then the reason, as in "
                "RetryLater(5, 'not yet')."
            )
        self.delay: float | None = delay
        self.reason = reason


class Drop(Signal):
    """Acknowledge the message and forget it."""


def safe_str(error: object) -> str:
    """What it says: of a group what each in it says, and of one that says nothing where it was raised.

    An exception whose own text raises, whatever it raises, must not stop its report.
    """
    try:
        text = str(error)
    except BaseException as broken:
        return f"(its text could not be read: {type(broken).__name__})"
    if isinstance(error, BaseExceptionGroup):
        said = [f"{type(each).__name__}: {safe_str(each)}" for each in islice(leaves(error), SHOWN)]
        return f"{text}: {'; '.join(said)}"
    return text if text or not isinstance(error, BaseException) else _where(error)


def leaves(
    error: BaseException, whole: Callable[[BaseException], bool] = lambda group: False
) -> Iterator[BaseException]:
    """The errors in a group, and in the groups in it, however deep they are nested; of any other error itself.

    Parameters:
        whole: says of a group that it is not looked into.
    """
    waiting = [error]
    for _ in range(GROUPED):
        if not waiting:
            return
        each = waiting.pop()
        if isinstance(each, BaseExceptionGroup) and not whole(each):
            waiting.extend(reversed(each.exceptions))
        else:
            yield each


def _where(error: BaseException) -> str:
    raised = _own_frame(error)
    if raised is None:
        return ""
    waited = _own_frame(error.__cause__) if error.__cause__ is not None else None
    waiting = f", while {waited} was waiting" if waited is not None and waited != raised else ""
    return f"no text; raised in {raised}{waiting}"


def _own_frame(error: BaseException) -> str | None:
    """The user's innermost function in a traceback, in words: not asyncio's, of which a timeout is raised."""
    frames = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)]
    own = [(code, line) for code, line in frames if not code.co_filename.startswith(_NOT_THEIRS)] or frames
    if not own:
        return None
    code, line = own[-1]
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{line})"


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the close matches of `name` and the whole list of `known`."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(repr(n) for n in close)}? " if close else ""
    return f"{hint}Known: {', '.join(names)}." if names else "There is none."
