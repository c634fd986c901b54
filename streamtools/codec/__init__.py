"""Encodes payloads into bytes, and decodes bodies by their content type and by the handler's annotation.

encoding.py     payload -> bytes
decoding.py     bytes -> plain data
validating.py   bytes -> the type of the handler's annotation
problems.py     explains why a body does not fit
codecs.py       the codecs that users register
media.py        content types
"""

from streamtools.codec.codecs import check_content_type, register_codec
from streamtools.codec.decoding import decode, read_json
from streamtools.codec.encoding import encode
from streamtools.codec.media import BATCH, BINARY, JSON, TEXT, is_json, media_type
from streamtools.codec.problems import PROBLEMS, bare
from streamtools.codec.validating import Decoder, decoder

__all__ = [
    "BATCH",
    "BINARY",
    "Decoder",
    "JSON",
    "PROBLEMS",
    "TEXT",
    "bare",
    "check_content_type",
    "decode",
    "decoder",
    "encode",
    "is_json",
    "media_type",
    "read_json",
    "register_codec",
]
