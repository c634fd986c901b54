"""`streamtools schema`: the JSON Schema of commands and events, for programs in other languages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from streamtools.cli import output
from streamtools.cli.session import service_errors

if TYPE_CHECKING:
    from streamtools.bus.contracts import Contract

#: The dialect of JSON Schema that pydantic writes.
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def schema(
    targets: Annotated[
        list[str], typer.Argument(metavar="MODULE:CONTRACT", help="Such as shop.contracts:PlaceOrder.")
    ],
) -> None:
    """Print the JSON Schema of commands and events.

    One line for each. The working directory is on the import path. Beside the fields each schema says what
    the contract is called on the wire, its version, and its queue or topic.
    """
    from streamtools.cli.loading import load_contract

    with service_errors():
        for target in targets:
            output.print_json(describe(load_contract(target)))


def describe(contract: type[Contract]) -> dict[str, Any]:
    """Return the JSON Schema of a contract, with its name, version and queue or topic."""
    from streamtools.bus.contracts import Command

    terms = contract.__terms__
    where = {"to": terms.to} if issubclass(contract, Command) else {"topic": terms.topic}
    kind = "command" if issubclass(contract, Command) else "event"
    return {
        "$schema": DIALECT,
        **contract.model_json_schema(),
        "x-streamtools": {"kind": kind, "name": terms.name, "version": terms.version, **where},
    }
