"""Registries: names to classes, loaded when first asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest

from streamtools import ADMINS, CONSUMER_LOOPS, PRODUCERS, Consumer, ConsumerFactory, HandleMsgs, Producer, QueueAdmin
from streamtools.errors import ConfigurationError, UnknownProtocol, suggest
from streamtools.protocols import ALIASES, EXTRAS
from streamtools.registry import Registry
from streamtools.settings import AsyncIOSettings
from streamtools.text.installation import install_line

BUILTIN = ("asyncio", "http", "kafka", "rabbitmq", "sqlite")


@pytest.mark.parametrize("registry", [PRODUCERS, CONSUMER_LOOPS, ADMINS], ids=["producers", "consumers", "admins"])
def test_every_built_in_name_resolves_to_a_class_of_that_protocol(registry: Registry[Any]) -> None:
    assert set(registry) >= set(BUILTIN) - ({"http"} if registry is ADMINS else set())
    assert len(registry) == len(list(registry))
    for name in registry:
        assert registry[name].protocol == name
        assert registry[name] is registry[name]


@pytest.mark.parametrize("alias", [a for a in ALIASES if ALIASES[a] in BUILTIN])
def test_old_names_are_aliases(alias: str) -> None:
    for registry in (PRODUCERS, CONSUMER_LOOPS):
        assert alias in registry
        assert registry[alias] is registry[ALIASES[alias]] is registry.get(alias)
        assert alias not in list(registry)


@pytest.mark.parametrize("name", ["SQSHandler", "sqs", "redis", "nats"])
def test_a_protocol_that_is_not_built_yet_says_so_and_names_no_package(name: str) -> None:
    assert name not in PRODUCERS
    assert PRODUCERS.get(name) is None
    with pytest.raises(UnknownProtocol, match="not in this version") as caught:
        PRODUCERS[name]
    assert name in str(caught.value) and "pip" not in str(caught.value) and "rabbitmq" in str(caught.value)


def test_an_unknown_name_answers_with_the_near_ones_and_the_whole_list() -> None:
    with pytest.raises(UnknownProtocol, match="Did you mean 'rabbitmq'") as caught:
        CONSUMER_LOOPS["rabitmq"]
    assert all(name in str(caught.value) for name in (*BUILTIN, "RMQIOHandler"))
    assert isinstance(caught.value, LookupError)
    for make in (lambda: ConsumerFactory("rabitmq"), lambda: HandleMsgs("orders", "rabitmq")):
        with pytest.raises(UnknownProtocol, match="Did you mean 'rabbitmq'"):
            make()
    with pytest.raises(UnknownProtocol, match="No producer is named 'rabbit'") as caught:
        PRODUCERS["rabbit"]
    assert "SQSHandler" not in str(caught.value)  # it would answer no better


def test_http_has_no_queues_to_look_at_and_says_so() -> None:
    for look in (lambda: QueueAdmin(url="http://h"), lambda: ADMINS["http"], lambda: ADMINS["HTTPHandler"]):
        with pytest.raises(UnknownProtocol, match="no queues to look at.*sqlite://"):
            look()


@pytest.mark.parametrize(
    ("protocol", "package"), [("rabbitmq", "aiormq"), ("kafka", "aiokafka"), ("http", "aiohttp")]
)
def test_a_missing_extra_answers_with_the_line_to_type(protocol: str, package: str) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None
from streamtools import CONSUMER_LOOPS, PRODUCERS, UnknownProtocol
for registry in (PRODUCERS, CONSUMER_LOOPS):
    assert {protocol!r} in registry
    try:
        registry[{protocol!r}]
    except UnknownProtocol as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    line = install_line(EXTRAS[protocol])
    assert done.stdout.count(line) == 2 and package in done.stdout


def test_a_subclass_with_a_protocol_registers_itself_and_a_plain_one_does_not() -> None:
    class Mine(Producer, protocol="mine-1"):
        settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings

    class Special(Mine):
        pass

    assert PRODUCERS["mine-1"] is Mine and Special.protocol == "mine-1"
    del PRODUCERS["mine-1"]
    assert "mine-1" not in PRODUCERS


def test_another_class_under_a_taken_name_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="'sqlite' is taken"):

        class Other(Producer, protocol="sqlite"):
            pass

    with pytest.raises(ConfigurationError, match="is an alias of 'http'"):

        class Alias(Consumer, protocol="HTTPHandler"):
            pass

    assert PRODUCERS["sqlite"].__name__ == "SQLiteProducer"


def test_a_reloaded_module_registers_its_classes_anew() -> None:
    import streamtools.drivers.asyncio.producer as module

    before = PRODUCERS["asyncio"]
    registered: list[tuple[Any, Any]] = [(r, r["asyncio"]) for r in (PRODUCERS, CONSUMER_LOOPS, ADMINS)]
    try:
        importlib.reload(module)
        assert PRODUCERS["asyncio"].__qualname__ == before.__qualname__
    finally:
        for registry, kind in registered:
            registry["asyncio"] = kind


def test_a_module_that_registers_nothing_is_an_error() -> None:
    registry: Registry[Any] = Registry("producer", {"odd": "json:Nothing"})
    with pytest.raises(ConfigurationError, match=r'class Nothing\(\.\.\., protocol="odd"\)'):
        registry["odd"]


def test_third_parties_announce_themselves_by_entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "carrier_pigeon.py").write_text(
        "from streamtools import Producer\nclass Pigeon(Producer, protocol='pigeon'): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("pigeon", "carrier_pigeon", "streamtools.protocols")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points)
    monkeypatch.setattr(PRODUCERS, "_announced", False)
    assert "pigeon" in PRODUCERS
    assert "carrier_pigeon" not in sys.modules
    assert PRODUCERS["pigeon"].__name__ == "Pigeon"
    del PRODUCERS["pigeon"]


def test_a_protocol_name_is_also_its_urls_scheme_and_amqp_is_rabbitmqs() -> None:
    assert [PRODUCERS.protocol(u) for u in ("amqp://", "AMQPS://x", "https://x", "sqlite://")] == [
        "rabbitmq", "rabbitmq", "http", "sqlite",
    ]  # fmt: skip


def test_where_nothing_is_known_the_error_says_so() -> None:
    assert suggest("consumer", []) == "There is none."
    assert suggest("consumer", ["consumers"]) == "Did you mean 'consumers'? Known: consumers."
