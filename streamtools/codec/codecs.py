"""Codecs of users, by content type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from streamtools.codec.media import JSON, media_type
from streamtools.errors import ConfigurationError, suggest


@dataclass(frozen=True, slots=True)
class Codec:
    """How the bodies of one content type are read and written.

    Attributes:
        decode: body -> plain data; any exception of it means that the body is not of this type.
        encode: plain data, as JSON knows it -> body; None where bodies are only read.
    """

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes] | None = None


#: Media type -> codec, beside JSON, text and bytes.
CODECS: Final[dict[str, Codec]] = {}


def register_codec(
    content_type: str, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes] | None = None
) -> None:
    """Read bodies of this content type from now on, for every handler in this process; replaces an earlier one.

    ```python
    register_codec("application/yaml", yaml.safe_load, lambda data: yaml.safe_dump(data).encode())
    ```

    Handlers get their models from such bodies as they do from JSON.

    Parameters:
        content_type: a media type, without parameters.
        decode: body -> plain data.
        encode: plain data -> body, for `Bus(content_type=...)`.

    Raises:
        ConfigurationError: it is not a media type, or it is JSON.
    """
    media = media_type(content_type)
    if "/" not in media or ";" in content_type or media == JSON:
        raise ConfigurationError(f"{content_type!r} is no media type of yours: write one as in 'application/yaml'.")
    for function in (decode, encode):
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"{function.__name__} of {content_type!r} is to return the value itself: write it as a plain def."
            )
    CODECS[media] = Codec(decode, encode)


def check_content_type(content_type: str | None) -> None:
    """What a bus is to send: None, or a content type that has an encoder.

    Raises:
        ConfigurationError: it has none.
    """
    if content_type is not None and content_type != JSON:
        encoder_of(content_type)


def encoder_of(content_type: str) -> Callable[[Any], bytes]:
    found = CODECS.get(media_type(content_type))
    if found is None or found.encode is None:
        raise ConfigurationError(
            f"Nothing encodes {content_type!r}: register_codec({content_type!r}, decode, encode) first. "
            + suggest(content_type, [JSON, *(media for media, codec in CODECS.items() if codec.encode)])
        )
    return found.encode
