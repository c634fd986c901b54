"""`streamtools queues`: list, stats, create, alter, seek, purge, delete."""

from __future__ import annotations

import asyncio
import json as json_module
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from streamtools.cli import output, units
from streamtools.cli.session import Json, Url, Yes, address, drive, plain_errors, safe_address
from streamtools.errors import FeatureError

if TYPE_CHECKING:
    from streamtools.admin import QueueAdmin
    from streamtools.queues import GroupInfo, QueueInfo, QueueSettings

T = TypeVar("T")
queues: typer.Typer = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at queues, create and delete them."
)

Name = Annotated[str, typer.Argument(metavar="QUEUE", help="The queue's name.")]
Names = Annotated[list[str], typer.Argument(metavar="QUEUE", help="Queue names.")]
GROUP_COLUMNS: Final = ("queue", "group", "partition", "committed", "end", "lag", "consumer")
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
    """The numbers of some queues, and the lag of each group."""

    async def look(admin: QueueAdmin) -> None:
        while True:
            infos = [await admin.stats(name) for name in names]
            groups = {name: await _groups(admin, name) for name in names}
            if json:
                output.print_json([_with_groups(asdict(info), groups[info.name]) for info in infos])
            else:
                _print(infos)
                _print_groups([group for found in groups.values() for group in found or ()])
            if watch is None:
                return
            await asyncio.sleep(watch)

    if not json:
        output.out()  # import the library for tables before the event loop runs
    at(url, look)


@queues.command()
def create(
    name: Name,
    *,
    url: Url = None,
    partitions: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="How many partitions (Kafka).")
    ] = None,
    replication: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="Copies of each partition (Kafka).")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the protocol; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Create a queue; safe to repeat."""
    options = dict(_option(text) for text in option or [])
    options |= {n: v for n, v in (("partitions", partitions), ("replication", replication)) if v is not None}
    try:
        at(url, lambda admin: admin.create(name, **options))
    except TypeError as error:  # an option that no protocol knows
        output.fail(str(error), output.USAGE)
    _done("created", name, None, json=json)


@queues.command()
def alter(
    name: Name,
    *,
    url: Url = None,
    partitions: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUMBER", help="The new number; never fewer than before."),
    ] = None,
    retention: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long messages are kept: 12h, 7d, forever.")
    ] = None,
    retention_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="How much of each partition is kept: 500MB, 2GiB, unlimited.")
    ] = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Change partitions and retention; all else stays as it is (Kafka)."""
    with plain_errors():
        kept = None if retention is None else units.seconds(retention)
        room = None if retention_bytes is None else units.size(retention_bytes)
    now = at(url, lambda admin: admin.describe(name))
    if partitions is not None and partitions > now.partitions:
        output.confirm(
            f"Give {name!r} at {safe_address(url)} {partitions} partitions instead of {now.partitions}? They cannot "
            "be taken away again, and keys move to other partitions.",
            yes=yes,
        )
    if (kept or math.inf) < now.retention or (room or math.inf) < now.retention_bytes:
        output.confirm(f"Keep less of {name!r} at {safe_address(url)}? All else is deleted for good.", yes=yes)

    async def change(admin: QueueAdmin) -> QueueSettings:
        await admin.alter(name, partitions=partitions, retention=kept, retention_bytes=room)
        return await admin.describe(name)

    found = at(url, change)
    if json:
        output.print_json({"altered": name, **_finite(asdict(found))})
        return
    output.say(f"{name}: {_described(found)}.")


@queues.command()
def seek(
    name: Name,
    *,
    to: Annotated[
        str,
        typer.Option(
            metavar="PLACE", help="beginning, end, an offset, a time (2026-01-31T08:00), or how long ago (2h)."
        ),
    ],
    group: Annotated[str | None, typer.Option(help="The group; when not given, the one named as the queue.")] = None,
    partition: Annotated[int | None, typer.Option(min=0, metavar="NUMBER", help="Only this one.")] = None,
    url: Url = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Move a group back or ahead in a queue (Kafka). Stop its consumers first."""
    with plain_errors():
        where = units.place(to)
    reader = name if group is None else group
    before = {found.name: found for found in at(url, lambda admin: admin.groups(name))}.get(reader)
    shown = f"{where:%Y-%m-%d %H:%M:%S %Z}" if isinstance(where, datetime) else to
    part = "" if partition is None else f" in partition {partition}"
    output.confirm(
        f"Move the group {reader!r} at {safe_address(url)} to {shown} of {name!r}{part}? It "
        + ("has read nothing there yet." if before is None else f"is {before.lag:,} behind now."),
        yes=yes,
    )
    after = at(url, lambda admin: admin.seek(name, where, group=group, partition=partition))
    if json:
        output.print_json(asdict(after))
    else:
        output.say(f"{name}: the group {reader!r} is {after.lag:,} behind.")


@queues.command()
def purge(name: Name, *, url: Url = None, yes: Yes = False, json: Json = False) -> None:
    """Delete every message that waits in a queue."""
    waiting = at(url, lambda admin: admin.stats(name))
    output.confirm(f"Delete {_number(waiting)} in {name!r} at {safe_address(url)} for good?", yes=yes)
    _done("purged", name, at(url, lambda admin: admin.purge(name)), json=json)


@queues.command()
def delete(name: Name, *, url: Url = None, yes: Yes = False, json: Json = False) -> None:
    """Delete a queue with all that is in it."""
    waiting = at(url, lambda admin: admin.stats(name))
    output.confirm(f"Delete {name!r} at {safe_address(url)} with {_number(waiting)} in it?", yes=yes)
    at(url, lambda admin: admin.delete(name))
    _done("deleted", name, None, json=json)


def _number(info: QueueInfo) -> str:
    return output.counted(info.ready + (info.delayed or 0), "message")


def _done(what: str, name: str, number: int | None, *, json: bool) -> None:
    if json:
        output.print_json({what: name} if number is None else {what: name, "messages": number})
    else:
        output.say(f"{name}: {what}." if number is None else f"{name}: {output.counted(number, 'message')} {what}.")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        output.fail(f"--option {text!r} has no value: write --option name=value.", output.USAGE)
    try:
        return name, json_module.loads(value)
    except ValueError:
        return name, value  # a plain word


async def _groups(admin: QueueAdmin, name: str) -> Sequence[GroupInfo] | None:
    """Return the groups of a queue; None if the protocol has no groups."""
    try:
        return await admin.groups(name)
    except FeatureError:
        return None


def _with_groups(info: dict[str, Any], groups: Sequence[GroupInfo] | None) -> dict[str, Any]:
    return info if groups is None else {**info, "groups": [asdict(group) for group in groups]}


def _described(settings: QueueSettings) -> str:
    time = units.FOREVER if settings.retention == math.inf else f"for {output.age(settings.retention)}"
    limit = settings.retention_bytes
    room = "" if limit == math.inf else f", {units.show_size(limit)} at most of each"
    return f"{output.counted(settings.partitions, 'partition')}, kept {time}{room}"


def _finite(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace infinity, which JSON does not have, by None."""
    return {name: None if value == math.inf else value for name, value in settings.items()}


def _print_groups(groups: Sequence[GroupInfo]) -> None:
    if not groups:
        return
    made = output.table("", *GROUP_COLUMNS, right=GROUP_COLUMNS[2:6])
    rows = [
        (group.queue, group.name, p.partition, p.committed, p.end, p.lag, p.member)
        for group in groups
        for p in group.partitions
    ]
    output.print_table(made, rows)


def _print(infos: Sequence[QueueInfo]) -> None:
    made = output.table("", "queue", *NUMBERS, right=NUMBERS)
    rows = [(i.name, i.ready, i.delayed, i.in_hand, i.consumers, output.age(i.oldest)) for i in infos]
    output.print_table(made, rows)
