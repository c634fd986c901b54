"""Payloads to bytes and back: by content type, and by what the handler's annotation asks for.

encoding.py     payload -> bytes
decoding.py     bytes -> plain data
validating.py   bytes -> what the handler's annotation asks for
problems.py     what is wrong with a body
codecs.py       codecs that users register
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
