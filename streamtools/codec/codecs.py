"""The codecs that users register, by content type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from streamtools.codec.media import JSON, media_type
from streamtools.errors import ConfigurationError, suggest


@dataclass(frozen=True, slots=True)
class Codec:
    """The functions that read and write the bodies of one content type.

    Attributes:
        decode: body -> plain data; if it raises anything, the body is not of this content type.
        encode: plain data, as in JSON -> body; None if bodies are only read.
    """

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes] | None = None


#: Media type -> codec, in addition to JSON, text and bytes.
CODECS: Final[dict[str, Codec]] = {}


def register_codec(
    content_type: str, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes] | None = None
) -> None:
    """Decode bodies of this content type from now on, for every handler in this process; replaces an earlier codec.

    ```python
    register_codec("application/yaml", yaml.safe_load, lambda data: yaml.safe_dump(data).encode())
    ```

    Such a body is validated against the handler's model, as a JSON body is.

    Parameters:
        content_type: a media type, without parameters.
        decode: body -> plain data.
        encode: plain data -> body, for `Bus(content_type=...)`.

    Raises:
        ConfigurationError: `content_type` is not a media type, or it is JSON; or a function is not a plain `def`.
    """
    media = media_type(content_type)
    if "/" not in media or ";" in content_type or media == JSON:
        raise ConfigurationError(
            f"{content_type!r} cannot be registered: write a media type other than JSON, such as 'application/yaml'."
        )
    for function in (decode, encode):
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"{function.__name__} of {content_type!r} must return the value itself: write it as a plain def."
            )
    CODECS[media] = Codec(decode, encode)


def check_content_type(content_type: str | None) -> None:
    """Check that a bus can send this content type: it is None, or has an encoder.

    Raises:
        ConfigurationError: the content type has no encoder.
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
