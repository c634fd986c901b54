"""What the HTTP driver can do, and what may be asked of it."""

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

#: A call: the sender waits for the handler's answer, and keeps the message until it has one.
FEATURES: Final = Features(delay=False, error_queue=False, reply=True, listens=True, admin=False)

METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
#: Methods whose message may stand in the query.
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
        raise ValueError(f"{value!r} is no content type, such as 'application/json' or 'text/*'")
    return value.lower()


def check_url(url: str) -> str:
    """An absolute address to send to.

    Raises:
        ConfigurationError: it is not one, or it holds a user name or a password.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number, an unclosed bracket; its text may quote a password
        raise ConfigurationError("The URL cannot be read: its host or its port is not one.") from None
    if "@" in parts.netloc:
        raise ConfigurationError(
            "A URL here has no user and password, which would end up in logs; send them as a header: "
            'headers={"Authorization": ...}.'
        )
    if not fine or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise ConfigurationError("The URL is not absolute, or it holds a space: write https://host:port/path.")
    return url


def check_queue(queue: object) -> None:
    """A queue's name, or an absolute URL.

    Raises:
        ConfigurationError: it cannot be the path of a URL.
    """
    if is_url(queue):
        check_url(str(queue))
        return
    check_name(queue)
    if {".", ".."} & set(str(queue).split("/")):
        raise ConfigurationError(f"The queue name {queue!r} cannot be a path: clients take its '.' or '..' out.")


def refuse_reply() -> Never:
    """Say that no reply goes to an address: whoever can reach the port could have us call any other.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        "Over HTTP a reply goes in the answer to its request, not to an address: return it from the handler."
    )


def is_url(queue: object) -> bool:
    """This is an address, not the name of a queue."""
    return isinstance(queue, str) and queue.startswith(("http://", "https://"))


MediaRange = Annotated[str, AfterValidator(_media_range)]
Method = Annotated[str, BeforeValidator(_method)]
Tag = Annotated[str, BeforeValidator(_tag)]


class ProducerOptions(Options):
    """For the producer's constructor.

    Parameters:
        method: for every send that does not say.
    """

    method: Method = "POST"


class ConsumerOptions(Options):
    """For the consumer's constructor and decorator.

    Parameters:
        method: the requests to take.
        max_body: the largest body, in bytes, compressed or not; the settings' when None.
        content_types: those that are taken, such as "application/json" or "text/*"; any when None.
    """

    method: Method = "POST"
    max_body: Annotated[int, Field(gt=0)] | None = None
    content_types: Annotated[tuple[MediaRange, ...], BeforeValidator(_several)] | None = None


class SendOptions(Options):
    """For one send.

    Parameters:
        method: of the request; by GET and DELETE a flat mapping becomes the query.
        endpoint: an absolute URL to send to instead of the queue's.
        headers_tag: the content type: "JSON" or "SSI".
        header_tag: the same.
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
    """What the constructor of a producer takes by keyword."""


class HTTPConsumerParameters(ConsumerParameters, HTTPConsumerOptions, total=False):
    """What the constructor of a consumer takes by keyword."""


class HTTPSendParameters(SendParameters, HTTPSendOptions, total=False):
    """What `send` takes by keyword."""


class HTTPSendManyParameters(SendManyParameters, HTTPSendOptions, total=False):
    """What `send_many` takes by keyword."""
