"""For all commands: finds the broker's address, and runs a coroutine and prints its errors as plain lines."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from streamtools.cli.output import FAILED, PASSWORD, USAGE, fail, note, print_trace
from streamtools.errors import ConfigurationError, QueueError, StreamToolsError
from streamtools.protocols import URL_VARIABLE, default_url
from streamtools.settings import ProtocolSettings

T = TypeVar("T")


def _read_url(given: str | None) -> str | None:
    """Return the URL that `--url` gives, or the URL in the file that it names."""
    if given is None or not given.startswith("@"):
        if given is not None and _holds_secret(given):
            note(
                f"warning: every user of this machine can see a password in --url (ps). Put the URL into "
                f"{URL_VARIABLE}, or into a file of yours and write --url @FILE (@- for standard input)."
            )
        return given
    try:
        text = sys.stdin.readline() if given == "@-" else Path(given[1:]).read_text()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not a text"
        fail(f"--url {given}: the file with the URL cannot be read: {why}.", USAGE)
    if not (url := text.strip()):
        fail(f"--url {given}: it contains no URL.", USAGE)
    return url


def _holds_secret(url: str) -> bool:
    """Whether a URL holds a password or a token, even if it is malformed."""
    if PASSWORD.search(url):
        return True
    secret = {
        name
        for settings in ProtocolSettings.__subclasses__()
        for name, field in settings.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    return any(part.partition("=")[0] in secret for part in url.partition("?")[2].split("&"))


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        callback=_read_url,
        help=f"Where the broker is, or @FILE with the URL in it; {URL_VARIABLE} when not given, else "
        "sqlite:///streamtools.db.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def address(url: str | None) -> str:
    """Return the URL to use: the given one, or the default."""
    return url or default_url()


def source(url: str | None) -> str:
    """Return where the URL comes from, in words."""
    if url:
        return "--url"
    return URL_VARIABLE if os.environ.get(URL_VARIABLE) else "the default"


def export(url: str | None) -> None:
    """Make `--url` the address of this process and of those it starts, without passing it as an argument."""
    if url:
        os.environ[URL_VARIABLE] = url


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; an error becomes one line on stderr and an exit code.

    Raises:
        typer.Exit: with 1 if the command failed, 2 for wrong usage, 128 + the number of a signal that ended it.
    """
    with plain_errors():
        try:
            return asyncio.run(_until_signal(work))
        except BrokenPipeError:
            # The program that read our output has ended. Python would raise again when it flushes stdout.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except asyncio.CancelledError:
            raise typer.Exit(128 + signal.SIGTERM) from None


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print our own errors as one line on stderr, without a traceback, and end with an exit code.

    Raises:
        typer.Exit: with 1 if the command failed, 2 for wrong usage.
    """
    try:
        yield
    except StreamToolsError as error:
        fail(str(error), code_of(error))
    except UnicodeEncodeError as error:  # an argument that is not UTF-8 cannot name a queue
        fail(f"{str(error.object)[:80]!r} is not UTF-8.", USAGE)


@contextmanager
def service_errors() -> Iterator[None]:
    """Do what `plain_errors` does; print errors of the service's own code with their traceback, without our frames.

    Raises:
        typer.Exit: with 1 if the command failed, 2 for wrong usage.
    """
    with plain_errors():
        try:
            yield
        except (StreamToolsError, typer.Exit):
            raise
        except Exception as error:
            print_trace(error)
            raise typer.Exit(FAILED) from None


def code_of(error: BaseException) -> int:
    """Return the exit code for an error: 2 for wrong usage, 1 for any other failure."""
    return USAGE if isinstance(error, ConfigurationError) and not isinstance(error, QueueError) else FAILED


async def _until_signal(work: Coroutine[Any, Any, T]) -> T:
    # SIGTERM ends a command as Ctrl-C does: messages in hand go back to the broker.
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    with suppress(ValueError, RuntimeError, NotImplementedError):  # not possible in other threads, or on this system
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def safe_address(url: str | None) -> str:
    """Return the address without a password, to show it to people.

    Raises:
        ConfigurationError: the address cannot be read, or no protocol has its scheme.
    """
    from streamtools.producer import PRODUCERS

    where = address(url)
    protocol = PRODUCERS.protocol(where)
    # The settings of a built-in protocol are known without its driver, whose client library may not be installed.
    builtin = {known.protocol: known for known in ProtocolSettings.__subclasses__()}
    settings = builtin.get(protocol) or PRODUCERS[protocol].settings_class
    return settings.from_url(where).safe_url
