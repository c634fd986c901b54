"""`streamtools run`: runs a service, in this process or in worker processes."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from streamtools.cli.output import USAGE, fail
from streamtools.cli.session import Url, export, service_errors

LogLevel = Literal["debug", "info", "warning", "error"]


def run(
    target: Annotated[str, typer.Argument(metavar="MODULE:APP", help="What to run, such as shop.service:runner.")],
    *,
    url: Url = None,
    workers: Annotated[int, typer.Option(min=1, max=512, help="Processes that share the work.")] = 1,
    reload: Annotated[bool, typer.Option("--reload", help="Start again when a .py file here changes.")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="The lowest level that is logged, on stderr.")] = "info",
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
    shared: Annotated[bool, typer.Option("--shared", hidden=True)] = False,
) -> None:
    """Run a service until SIGTERM or Ctrl-C.

    It is a ConsumerRunner, ConsumerFactory, HandlerFactory, Bus, Consumer or decorated handler. The working
    directory is on the import path. With --workers or --reload the command starts processes and watches them: one
    that dies is started again, up to five times in a minute; then the command ends with 1. SIGTERM and Ctrl-C let
    running handlers finish; a second one ends at once.
    """
    export(url)
    _log_to_stderr(log_level, workers > 1 or reload or parent is not None)
    if workers > 1 or reload:
        raise typer.Exit(_run_workers(target, workers, log_level, reload=reload))
    _run_here(target, parent, shared=shared)


def _run_here(target: str, parent: int | None, *, shared: bool) -> None:
    from streamtools.cli.health import ToParent
    from streamtools.cli.loading import check_shared, load
    from streamtools.engine.tasks.signals import Interrupted, Interruptible, heeded

    with suppress(Interrupted), heeded(), service_errors():
        watcher = None if parent is None else ToParent(parent)
        runner = Interruptible(by_signal=True).run(load, target)  # importing the service may take long
        if shared:
            check_shared(runner)
        if watcher is not None:
            runner.report_to(watcher.endpoint)
        runner.run()


def _run_workers(target: str, number: int, log_level: str, *, reload: bool) -> int:
    from streamtools.cli.reload import changes
    from streamtools.cli.workers import Workers

    if sys.platform == "win32":
        fail("--workers and --reload need process groups and signals, which Windows lacks.", USAGE)
    command = [sys.executable, "-m", "streamtools", "run", target, "--log-level", log_level]
    command += ["--shared"] if number > 1 else []
    watch = partial(changes, Path.cwd()) if reload else None

    async def supervise() -> int:
        return await Workers(command, number, watch).run()

    return asyncio.run(supervise())


def _log_to_stderr(level: str, several: bool) -> None:
    process = " %(process)d" if several else ""
    # At INFO, the client library logs eight lines for each consumer that joins its group.
    logging.getLogger("aiokafka").setLevel(logging.WARNING if level == "info" else level.upper())
    # If the service's own module sets up logging, it replaces or keeps this.
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format=f"%(asctime)s{process} %(levelname)s %(name)s: %(message)s"
    )
