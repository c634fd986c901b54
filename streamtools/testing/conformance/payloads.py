"""What is sent: payloads of every kind, odd bytes, odd headers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from typing_extensions import TypedDict  # typing's own cannot be validated before Python 3.12


class Order(BaseModel):
    """A payload as a pydantic model."""

    id: int
    note: str = ""


@dataclass
class Payment:
    """A payload as a dataclass."""

    order: int
    amount: float


class Parcel(TypedDict):
    """A payload as a typed mapping."""

    order: int
    weight: float


_MAPPING: Final = {"id": 1, "deep": {"list": [1, 2.5, None, True, "ü"]}}
#: What is sent, and what a handler without an annotation is given.
PAYLOADS: Final[dict[str, tuple[Any, Any]]] = {
    "text": ("Grüße, 世界 🎉\n\0", "Grüße, 世界 🎉\n\0"),
    "empty text": ("", ""),
    "bytes": (b"\x00\xff\xfe", b"\x00\xff\xfe"),
    "a mapping": (_MAPPING, _MAPPING),
    "a list, which is one message": ([1, [2, 3], {"a": None}], [1, [2, 3], {"a": None}]),
    "an empty list": ([], []),
    "a large number": (2**62, 2**62),
    "a fraction": (1.5, 1.5),
    "true": (True, True),
    "nothing": (None, None),
    "a model": (Order(id=7, note="ä"), {"id": 7, "note": "ä"}),
    "a dataclass": (Payment(7, 9.5), {"order": 7, "amount": 9.5}),
}  # fmt: skip

#: Bodies that break whoever takes a body for text, or for a C string.
BODIES: Final[dict[str, bytes]] = {
    "empty": b"",
    "nul": b"\x00",
    "every byte": bytes(range(256)),
    "no utf-8": b"\xff\xfe\xed\xa0\x80",
    "line breaks": b"\r\n\r\n--\r\n",
    "a frame end": b"\xce" * 9,
    "200 KB": random.Random(1).randbytes(200_000),  # nosec B311: a payload
}

#: Queue names that mean something to some protocol; the two of a pair are alike to a careless one.
NAMES: Final[dict[str, tuple[str, str]]] = {
    "case": ("Orders", "orders"),
    "dots": ("a.b", "a_b"),
    "slashes": ("a/b", "a%2Fb"),
    "dot segments": ("a/../b", "b"),
    "wildcards": ("a*", "ab"),
    "topic wildcards": ("a.#", "a.b.c"),
    "text": ("Aufträge 注文 🎉", "Auftrage"),
    "composed": ("\u00e9", "e\u0301"),
    "blanks": ("a b", "a+b"),
    "trailing blank": ("a ", "a"),
    "a query": ("a?b=c", "a"),
    "a fragment": ("a#b", "a"),
    "quotes": ("a'b\"c", "a''b\"c"),
    "placeholder": ("a{queue}", "a{}"),
    "backslash": ("a\\b", "a/b"),
}

#: Names and values that mean something to some protocol, or that a careless one would change.
HEADERS: Final[dict[str, str]] = {
    "plain": "value",
    "empty": "",
    "Upper": "Case",
    "upper": "is another name",
    "ünï-cödé 🎉": "Grüße, 世界",
    "spaces": "  kept  ",
    "line": "break\r\nInjected: yes",
    "nul": "a\x00b",
    "quotes": "\"'`;,=%25",
    "long": "x" * 5000,
    "content-type": "text/evil",
    "Content-Length": "0",
    "host": "elsewhere",
    "x-death": "never",
    "CC": "copy",
    "expiration": "1",
    "x-delay": "99",
    "ce-id": "not ours",
    "ce_id": "not ours",
    "id": "not ours",
    "attempt": "99",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
