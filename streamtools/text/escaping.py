"""Text from outside, made harmless for logs and terminals.

A message may hold anything: line ends that forge lines of a log, escape sequences that a terminal obeys, characters
that turn the direction of writing. `escaped` shows them as escapes. It is applied to whatever this library logs, by a
filter on its logger, and to whatever the command line prints.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from streamtools.text.tracebacks import format_error

#: Values that are as they are.
_PLAIN: Final = (int, float, type(None))
#: How much of one value is shown in a log line, in characters.
LONGEST: Final = 16 * 1024
#: Characters whose escapes are kept, so that a text of many takes little time.
KEPT: Final = 4096
#: Characters that Python calls printable and that show nothing: fillers, blanks of Braille, joiners, selectors of a
#: variant (https://www.unicode.org/reports/tr44/#Default_Ignorable_Code_Point).
_HIDDEN: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
#: The selector that makes a coloured picture of the symbol before it, as it is escaped: there it is no deception.
_COLOURED: Final = re.compile(r"(?<=[^\x00-\x7f])\\ufe0f")


class _Escapes(dict[int, str]):
    """Code point -> what is shown instead, for `str.translate`; the first `KEPT` that are met are kept."""

    def __missing__(self, code: int) -> str:
        shown = self.shown(code)
        if len(self) < KEPT:
            self[code] = shown
        return shown

    def shown(self, code: int) -> str:
        """What one character is shown as."""
        character = chr(code)
        return self.escaped(character) if is_hidden(character) else character

    def escaped(self, character: str) -> str:
        """A character that cannot be seen."""
        return character.encode("unicode_escape").decode()


class _LineEscapes(_Escapes):
    """The same, but for line ends and tabs."""

    def escaped(self, character: str) -> str:
        return character if character in "\t\n" else super().escaped(character)


class _JSONEscapes(_Escapes):
    """The same, as JSON has it."""

    def escaped(self, character: str) -> str:
        units = character.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))


_ESCAPES, _LINE_ESCAPES, _JSON_ESCAPES = _Escapes(), _LineEscapes(), _JSONEscapes()


def escaped(text: str, *, lines: bool = False) -> str:
    """The text with all characters that cannot be seen as escapes: controls, C1, bidirectional and invisible ones.

    Parameters:
        lines: keep line ends and tabs.
    """
    if not is_hidden(text):
        return text
    return _coloured(text.translate(_LINE_ESCAPES if lines else _ESCAPES))


def visible_json(document: str) -> str:
    """A JSON document, written on one line, with the same characters as JSON's own escapes."""
    return _coloured(document.translate(_JSON_ESCAPES)) if is_hidden(document) else document


def is_hidden(text: str) -> bool:
    """Whether a character of it cannot be seen."""
    return not text.isprintable() or (not text.isascii() and _HIDDEN.search(text) is not None)


def _coloured(text: str) -> str:
    return _COLOURED.sub("\ufe0f", text)


def visible_block(text: str, indent: str = "  ") -> str:
    """A text of several lines, of which none but the first begins where a line of our own does."""
    return escaped(text, lines=True).replace("\n", f"\n{indent}")


class VisibleRecords(logging.Filter):
    """Makes what is logged harmless: each argument on one line, a traceback indented below its line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is logged all the same."""
        arguments = record.args
        if isinstance(arguments, Mapping):
            record.args = {name: _shown(value) for name, value in arguments.items()}
        elif arguments:
            record.args = tuple(map(_shown, arguments))
        elif isinstance(record.msg, str):
            record.msg = escaped(record.msg, lines=True)
        if record.exc_info and not record.exc_text:
            record.exc_text = visible_block(_formatted(record.exc_info))
        return True


def _shown(value: Any) -> Any:
    if isinstance(value, _PLAIN) or (type(value) is str and len(value) <= LONGEST and not is_hidden(value)):
        return value
    return _Shown(value)


class _Shown:
    """Stands for an argument of a log line."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return _cut(str, self._value)

    def __repr__(self) -> str:
        return _cut(repr, self._value)


def _cut(write: Callable[[object], str], value: object) -> str:
    try:
        text = write(value)
    except BaseException as broken:  # whatever it raises must not end what logs it
        return f"(its text could not be read: {type(broken).__name__})"
    return escaped(text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)")


def _formatted(info: Any) -> str:
    try:
        text = format_error(info[1]).rstrip("\n") if info[1] is not None else "(no exception)"
    except BaseException as broken:  # an exception whose own text or attributes raise
        return f"(its traceback could not be read: {type(broken).__name__})"
    left = len(text) - 2 * LONGEST  # an exception's text may hold a whole message
    return text if left <= 0 else f"{text[:LONGEST]}\n... ({left:,} characters)\n{text[-LONGEST:]}"


def guard_log() -> None:
    """Have the library's logger make what it logs visible."""
    logger = logging.getLogger("streamtools")
    if not any(isinstance(each, VisibleRecords) for each in logger.filters):
        logger.addFilter(VisibleRecords())
