"""The traceback of any error as text, in little time: of one that brings thousands of others along, the first ones.

Python makes the text of every error in a group, and of every error that another was raised from, before it leaves
most of them out: a group of 200,000 takes five seconds.
"""

from __future__ import annotations

import traceback
from typing import Final

#: Errors that are shown as they are: the error itself, those in its groups, and those that they were raised from. Of
#: an error with more, the first in each group are shown, and the first of each line of causes.
MOST: Final = 100
FIRST: Final = 5
DEEP: Final = 3
#: Calls of each traceback that are shown, the innermost.
CALLS: Final = 1000


def format_error(error: BaseException) -> str:
    """What `traceback.format_exception` gives, joined; shortened where the error brings many others along."""
    shown = error if _brings_few(error) else _stand_in(error, DEEP)
    return "".join(traceback.format_exception(shown, limit=-CALLS))


def _brings_few(error: BaseException) -> bool:
    # One that several groups hold is shown, and counted, each time: few errors can hold each other very often.
    waiting, number = [error], 0
    while waiting:
        each = waiting.pop()
        number += 1
        held = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        if number + len(waiting) + len(held) > MOST or len(_notes(each)) > MOST:
            return False
        waiting.extend(held)
        if (before := _raised_from(each)) is not None:
            waiting.append(before)
    return True


def _raised_from(error: BaseException) -> BaseException | None:
    if error.__cause__ is not None:
        return error.__cause__
    return None if error.__suppress_context__ else error.__context__


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", [])
    return notes if isinstance(notes, list) else []


def _stand_in(error: BaseException, depth: int) -> BaseException:
    """An error that looks as this one does, with a few of those that it brings along."""
    held = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    made: BaseException
    if isinstance(error, BaseExceptionGroup) and depth:
        made = BaseExceptionGroup(error.message, [_stand_in(each, depth - 1) for each in held[:FIRST]])
        left = len(held) - FIRST
    else:
        kind = type(error)
        named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        made = type(kind.__name__, (Exception,), named)(str(error))
        left = len(held)
    notes = _notes(error)
    for note in notes[:FIRST]:
        made.add_note(str(note))
    if len(notes) > FIRST:
        made.add_note(f"(and {len(notes) - FIRST:,} more notes, which are not shown)")
    if left > 0:
        made.add_note(f"(and {left:,} more errors, which are not shown)")
    _show_cause(made, error, depth)
    return made.with_traceback(error.__traceback__)


def _show_cause(made: BaseException, error: BaseException, depth: int) -> None:
    before = _raised_from(error)
    if before is None:
        return
    if not depth:
        made.add_note("(what it was raised from is not shown)")
        return
    made.__context__ = _stand_in(before, depth - 1)
    if error.__cause__ is not None:
        made.__cause__ = made.__context__
