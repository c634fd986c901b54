"""Shows what a message costs, in calls of functions; records it as the budget.

python -m tests.budgets                            every journey whose broker is there
python -m tests.budgets http handle                the functions that this one calls
python -m tests.budgets rabbitmq handle --record   its cost is its budget from now on
python -m tests.budgets rabbitmq --record          of all journeys of the protocol
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.brokers.address import rabbitmq_address
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.rabbitmq import add_vhost
from tests.budgets.budget import Cost, limit, record, recorded
from tests.budgets.calls import Calls, count
from tests.budgets.journeys import JOURNEYS

#: Runs of which the median is recorded.
RUNS = 5
#: Functions that are called less often are not shown.
WORTH_SHOWING = 0.05


@contextmanager
def place_of(protocol: str) -> Iterator[str | None]:
    """A URL to count at; None where the broker is not there."""
    match protocol:
        case "sqlite":
            with tempfile.TemporaryDirectory() as folder:
                yield f"sqlite:///{folder}/queues.db"
        case "rabbitmq" if (address := rabbitmq_address()) is not None:
            vhost = f"budgets-{secrets.token_hex(4)}"
            add_vhost(address, vhost)
            try:
                yield address.in_vhost(vhost).url
            finally:
                address.manage("DELETE", f"vhosts/{vhost}")
        case "kafka" if (kafka := KafkaAddress.from_environment() or KafkaAddress.from_state()) is not None:
            yield kafka.url
        case "rabbitmq" | "kafka":
            yield None
        case _:
            yield f"{protocol}://budgets?maxsize=10000" if protocol == "asyncio" else ""


def usual(protocol: str, url: str, names: list[str]) -> dict[str, Calls]:
    """The calls of each journey, of the run in the middle."""
    runs = [count(protocol, url, names) for _ in range(RUNS)]
    return {name: sorted((r[name] for r in runs), key=lambda calls: sum(calls.values()))[RUNS // 2] for name in names}


def show(protocol: str, found: dict[str, Calls]) -> None:
    """One line for each journey; a single one with its functions."""
    budgets = recorded().get(protocol, {})
    for name, calls in found.items():
        cost, budget = Cost.of(calls), budgets.get(name)
        own, every = (f"{limit(budget.own):.1f}", f"{limit(budget.all):.1f}") if budget else ("none", "none")
        print(
            f"{protocol:9} {name:24} own {cost.own:7.2f} (budget {own:>5})   all {cost.all:7.2f} (budget {every:>5})"
        )
    if len(found) == 1:
        [calls] = found.values()
        for place, number in sorted(calls.items(), key=lambda each: -each[1]):
            if number >= WORTH_SHOWING:
                print(f"{number:9.2f}  {place}")


def main() -> None:
    """Count, show, and record if that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", nargs="?", choices=JOURNEYS)
    parser.add_argument("journey", nargs="?", help="all of the protocol when omitted")
    parser.add_argument("--record", action="store_true", help="take what is counted as the budget")
    chosen = parser.parse_args()
    for protocol in [chosen.protocol] if chosen.protocol else JOURNEYS:
        names = [chosen.journey] if chosen.journey else list(JOURNEYS[protocol])
        if unknown := set(names) - JOURNEYS[protocol].keys():
            parser.error(f"{unknown.pop()!r} is no journey of {protocol}: {', '.join(JOURNEYS[protocol])}")
        with place_of(protocol) as url:
            if url is None:
                print(f"{protocol:9} no broker is there. Type: scripts/brokers up")
                continue
            found = usual(protocol, url, names)
        if chosen.record:
            record(protocol, {name: Cost.of(calls) for name, calls in found.items()})
        show(protocol, found)


if __name__ == "__main__":
    main()
