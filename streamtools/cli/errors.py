"""`streamtools errors`: list, show, redrive, purge."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from streamtools.cli import output
from streamtools.cli.messages import as_data, body_text
from streamtools.cli.queues import at
from streamtools.cli.redriving import Movable, missing_queues, told, told_whole
from streamtools.cli.session import Json, Url, Yes, plain_errors, safe_address
from streamtools.wire import key_text

if TYPE_CHECKING:
    from streamtools.admin import QueueAdmin
    from streamtools.message import Message
    from streamtools.redrive import ErrorFilter, ErrorGroup, Progress

#: The most messages that are read before something is listed, shown, moved or deleted.
PEEK_LIMIT: Final = 10_000


errors: typer.Typer = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at failed messages, and put them back to work.",
)

Queue = Annotated[str, typer.Option("--queue", "-q", help="The error queue.")]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        "-w",
        metavar="NAME=VALUE",
        help="Only messages with this value of queue=, exception=, handler=, reason=, type=, id=, key=, source= or "
        "header.NAME= (* and ? stand for any characters); a word alone is searched in reason and body. Repeatable; "
        "all must match.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="This many at most.")]
From = Annotated[
    list[str] | None,
    typer.Option("--from", metavar="QUEUE", help="Only those that failed in this queue; may be repeated."),
]
To = Annotated[str | None, typer.Option(help="The queue to put them in; the one each failed in, if not given.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Message ids; all when none is given.")]


@errors.command("list")
def list_(*, url: Url = None, queue: Queue = "error", filter_: Filter = None, json: Json = False) -> None:
    """Count failed messages by queue and exception."""
    chosen = _filter(filter_)
    seen = _peek(url, queue, PEEK_LIMIT)
    from streamtools.redrive import group_errors

    groups = group_errors(message for message in seen if chosen(message))
    if json:
        output.print_json([_group_data(group) for group in groups])
        return
    _print_groups(groups)
    _say_what_was_seen(queue, len(seen), sum(group.count for group in groups), url)


@errors.command()
def show(
    ids: Ids = None,
    *,
    url: Url = None,
    queue: Queue = "error",
    filter_: Filter = None,
    limit: Limit = 10,
    json: Json = False,
) -> None:
    """Show failed messages in full.

    Why and when, the traceback, headers and body.
    """
    chosen = _filter(filter_)
    found = [m for m in _peek(url, queue, PEEK_LIMIT) if (not ids or m.id in ids) and chosen(m)]
    shown = found if limit is None else found[:limit]
    for message in shown:
        if json:
            output.print_json(_error_data(message))
        else:
            _print_error(message)
    if not found:
        output.fail(f"{queue!r} at {safe_address(url)} holds no such message.")
    if len(shown) < len(found):
        output.note(f"{len(shown)} of {len(found):,} shown; --limit shows more.")


@errors.command()
def redrive(
    ids: Ids = None,
    *,
    url: Url = None,
    queue: Queue = "error",
    filter_: Filter = None,
    from_: From = None,
    to: To = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Put failed messages back to work.

    They keep id, body and headers, and begin with attempt 1. A message leaves the error queue only when its queue
    holds it: if this command is killed, one may be put back twice, none is lost. A message says itself where it
    failed, so the queues are shown first, and you are asked. With --yes the messages go only to queues named by
    --from or --to, and to the queue whose own error queue this is: orders for orders.error.
    """
    if to is not None:
        from streamtools.validation.checks import check_name

        with plain_errors():
            check_name(to)
    chosen = Movable(_choose(ids, filter_), to, from_)
    seen = _peek(url, queue, PEEK_LIMIT)
    chosen.missing = at(url, lambda admin: missing_queues(admin, filter(None, map(chosen.target, seen))))
    targets = chosen.targets(seen, limit)
    if dry_run:
        chosen.allowed.update(told_whole(targets))
        _print_dry_run("redriven", seen, chosen, limit, json=json)
        output.note(f"They would go: {told(targets)}.")
        chosen.say_what_stays(queue)
        return
    _allow(chosen, targets, f"{queue!r} at {safe_address(url)}", own=queue if yes else None)
    number = _move(url, queue, chosen, limit)
    _print_done("redriven", queue, number, json=json)
    chosen.say_what_stays(queue)
    _say_what_is_missing(ids, queue, number, limit)


def _allow(chosen: Movable, targets: Mapping[str, int], where: str, *, own: str | None) -> None:
    """Allow the queues that the operator confirms; if `own` is given, allow the queue of this error queue unasked."""
    if own is not None:
        chosen.allow_own(own)
    elif targets:
        how = "" if output.at_terminal() or chosen.allowed else " (with --from QUEUE for each of them)"
        output.confirm(f"Put messages of {where} back to work: {told(targets)}?{how}", yes=False)
        chosen.allowed.update(told_whole(targets))


def _move(url: str | None, queue: str, chosen: Movable, limit: int | None) -> int:
    from streamtools.redrive import redrive

    def work(admin: QueueAdmin, looked: Progress) -> Awaitable[int]:
        named = chosen.allowed if chosen.allowed and chosen.to is None else None
        return redrive(admin, queue, where=chosen, target=chosen.to, failed_in=named, limit=limit, progress=looked)

    chosen.begin()
    try:
        return _with_bar(url, queue, work)
    except typer.Exit:
        chosen.say_what_stays(queue)
        raise


@errors.command()
def purge(
    ids: Ids = None,
    *,
    url: Url = None,
    queue: Queue = "error",
    filter_: Filter = None,
    dry_run: DryRun = False,
    limit: Limit = None,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete failed messages for good."""
    chosen = _choose(ids, filter_)
    seen = _peek(url, queue, PEEK_LIMIT)
    number = _counted(sum(chosen(message) for message in seen), limit)
    if dry_run or not number:
        _print_dry_run("forgotten", seen, chosen, limit, json=json)
        _say_what_is_missing(ids, queue, number, limit)
        return
    more = " or more" if len(seen) == PEEK_LIMIT else ""
    output.confirm(f"Delete {number:,}{more} failed messages in {queue!r} at {safe_address(url)} for good?", yes=yes)

    from streamtools.redrive import discard

    def work(admin: QueueAdmin, looked: Progress) -> Awaitable[int]:
        if limit is None and not ids and not filter_:
            return admin.purge(queue)
        return discard(admin, queue, where=chosen, limit=limit, progress=looked)

    number = _with_bar(url, queue, work)
    _print_done("forgotten", queue, number, json=json)
    _say_what_is_missing(ids, queue, number, limit)


def _say_what_is_missing(ids: Sequence[str] | None, queue: str, number: int, limit: int | None) -> None:
    """End with exit code 1 if some of the given ids were not found, so that a script notices it."""
    if (missing := len(set(ids or ())) - number) > 0 and limit is None:
        output.fail(f"{queue!r} holds no message for {missing} of the ids.")


def _with_bar(url: str | None, queue: str, work: Callable[[QueueAdmin, Progress], Awaitable[int]]) -> int:
    """Do the work, with a progress bar that counts the messages."""
    with output.Bar(f"Going through {queue}") as bar:

        async def watched(admin: QueueAdmin) -> int:
            bar.expect((await admin.stats(queue)).ready)
            return await work(admin, lambda seen: bar.advance())

        return at(url, watched)


# --- choosing ------------------------------------------------------------------------------------


def _filter(texts: Sequence[str] | None) -> ErrorFilter:
    from streamtools.redrive import ErrorFilter

    with plain_errors():
        return ErrorFilter(texts or [])


def _choose(ids: Sequence[str] | None, texts: Sequence[str] | None) -> Any:
    chosen, wanted = _filter(texts), set(ids or ())
    return (lambda message: message.id in wanted and chosen(message)) if wanted else chosen


def _peek(url: str | None, queue: str, limit: int) -> Sequence[Message]:
    async def peek(admin: QueueAdmin) -> Sequence[Message]:
        from streamtools.errors import QueueError

        try:
            return await admin.peek(queue, limit)
        except QueueError as error:
            if not str(error).startswith("There is no "):
                raise
            raise QueueError(
                f"{error} Either nothing here has consumed yet, or its error queue has another name: --queue NAME."
            ) from error

    return at(url, peek)


def _counted(number: int, limit: int | None) -> int:
    return number if limit is None else min(number, limit)


# --- printing ------------------------------------------------------------------------------------


def _print_groups(groups: Sequence[ErrorGroup]) -> None:
    if not groups:
        return
    made = output.table(
        "", "failed in", "exception", "count", "first", "last", "the latest one's reason", right=["count"]
    )
    rows = [
        (
            g.queue,
            g.exception.rpartition(".")[2],
            g.count,
            _when(g.first_failed),
            _when(g.last_failed),
            g.reason[:300],
        )
        for g in groups
    ]
    output.print_table(made, rows)


def _when(seconds: float) -> str:
    return (output.moment(seconds) or "-").removesuffix("+00:00").replace("T", " ")


def _say_what_was_seen(queue: str, seen: int, chosen: int, url: str | None) -> None:
    if not seen:
        output.note(f"{queue!r} at {safe_address(url)} is empty: nothing has failed.")
    elif not chosen:
        output.note(f"None of the {seen:,} messages in {queue!r} matches the filter.")
    elif seen == PEEK_LIMIT:
        output.note(f"Of the first {PEEK_LIMIT:,} messages; there may be more.")


def _group_data(group: ErrorGroup) -> dict[str, Any]:
    times = {"first_failed": output.moment(group.first_failed), "last_failed": output.moment(group.last_failed)}
    return asdict(group) | times


def _error_data(message: Message) -> dict[str, Any]:
    if message.error is None:
        return as_data(message)
    error = asdict(message.error)
    for name in ("first_failed", "last_failed"):
        error[name] = output.moment(error[name])
    return as_data(message) | {"error": error}


def _print_error(message: Message) -> None:
    output.say(f"--- {message.id}")
    error = message.error
    facts: dict[str, object] = {
        "type": message.type,
        "key": key_text(message.key) or None,
        "sent": output.moment(message.time),
    }
    if error is not None:
        facts = {
            "failed in": error.queue, "place": error.place, "handler": error.handler,
            "exception": error.exception, "reason": error.reason, "left out": error.omitted,
            "attempts": error.attempts, "first": _when(error.first_failed), "last": _when(error.last_failed), **facts,
        }  # fmt: skip
    facts |= {f"header {name}": value for name, value in message.headers.items()}
    for name, value in facts.items():
        if value:
            output.say(f"{name + ':':<12}{value}")
    if error is not None and error.traceback:
        output.say_block(error.traceback.rstrip())
    output.say_block(body_text(message) + "\n")


def _print_dry_run(what: str, seen: Sequence[Message], chosen: Any, limit: int | None, *, json: bool) -> None:
    found = [message for message in seen if chosen(message)]
    found = found if limit is None else found[:limit]
    if json:
        output.print_json({what: 0, "would_be": len(found), "ids": [message.id for message in found]})
        return
    from streamtools.redrive import group_errors

    _print_groups(group_errors(found))
    output.say(f"{len(found):,} of {len(seen):,} messages would be {what}; nothing was changed.")


def _print_done(what: str, queue: str, number: int, *, json: bool) -> None:
    if json:
        output.print_json({what: number})
    else:
        output.say(f"{output.counted(number, 'message')} of {queue} {what}.")
