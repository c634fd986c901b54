"""Writes orders.jsonl: 3,000 order events, the same on every machine and every Python.

    python examples/data/generate.py

A few dozen lines are malformed, as real input is; each of them is wrong in one of four ways. About one
order in twenty-five goes to the warehouse in Tromsø, which is closed when the demo begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
Event = dict[str, Any]

SEED = 20260314
EVENTS = 3_000
#: One line in this many is malformed.
MALFORMED_EVERY = 61
FILE = Path(__file__).with_name("orders.jsonl")

#: Sku, title, price in euros.
PRODUCTS = [
    ("LMP-4410-BRS", "Desk lamp, brass", "89.90"),
    ("LMP-4420-BLK", "Floor lamp, black", "149.00"),
    ("CHR-1007-OAK", "Dining chair, oak", "129.00"),
    ("CHR-1012-ASH", "Rocking chair, ash", "349.50"),
    ("TBL-2201-WAL", "Side table, walnut", "219.00"),
    ("TBL-2260-OAK", "Extending table, oak", "899.00"),
    ("RUG-3304-WOL", "Wool rug 170 × 240 cm", "415.25"),
    ("CUP-0815-STN", "Stoneware cup, set of four", "38.40"),
    ("KTL-0650-CPR", "Copper kettle, 1.5 l", "74.95"),
    ("BLK-5120-LIN", "Linen blanket, “Fjäll”", "64.00"),
    ("PIL-5135-FTH", "Feather pillow", "29.90"),
    ("CLK-7001-BEE", "Wall clock, beech", "54.50"),
    ("VAS-0912-GLS", "Glass vase, smoke", "44.80"),
    ("CND-0303-BWX", "Beeswax candle", "6.75"),
    ("HKS-0021-BRS", "Coat hook, brass", "12.30"),
]
#: First name, family name, as customers write them; the address form of the name.
CUSTOMERS = [
    ("Søren", "Åkesson", "soren.akesson"), ("Zoë", "van den Berg", "zoe.vandenberg"),
    ("François", "Lefèvre", "francois.lefevre"), ("Łukasz", "Wójcik", "lukasz.wojcik"),
    ("Aoife", "Ní Bhriain", "aoife.nibhriain"), ("Jürgen", "Weiß", "juergen.weiss"),
    ("Ana", "Gonçalves", "ana.goncalves"), ("Sigrún", "Jónsdóttir", "sigrun"),
    ("Tomáš", "Dvořák", "tomas.dvorak"), ("Éva", "Szőke", "eva.szoke"),
    ("Maria", "O’Connor", "maria.oconnor"), ("山田", "花子", "hanako.yamada"),
    ("İrem", "Yıldız", "irem.yildiz"), ("Noa", "de Vries", "noa.devries"),
    ("Elena", "Ruiz Peña", "elena.ruiz"), ("Ingrid", "Ødegård", "ingrid.odegard"),
]  # fmt: skip
#: Street, postal code, city, country, currency, euros to that currency, decimals.
PLACES = [
    ("Storgatan 12", "211 42", "Malmö", "SE", "SEK", "11.20", 2),
    ("Karl Johans gate 5", "0154", "Oslo", "NO", "NOK", "11.60", 2),
    ("Rue de l’Église 3", "67000", "Strasbourg", "FR", "EUR", "1", 2),
    ("Große Bleichen 27", "20354", "Hamburg", "DE", "EUR", "1", 2),
    ("ul. Świętojańska 44", "81-372", "Gdynia", "PL", "PLN", "4.30", 2),
    ("Calle Alcalá 108, 3º B", "28009", "Madrid", "ES", "EUR", "1", 2),
    ("Oudegracht 211", "3511 NJ", "Utrecht", "NL", "EUR", "1", 2),
    ("14 Sráid na Siopaí", "H91 E2F3", "Galway", "IE", "EUR", "1", 2),
    ("Rua das Flores 86", "4050-262", "Porto", "PT", "EUR", "1", 2),
    ("27 Argyle Street", "G2 8AH", "Glasgow", "GB", "GBP", "0.86", 2),
    ("Laugavegur 22", "101", "Reykjavík", "IS", "EUR", "1", 2),
    ("北区王子 1-4-12", "114-0002", "東京都", "JP", "JPY", "162", 0),
]
#: Warehouse, and how many orders in 25 it ships.
WAREHOUSES = [("RTM-1", 10), ("MMA-2", 9), ("GDN-1", 5), ("TOS-1", 1)]
CHANNELS = ["web", "web", "web", "app", "app", "phone", "shop"]


class Dice:
    """Choices made with `random()` alone, the one method whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed).random  # noqa: S311

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self.random() * (high - low + 1))

    def one(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[self.number(0, len(items) - 1)]


def events(number: int = EVENTS) -> Iterator[str]:
    """The lines, without their line ends."""
    dice = Dice(SEED)
    moment = datetime(2026, 3, 14, 6, 0, tzinfo=UTC)
    shelf = [name for name, share in WAREHOUSES for _ in range(share)]
    spoilers = [broken_json, missing_field, wrong_type, negative_quantity]
    for position in range(1, number + 1):
        moment += timedelta(milliseconds=dice.number(400, 28_000))
        event = order(dice, position, moment, dice.one(shelf))
        if position % MALFORMED_EVERY:
            yield json.dumps(event, ensure_ascii=False)
        else:
            yield spoilers[position // MALFORMED_EVERY % len(spoilers)](event)


def order(dice: Dice, position: int, moment: datetime, warehouse: str) -> Event:
    """One order event."""
    first, family, mailbox = dice.one(CUSTOMERS)
    street, code, city, country, currency, rate, decimals = dice.one(PLACES)
    convert = _converter(Decimal(rate), decimals)
    lines = [_ordering_key(dice, convert) for _ in range(dice.number(1, 4))]
    total = sum((line["quantity"] * Decimal(line["unit_price"]) for line in lines), Decimal(0))
    return {
        "order_id": f"ORD-2026-{position:06}",
        "placed_at": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "channel": dice.one(CHANNELS),
        "customer": {
            "id": f"C-{dice.number(10_000, 19_999)}",
            "name": f"{first} {family}",
            "email": f"{mailbox}@example.com",
        },
        "warehouse": warehouse,
        "currency": currency,
        "lines": lines,
        "ship_to": {"street": street, "postal_code": code, "city": city, "country": country},
        "total": str(total),
    }


def _converter(rate: Decimal, decimals: int) -> Callable[[str], str]:
    step = Decimal(1).scaleb(-decimals)
    return lambda price: str((Decimal(price) * rate).quantize(step))


def _ordering_key(dice: Dice, convert: Callable[[str], str]) -> Event:
    sku, title, price = dice.one(PRODUCTS)
    quantity = dice.one([1, 1, 1, 2, 2, 3, 4, 6])
    return {"sku": sku, "title": title, "quantity": quantity, "unit_price": convert(price)}


def broken_json(event: Event) -> str:
    """The line was cut off on its way."""
    text = json.dumps(event, ensure_ascii=False)
    return text[: len(text) * 2 // 3]


def missing_field(event: Event) -> str:
    """No customer."""
    return json.dumps({name: value for name, value in event.items() if name != "customer"}, ensure_ascii=False)


def wrong_type(event: Event) -> str:
    """A price that is not a number."""
    event["lines"][0]["unit_price"] = "on request"
    return json.dumps(event, ensure_ascii=False)


def negative_quantity(event: Event) -> str:
    """A return, booked as an order."""
    event["lines"][-1]["quantity"] *= -1
    return json.dumps(event, ensure_ascii=False)


if __name__ == "__main__":
    FILE.write_text("".join(line + "\n" for line in events()), encoding="utf-8")
    print(f"{EVENTS:,} events in {FILE}")
