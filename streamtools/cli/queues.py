"""`streamtools queues`: list, stats, create, purge, delete."""

from __future__ import annotations

import asyncio
import json as json_module
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from streamtools.cli import output
from streamtools.cli.session import Json, Url, Yes, address, drive, plain_errors, safe_address

if TYPE_CHECKING:
    from streamtools.admin import QueueAdmin, QueueInfo

T = TypeVar("T")
queues: typer.Typer = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at queues, make and remove them."
)

Name = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue's name.")]
Names = Annotated[list[str], typer.Argument(metavar="QUEUE...", help="Queue names.")]
NUMBERS: Final = ("ready", "delayed", "in hand", "consumers", "oldest")


def at(url: str | None, work: Callable[[QueueAdmin], Awaitable[T]]) -> T:
    """Do something with an open QueueAdmin."""
    from streamtools.admin import QueueAdmin

    with plain_errors():
        admin = QueueAdmin(url=address(url))

    async def session() -> T:
        async with admin:
            return await work(admin)

    return drive(session())


@queues.command("list")
def list_(*, url: Url = None, json: Json = False) -> None:
    """Every queue with its numbers."""
    infos = at(url, lambda admin: admin.list())
    if json:
        output.print_json([asdict(info) for info in infos])
    elif not infos:
        output.note(
            f"There is no queue at {safe_address(url)}. A queue is made when its first producer or consumer opens."
        )
    else:
        _print(infos)


@queues.command()
def stats(
    names: Names,
    *,
    url: Url = None,
    json: Json = False,
    watch: Annotated[float | None, typer.Option(min=0.1, metavar="SECONDS", help="Repeat until Ctrl-C.")] = None,
) -> None:
    """The numbers of some queues."""

    async def look(admin: QueueAdmin) -> None:
        while True:
            infos = [await admin.stats(name) for name in names]
            if json:
                output.print_json([asdict(info) for info in infos])
            else:
                _print(infos)
            if watch is None:
                return
            await asyncio.sleep(watch)

    at(url, look)


@queues.command()
def create(
    name: Name,
    *,
    url: Url = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="The protocol's own; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a queue; safe to repeat."""
    options = dict(_option(text) for text in option or [])
    try:
        at(url, lambda admin: admin.create(name, **options))
    except TypeError as error:  # an option that no protocol knows
        output.fail(str(error), output.USAGE)
    _done("created", name, None, json=json)


@queues.command()
def purge(name: Name, *, url: Url = None, yes: Yes = False, json: Json = False) -> None:
    """Forget every message that waits in a queue."""
    waiting = at(url, lambda admin: admin.stats(name))
    output.confirm(f"Forget {_number(waiting)} in {name!r} at {safe_address(url)} for ever?", yes=yes)
    _done("purged", name, at(url, lambda admin: admin.purge(name)), json=json)


@queues.command()
def delete(name: Name, *, url: Url = None, yes: Yes = False, json: Json = False) -> None:
    """Delete a queue with all that is in it."""
    waiting = at(url, lambda admin: admin.stats(name))
    output.confirm(f"Delete {name!r} at {safe_address(url)} with {_number(waiting)} in it?", yes=yes)
    at(url, lambda admin: admin.delete(name))
    _done("deleted", name, None, json=json)


def _number(info: QueueInfo) -> str:
    return _messages(info.ready + (info.delayed or 0))


def _messages(number: int) -> str:
    return f"{number:,} message{'' if number == 1 else 's'}"


def _done(what: str, name: str, number: int | None, *, json: bool) -> None:
    if json:
        output.print_json({what: name} if number is None else {what: name, "messages": number})
    else:
        print(f"{name}: {what}." if number is None else f"{name}: {_messages(number)} {what}.")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        output.fail(f"--option {text!r} has no value: write --option name=value.", output.USAGE)
    try:
        return name, json_module.loads(value)
    except ValueError:
        return name, value  # a plain word


def _print(infos: Sequence[QueueInfo]) -> None:
    made = output.table("", "queue", *NUMBERS, right=NUMBERS)
    rows = [(i.name, i.ready, i.delayed, i.in_hand, i.consumers, output.age(i.oldest)) for i in infos]
    output.print_table(made, rows)
