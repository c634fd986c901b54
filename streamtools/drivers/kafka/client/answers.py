"""Checks a broker's answer: it is whole, about what was asked, and its addresses are possible ones.

The library (0.14) takes whatever it can decode. It ignores an answer about another partition, and forgets what it has
asked: an unconfirmed batch is then neither sent again nor failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any, Final

from aiokafka.protocol.types import Array, Schema

#: Numbers of requests: https://kafka.apache.org/protocol#protocol_api_keys
PRODUCE, FETCH, OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH = 0, 1, 2, 3, 8, 9
DELETE_RECORDS, ADD_PARTITIONS, TXN_OFFSET_COMMIT = 21, 24, 28
#: Requests about partitions. A fetch that a quota holds back is answered with none.
ABOUT_PARTITIONS: Final = frozenset(
    {PRODUCE, FETCH, OFFSETS, OFFSET_COMMIT, OFFSET_FETCH, DELETE_RECORDS, ADD_PARTITIONS, TXN_OFFSET_COMMIT}
)
#: Lists that a broker may leave out.
OPTIONAL: Final = frozenset({"aborted_transactions"})
#: Characters of a host's name or address.
_HOST: Final = re.compile(r"[\w.:%-]{1,255}")


class AnswerChecker:
    """Reads and checks the answer to a request.

    Parameters:
        request: the library's.
    """

    __slots__ = ("_kind", "_length_is_known", "_request")

    def __init__(self, request: Any) -> None:
        self._request = request
        self._kind = request.RESPONSE_TYPE
        # The library reads some answers with the fields of an older version, and leaves the rest unread.
        self._length_is_known = self._kind.API_VERSION == request.API_VERSION

    def decode(self, data: BytesIO) -> Any:
        """The answer.

        Raises:
            ValueError: or another of `GARBAGE`: it is not an answer to this request.
        """
        answer, schema = self._kind.decode(data), self._kind.SCHEMA
        if self._length_is_known and data.read(1):
            raise ValueError("it is longer than its fields")
        if (name := _missing(schema, [getattr(answer, name) for name in schema.names])) is not None:
            raise ValueError(f"it has no {name}")
        kind = self._request.API_KEY
        if kind == METADATA:
            _check_addresses(answer.brokers)
            asked = set(self._request.topics or ())
            if asked and asked != (found := {row[1] for row in answer.topics}):
                raise _about_another(asked, found)
        elif kind in ABOUT_PARTITIONS and self._request.topics is not None:
            self._check_partitions(answer)
        return answer

    def _check_partitions(self, answer: Any) -> None:
        asked = _partitions(self._request.topics)
        found = _partitions(answer.topics if hasattr(answer, "topics") else answer.errors)
        may_lack = self._request.API_KEY == FETCH or getattr(answer, "error_code", 0)
        if not found <= asked or (found != asked and not may_lack):
            raise _about_another(asked, found)


def _partitions(topics: Iterable[Any]) -> set[tuple[str, int]]:
    """The partitions in the rows of a request or an answer."""
    return {(row[0], each if isinstance(each, int) else each[0]) for row in topics for each in row[1]}


def _about_another(asked: set[Any], found: set[Any]) -> ValueError:
    wrong, lacking = list(found - asked)[:1], list(asked - found)[:1]
    return ValueError(f"it is about {wrong[0]!r}, which was not asked for" if wrong else f"it lacks {lacking[0]!r}")


def _check_addresses(brokers: Iterable[Any]) -> None:
    for _, host, port, *_ in brokers:
        if host is None or _HOST.fullmatch(host) is None or not 1 <= port <= 65535:
            raise ValueError(f"it names a broker at {host!r}, port {port}")


def _missing(schema: Schema, values: Sequence[Any]) -> str | None:
    """The name of a list that is null and may not be; None if there is none."""
    for name, kind, value in zip(schema.names, schema.fields, values, strict=True):
        if isinstance(kind, Array) and name not in OPTIONAL:
            if value is None:
                return str(name)
            if isinstance(kind.array_of, Schema):
                for row in value:
                    if (found := _missing(kind.array_of, row)) is not None:
                        return found
    return None
