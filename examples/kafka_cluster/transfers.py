"""Transfers between accounts, while brokers of the cluster are killed. Run it: python transfers.py

It sends 6,000 transfers of 40 accounts, handles them in the order of each account, and counts. Kill a broker in the
middle: both sides go on with those that are left.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from streamtools import KAFKA, PRODUCERS, ConsumerFactory, ConsumerRunner, Message

ACCOUNTS = 40
TRANSFERS = 150
QUEUE = "transfers"

consumers = ConsumerFactory(KAFKA)
producer = PRODUCERS[KAFKA](QUEUE, partitions=6, send_timeout=120)
#: The numbers of each account's transfers, in the order in which they were handled.
handled: defaultdict[str, list[int]] = defaultdict(list)
done = asyncio.Event()


@consumers.route(QUEUE, partitions=6, ordered_by="key", concurrency=64)
async def transfer(number: int, message: Message) -> None:
    """Book a transfer. One that was booked before came again because a broker died, and is skipped."""
    booked = handled[message.key or ""]
    if not booked or number > booked[-1]:
        booked.append(number)
    if count() == ACCOUNTS * TRANSFERS:
        done.set()


def count() -> int:
    """How many transfers are handled."""
    return sum(map(len, handled.values()))


async def send() -> int:
    """Send the transfers of all accounts in turn; returns how many the cluster has confirmed."""
    confirmed = 0
    for number in range(TRANSFERS):
        sends = (producer.send(number, key=f"account-{account}") for account in range(ACCOUNTS))
        confirmed += len(await asyncio.gather(*sends))
        if number % 15 == 14:
            print(f"{confirmed:,} confirmed, {count():,} handled", flush=True)
        await asyncio.sleep(0.1)
    return confirmed


async def main() -> None:
    """Send all, wait until all are handled, and print the result."""
    async with ConsumerRunner(consumers, producer):
        confirmed = await send()
        await done.wait()
    in_order = all(numbers == list(range(TRANSFERS)) for numbers in handled.values())
    print(f"{confirmed:,} confirmed, none lost, each account in order: {in_order}")


if __name__ == "__main__":
    asyncio.run(main())
