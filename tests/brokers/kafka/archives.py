"""Archives of Java's classes, beside Kafka's jars: a JVM that reads one starts in half the processor time.

A JVM writes it as it ends, and ignores that of another Java or of other jars:
https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.brokers.kafka import jars

#: The archive of nodes, and that of the command-line tools.
SERVER, TOOL = "server", "tool"
#: Otherwise each JVM prints why it ignores an archive.
_QUIET = "-Xlog:disable"


def reading(name: str) -> tuple[str, ...]:
    """The options of a `java` that reads the archive, if there is one."""
    return (f"-XX:SharedArchiveFile={_path(name)}", _QUIET) if _path(name).exists() else ()


def writing(name: str) -> tuple[str, ...]:
    """The options of a `java` that writes the archive as it ends; then call `keep`."""
    return (f"-XX:ArchiveClassesAtExit={_written(name)}", _QUIET)


def keep(name: str) -> None:
    """Have the archive read that this process has had written."""
    _written(name).rename(_path(name))


def are_missing() -> bool:
    """Whether one has still to be written."""
    return not all(_path(name).exists() for name in (SERVER, TOOL))


def _path(name: str) -> Path:
    return jars.directory() / f"{name}.jsa"


def _written(name: str) -> Path:
    # Several processes may write one at the same time.
    return jars.directory() / f"{name}-{os.getpid()}.jsa"
