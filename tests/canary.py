"""A secret to plant, and the search for it in all that a run shows."""

from __future__ import annotations

import base64
import json
import logging
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import quote, quote_plus

#: With what needs to be encoded in a URL, in bytes and in JSON.
CANARY = "Kanari/enp@ss:w%ört"


def forms(secret: str, user: str = "") -> set[str]:
    """How the secret may look: as it is, encoded, within bytes, and in base64 beside the user's name."""
    raw = secret.encode()
    found = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(raw)[2:-1], raw.hex()}
    found |= {json.dumps(secret)[1:-1], secret.encode("unicode_escape").decode(), raw.decode("latin-1")}
    for beside in (b"", f"{user}:".encode(), f"\0{user}\0".encode(), f"{user}\0{user}\0".encode()):
        found.add(base64.b64encode(beside + raw).decode().rstrip("="))
    # The beginning alone is too much, too: what is split at a "/" or "@" shows it.
    beginning = re.split(r"\W", secret)[0]
    return found | ({beginning} if len(beginning) > 4 else set())


def shown(text: str, secret: str = CANARY, user: str = "") -> list[str]:
    """The places in the text that show it, for a failure's message."""
    return [
        f"...{text[max(0, match.start() - 60) : match.end() + 20]!r}..."
        for form in forms(secret, user)
        for match in re.finditer(re.escape(form), text)
    ]


class Ear(logging.Handler):
    """Hears every line of every logger, and all that a handler could write of it."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line, its traceback, and what was put into it."""
        self.lines.append(f"{self.format(record)} {record.args!r} {vars(record)!r}")

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.lines)


@contextmanager
def listening() -> Iterator[Ear]:
    """Every logger at its lowest level, also those that were set up otherwise."""
    ear = Ear()
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.Logger.manager.loggerDict))]
    levels = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(1)
    logging.getLogger().addHandler(ear)
    try:
        yield ear
    finally:
        logging.getLogger().removeHandler(ear)
        for logger, level in levels:
            logger.setLevel(level)


def told(errors: Iterable[BaseException]) -> str:
    """All that can be read of errors: texts, reprs, tracebacks, and those behind them and in them."""
    return "\n".join(
        f"{error} {error!r} {error.args!r} {''.join(traceback.format_exception(error))}" for error in errors
    )
