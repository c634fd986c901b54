"""The README and the documentation: all that they show is done, all that they promise is seen, every link leads."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from urllib.parse import unquote

import pytest

import streamtools
from streamtools import Consumer, Features, QueueError
from streamtools.admin import QueueAdmin
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.pages.commands import REFERENCE, check_usage, commands, reference
from tests.pages.markdown import ROOT, Page, pages
from tests.pages.reader import Reader, broker_of
from tests.pages.reference import made, sources

#: A page has up to twenty commands, each a process; on a busy machine they take their time.
pytestmark = pytest.mark.timeout(300)

PAGES = list(pages())
#: For contributors: what it shows is pytest's own to run. The page of commands has a test of its own.
SHOWN_ONLY = ("CONTRIBUTING.md", "docs/reference/cli.md")
RUN = [page for page in PAGES if page.path not in SHOWN_ONLY and page.blocks]
OFFERED = [(page.path, command) for page in PAGES for command in commands(page)]
MADE = [page for page in PAGES if sources(page.text)]


def _id(page: Page) -> str:
    return page.path


@pytest.mark.parametrize("page", RUN, ids=_id)
def test_a_page_does_what_it_says(page: Page, tmp_path: Path) -> None:
    Reader(tmp_path).read(page)


def _on(broker: str) -> list[Page]:
    return [page for page in RUN if broker in map(broker_of, page.blocks)]


@pytest.mark.parametrize("page", _on("rabbitmq"), ids=_id)
def test_a_page_does_what_it_says_on_rabbitmq(page: Page, tmp_path: Path, rabbitmq_vhost: RabbitMQAddress) -> None:
    Reader(tmp_path, rabbitmq_vhost).read(page)


@pytest.mark.real_kafka("groups that are shared out, topics that are deleted")
@pytest.mark.parametrize("page", _on("kafka"), ids=_id)
def test_a_page_does_what_it_says_on_kafka(page: Page, tmp_path: Path, kafka: KafkaAddress) -> None:
    asyncio.run(_have_a_group(kafka))
    asyncio.run(_forget(kafka, page))
    Reader(tmp_path, kafka).read(page)


async def _have_a_group(kafka: KafkaAddress) -> None:
    """On a Kafka that has never had one, the client library says that there is no coordinator yet."""
    async with Consumer("first", group="first", url=kafka.url) as consumer:
        await consumer.receive(timeout=0)


async def _forget(kafka: KafkaAddress, page: Page) -> None:
    """Delete what an earlier run of the page, or another page, has left."""
    async with QueueAdmin(url=kafka.url) as admin:
        for queue in await admin.list():
            if f'"{queue.name.partition(".")[0]}"' in page.text:
                with suppress(QueueError):  # it went with another one
                    await admin.delete(queue.name)


@pytest.mark.parametrize(("path", "command"), OFFERED, ids=[f"{path}: {command}" for path, command in OFFERED])
def test_a_command_that_is_only_shown_exists(path: str, command: str) -> None:
    check_usage(command)


def test_the_page_of_commands_says_what_their_help_says() -> None:
    assert REFERENCE.read_text("utf-8") == reference(), "write it anew: python -m tests.pages.reference"


@pytest.mark.parametrize("page", MADE, ids=_id)
def test_a_page_says_what_the_code_says(page: Page) -> None:
    assert page.text == made(page.text), "write it anew: python -m tests.pages.reference"


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_every_link_leads_somewhere(page: Page) -> None:
    for link in page.links:
        if "://" not in link and not link.startswith("mailto:"):
            assert _leads(page, unquote(link)), f"{page.path} links to {link}, which is not there"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")

    for page in PAGES:
        if page.path.startswith("docs/"):
            path = re.escape(page.path.removeprefix("docs/"))
            assert re.search(rf"- (\w+: )?{path}$", navigation, re.MULTILINE), f"mkdocs.yml: nav lacks {page.path}"


def _leads(page: Page, link: str) -> bool:
    name, _, anchor = link.partition("#")
    file = (ROOT / page.path).parent / name if name else ROOT / page.path
    if not file.exists():
        return False
    target = Page(str(file), file.read_text("utf-8")) if file.suffix == ".md" else None
    return not anchor or (target is not None and anchor in target.anchors)


@pytest.mark.parametrize("name", streamtools.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    value = getattr(streamtools, name)
    reference = [page for page in PAGES if page.path.startswith("docs/reference/")]

    if isinstance(value, type | FunctionType):
        homes = {f"streamtools.{name}", value.__module__}
        assert any(homes & set(sources(page.text)) for page in reference), f"no page is made from streamtools.{name}"
        assert value.__doc__
    else:  # a registry, a protocol's name, a type alias: these have no docstrings
        assert any(f"`{name}`" in page.text for page in reference if page.path != "docs/reference/index.md")


#: The columns of the table of features.
COLUMNS = ("rabbitmq", "kafka", "sqlite", "asyncio", "http")


def _features_table() -> dict[str, list[bool]]:
    page = next(page for page in PAGES if page.path == "docs/protocols/index.md")
    rows = [line.strip("| ").split("|") for line in page.text.splitlines() if line.startswith("| `")]
    return {
        row[0].split("`")[1]: [cell.strip() == "yes" for cell in row[1:]]
        for row in rows
        if len(row) == 1 + len(COLUMNS)
    }


def test_the_table_of_features_is_what_the_drivers_declare() -> None:
    table = _features_table()
    features = {name: streamtools.CONSUMER_LOOPS[name].features for name in COLUMNS}

    for field in dataclasses.fields(Features):
        declared = [getattr(features[name], field.name) for name in COLUMNS]
        # A feature that all or none of them have tells a reader little; it may stand there.
        assert table.pop(field.name, declared if len(set(declared)) == 1 else None) == declared, field.name
    assert not table, "these are no features"
