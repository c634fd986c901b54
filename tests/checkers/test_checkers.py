"""What type checkers and editors know of a service, and that it is true."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import SecretStr

import streamtools
from streamtools import (
    CONSUMER_LOOPS,
    PRODUCERS,
    Bus,
    Consumer,
    ConsumerFactory,
    HTTPSettings,
    Message,
    Producer,
    RabbitMQSettings,
    Verdict,
    built_in,
    options,
    parameters,
)
from streamtools.drivers.kafka.options import ConsumerOptions as KafkaConsumer
from streamtools.protocols import ALIASES, BUILT_IN
from streamtools.settings import ProtocolSettings
from tests.checkers import service

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = {"asyncio": "AsyncIO", "sqlite": "SQLite", "rabbitmq": "RabbitMQ", "kafka": "Kafka", "http": "HTTP"}


# --- what the checkers report ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of a user, with the strictest rules."""
    path = tmp_path_factory.mktemp("project")
    for name in ("service.py", "mistakes.py"):
        shutil.copy(HERE / name, path)
    (path / "registry.py").write_text("\n".join(every_name()))
    (path / "mypy.ini").write_text("[mypy]\nstrict = true\npython_version = 3.11\n")
    (path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "pythonVersion": "3.11"}))
    return path


def every_name() -> Iterator[str]:
    """Lines that look up each built-in name, and give each option of it a value of any type."""
    yield "from typing import Any, assert_type"
    yield "from streamtools import CONSUMER_LOOPS, PRODUCERS"
    yield from (f"from streamtools.drivers.{p} import {name}Consumer, {name}Producer" for p, name in NAMES.items())
    yield "async def check(x: Any) -> None:"
    for name in [*NAMES, *(alias for alias, target in ALIASES.items() if target in NAMES)]:
        protocol = ALIASES.get(name, name)
        made, sent, taken = (
            "".join(f", {option}=x" for option in sorted(model.model_fields))
            for model in (
                PRODUCERS[name].options_class, PRODUCERS[name].send_options_class, CONSUMER_LOOPS[name].options_class
            )
        )  # fmt: skip
        yield f"    assert_type(PRODUCERS[{name!r}]('q'{made}), {NAMES[protocol]}Producer)"
        yield f"    await PRODUCERS[{name!r}]('q').send('x'{sent})"
        yield f"    await PRODUCERS[{name!r}]('q').send_many(['x']{sent})"
        yield f"    assert_type(CONSUMER_LOOPS[{name!r}]('q'{taken}), {NAMES[protocol]}Consumer)"


def reported_by_mypy(project: Path) -> dict[str, set[int]]:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--output=json", "."]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=110)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return by_file((each["file"], each["line"]) for each in found if each["severity"] == "error")


def reported_by_pyright(project: Path) -> dict[str, set[int]]:
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    return by_file((each["file"], each["range"]["start"]["line"] + 1) for each in found)


def by_file(found: Any) -> dict[str, set[int]]:
    lines: dict[str, set[int]] = {"service.py": set(), "registry.py": set(), "mistakes.py": set()}
    for file, line in found:
        lines[Path(file).name].add(line)
    return lines


@pytest.mark.parametrize("report", [reported_by_mypy, reported_by_pyright])
def test_a_service_is_known_in_all_its_parts_and_each_mistake_is_reported(report: Any, project: Path) -> None:
    lines = (HERE / "mistakes.py").read_text().splitlines()
    mistakes = {number for number, line in enumerate(lines, 1) if "  # " in line}
    assert len(mistakes) > 20
    assert report(project) == {"service.py": set(), "registry.py": set(), "mistakes.py": mistakes}


async def test_the_service_runs() -> None:
    await service.check()
    await service.handlers_are_functions()


# --- the types are those of the code ----------------------------------------------------------------


def named(kind: str) -> Iterator[tuple[str, Any, Any]]:
    """Protocol, the driver's class of options, and their types for checkers."""
    for protocol, name in NAMES.items():
        producer, consumer = PRODUCERS[protocol], CONSUMER_LOOPS[protocol]
        models = {"Producer": producer.options_class, "Consumer": consumer.options_class}
        model = models.get(kind, producer.send_options_class)
        yield protocol, model, getattr(options, f"{name}{kind}Options", None)


@pytest.mark.parametrize("kind", ["Producer", "Consumer", "Send"])
def test_options_have_the_names_and_types_that_the_drivers_declare(kind: str) -> None:
    for protocol, model, typed in named(kind):
        declared = {name: plain(info.annotation) for name, info in model.model_fields.items()}
        known = {} if typed is None else get_type_hints(typed)
        assert known.keys() == declared.keys(), protocol
        for name, known_type in known.items():
            assert parts(known_type) >= parts(declared[name]), (protocol, name)
            further = parts(known_type) - parts(declared[name])
            assert further == FURTHER.get((protocol, kind, name), set()), (protocol, name)


#: What the driver's validators take beside the type that they make of it.
FURTHER: Mapping[tuple[str, str, str], set[Any]] = {
    ("kafka", "Consumer", "topics"): {list[str]},
    ("http", "Consumer", "content_types"): {list[str], str},
}


def test_what_validators_take_besides_is_taken() -> None:
    for value in (["a", "b"], ("a", "b")):
        assert KafkaConsumer(topics=value).topics == ("a", "b")  # type: ignore[arg-type]
    for given in ("text/*", ["text/*"], ("text/*",)):
        consumer = CONSUMER_LOOPS["http"]("orders", content_types=given)
        assert consumer.options.content_types == ("text/*",)


def test_settings_take_what_checkers_let_pass() -> None:
    token = "a" * 16
    for password in ("p@ss", SecretStr("p@ss")):
        assert RabbitMQSettings(password=password).password == SecretStr("p@ss")
    for tokens in (token, [token], (token,), SecretStr(token), (SecretStr(token),)):
        assert HTTPSettings(tokens=tokens).tokens == (SecretStr(token),)
    for names in ("shop.example", ["shop.example"], ("shop.example",)):
        assert HTTPSettings(hosts=names).hosts == ("shop.example",)


@pytest.mark.parametrize("kind", ["Producer", "Consumer", "Send"])
def test_where_the_protocol_is_not_known_the_options_of_all_are(kind: str) -> None:
    every: dict[str, Any] = {}
    for _, _, typed in named(kind):
        every |= {} if typed is None else get_type_hints(typed)
    assert get_type_hints(getattr(options, f"Any{kind}Options")) == every


def test_parameters_that_are_passed_on_are_those_of_the_code() -> None:
    known = {name: get_type_hints(getattr(parameters, name), localns=PLACE) for name in PASSED_ON}
    producer, consumer = keywords(Producer.__init__), keywords(Consumer.__init__)
    every = get_type_hints(options.AnyConsumerOptions)
    assert known["ProducerParameters"] == producer
    assert known["ConsumerParameters"] == consumer
    assert known["SendParameters"] == keywords(Producer.send)
    assert known["SendManyParameters"] == keywords(Producer.send_many)
    assert known["FactoryParameters"] == without(consumer | every, inspect.signature(ConsumerFactory).parameters)
    assert known["RouteParameters"] == without(consumer | every, ["url"])
    assert known["BusParameters"] == without(consumer | every, inspect.signature(Bus).parameters)


PASSED_ON = [each + "Parameters" for each in ("Producer", "Consumer", "Send", "SendMany", "Factory", "Route", "Bus")]
#: What modules import for type checkers alone.
PLACE = {"ProtocolSettings": ProtocolSettings, "Message": Message, "Verdict": Verdict}


def test_the_docstrings_say_which_options_are_whose() -> None:
    for documented, kind in ((Producer, "Producer"), (Consumer, "Consumer"), (Producer.send, "Send")):
        text = " ".join(str(documented.__doc__).split())
        for protocol, model, _ in named(kind):
            names = ", ".join(f"`{name}`" for name in sorted(model.model_fields))
            assert not names or f"{NAMES[protocol]}: {names}" in text


def test_each_built_in_name_is_one_that_checkers_know() -> None:
    source = inspect.getsource(built_in)
    for protocol in BUILT_IN:
        names = json.dumps([name for name in (protocol.name, protocol.alias) if name is not None])
        for kind in ("Producer", "Consumer"):
            assert f"Literal{names}) -> type[{NAMES[protocol.name]}{kind}]" in source


def test_what_is_for_checkers_alone_is_not_imported() -> None:
    code = "import streamtools, sys; [getattr(streamtools, n) for n in streamtools.__all__]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "streamtools.built_in" not in done.stdout.split()
    assert streamtools.PRODUCERS is PRODUCERS


def keywords(function: Any) -> dict[str, Any]:
    """The parameters that a function takes by keyword alone, with their types."""
    hints = get_type_hints(function, localns=PLACE)
    found = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in found if p.kind is p.KEYWORD_ONLY}


def without(known: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: kind for name, kind in known.items() if name not in names}


def parts(kind: Any) -> set[Any]:
    """The members of a union; the type itself if it is none."""
    return set(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else {kind}


def plain(kind: Any) -> Any:
    """The type without what is annotated beside it."""
    if get_origin(kind) is Annotated:
        return plain(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(plain(part) for part in get_args(kind))]  # noqa: UP007 - made of a tuple
    if get_origin(kind) is tuple:
        first, dots = get_args(kind)
        return tuple[plain(first), dots]  # type: ignore[misc]
    return kind
