"""The features and the options of the HTTP driver, and the checks of its queue names and URLs."""

from __future__ import annotations

import re
from typing import Annotated, Final, Never
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from streamtools.driver import Options
from streamtools.errors import ConfigurationError
from streamtools.features import Features
from streamtools.options import HTTPConsumerOptions, HTTPProducerOptions, HTTPSendOptions
from streamtools.parameters import ConsumerParameters, ProducerParameters, SendManyParameters, SendParameters
from streamtools.validation.checks import check_name

#: There is no broker: the sender waits for the handler's answer, and keeps the message until then.
FEATURES: Final = Features(delay=False, error_queue=False, reply=True, listens=True, admin=False)

METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
#: Methods whose message may be in the query of the URL.
QUERY_METHODS: Final = frozenset({"GET", "DELETE"})
#: Short names of content types.
TAGS: Final = {"JSON": "application/json", "SSI": "application/ssi-agent-wire"}


def _method(value: object) -> object:
    method = value.upper() if isinstance(value, str) else value
    if method not in METHODS:
        raise ValueError(f"{value!r} is not one of {', '.join(METHODS)}")
    return method


def _tag(value: object) -> object:
    tag = value.upper() if isinstance(value, str) else value
    if tag not in TAGS:
        raise ValueError(f"{value!r} is not one of {', '.join(f'{t!r} ({m})' for t, m in TAGS.items())}")
    return tag


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _media_range(value: str) -> str:
    if re.fullmatch(r"[^\s/*;,]+/([^\s/*;,]+|\*)", value) is None:
        raise ValueError(f"{value!r} is not a content type: write one such as 'application/json' or 'text/*'")
    return value.lower()


def check_url(url: str) -> str:
    """Check that a URL is absolute, and return it.

    Raises:
        ConfigurationError: the URL is not absolute, or it has a user name or a password.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # its port is not a number, or a bracket is not closed; the error may quote a password
        raise ConfigurationError("The URL cannot be read: its host or its port is not valid.") from None
    if "@" in parts.netloc:
        raise ConfigurationError(
            "The URL has a user or a password, which would be written to logs: send them as a header, "
            'headers={"Authorization": ...}.'
        )
    if not fine or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise ConfigurationError("The URL is not absolute, or it holds a space: write https://host:port/path.")
    return url


def check_queue(queue: object) -> None:
    """Check a queue's name, or an absolute URL.

    Raises:
        ConfigurationError: the name cannot be the path of a URL, or the URL is not valid.
    """
    if is_url(queue):
        check_url(str(queue))
        return
    check_name(queue)
    if {".", ".."} & set(str(queue).split("/")):
        raise ConfigurationError(f"The queue name {queue!r} cannot be a path: clients remove '.' and '..' from it.")


def refuse_reply() -> Never:
    """Refuse to send a reply to an address: a client could otherwise make this service call any address.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        "Over HTTP a reply is the answer to its request and cannot be sent to an address: return it from the handler."
    )


def is_url(queue: object) -> bool:
    """Whether a queue is given as a URL, and not as a name."""
    return isinstance(queue, str) and queue.startswith(("http://", "https://"))


MediaRange = Annotated[str, AfterValidator(_media_range)]
Method = Annotated[str, BeforeValidator(_method)]
Tag = Annotated[str, BeforeValidator(_tag)]


class ProducerOptions(Options):
    """Options of the producer's constructor.

    Parameters:
        method: the method of every send that does not choose another.
    """

    method: Method = "POST"


class ConsumerOptions(Options):
    """Options of the consumer's constructor and decorator.

    Parameters:
        method: the method of the requests to receive.
        max_body: the largest body, in bytes, compressed or not; None for the limit of the settings.
        content_types: the content types to accept, such as "application/json" or "text/*"; None for any.
    """

    method: Method = "POST"
    max_body: Annotated[int, Field(gt=0)] | None = None
    content_types: Annotated[tuple[MediaRange, ...], BeforeValidator(_several)] | None = None


class SendOptions(Options):
    """Options of one send.

    Parameters:
        method: the method of the request; with GET and DELETE a flat mapping becomes the query.
        endpoint: an absolute URL to send to, instead of the queue's.
        headers_tag: the content type: "JSON" or "SSI".
        header_tag: the same as `headers_tag`.
    """

    method: Method | None = None
    endpoint: Annotated[str, AfterValidator(check_url)] | None = None
    headers_tag: Tag | None = None
    header_tag: Tag | None = None

    @property
    def content_type(self) -> str | None:
        """The media type that a tag names."""
        tag = self.headers_tag or self.header_tag
        return TAGS[tag] if tag is not None else None


class HTTPProducerParameters(ProducerParameters, HTTPProducerOptions, total=False):
    """The keyword parameters of a producer's constructor."""


class HTTPConsumerParameters(ConsumerParameters, HTTPConsumerOptions, total=False):
    """The keyword parameters of a consumer's constructor."""


class HTTPSendParameters(SendParameters, HTTPSendOptions, total=False):
    """The keyword parameters of `send`."""


class HTTPSendManyParameters(SendManyParameters, HTTPSendOptions, total=False):
    """The keyword parameters of `send_many`."""
