"""A password is planted, and all that a run shows is searched for it: at debug, on each protocol and failure."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from streamtools import (
    ADMINS,
    Consumer,
    ConsumerFactory,
    ConsumerRunner,
    Producer,
    QueueAdmin,
    Retry,
)
from streamtools.admin import QueueAdmin as _Admin
from streamtools.cli.app import app
from streamtools.drivers.http import HTTPConsumer, HTTPProducer
from streamtools.settings import HTTPSettings
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.brokers.processes import free_ports
from tests.canary import CANARY, Ear, listening, shown, told
from tests.faults.waiting import wait_until

ROOT = Path(__file__).parents[1]
USER = "finch"
#: A token is of characters that a header takes.
CANARY_TOKEN = "kanarientoken4711abcdef"


def at(scheme: str, address: str, password: str = CANARY, user: str = USER) -> str:
    """The URL with a user and the password."""
    return f"{scheme}://{user}:{quote(password, safe='')}@{address}"


@pytest.fixture
def ear() -> Iterator[Ear]:
    with listening() as ear:
        yield ear


@asynccontextmanager
async def closing_port(*, after: bytes = b"") -> AsyncIterator[int]:
    """A port that accepts and closes, at once or after it has said something."""

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if after:
            await reader.read(1)
            writer.write(after)
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def use(url: str, patience: float) -> tuple[list[BaseException], str]:
    """Do with the address what can be done; what was raised, and how everything shows itself.

    Parameters:
        patience: seconds after which a broker that does not answer is an error.
    """
    errors: list[BaseException] = []
    made: list[Any] = []

    async def attempt(work: Any) -> None:
        try:
            await asyncio.wait_for(work, patience + 10)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    producer = Producer("canaries", url=url, send_timeout=patience)
    consumer = Consumer("canaries", url=url, connect_timeout=patience)
    consumers = ConsumerFactory(url=url, retry=Retry(retries=1, delay=0))
    failed = asyncio.Event()

    @consumers.route("canaries", connect_timeout=patience)
    async def handle(msg: str) -> None:
        failed.set()
        raise ValueError("this one fails")

    runner = ConsumerRunner(consumers)
    made += [producer, consumer, consumers, handle, runner, producer.settings]
    await attempt(producer.send("x"))
    await attempt(consumer.receive(timeout=0.1))
    await attempt(consumer.close())
    await attempt(_run(runner, failed, patience))
    await attempt(producer.close())
    if producer.settings.protocol in ADMINS:
        admin: _Admin = QueueAdmin(url=url)
        made.append(admin)
        await attempt(admin.open())
        await attempt(admin.list())
        await attempt(admin.close())
    return errors, f"{made!r} {[str(one) for one in made]} {runner.health() if hasattr(runner, 'health') else ''}"


async def _run(runner: ConsumerRunner, until: asyncio.Event, patience: float) -> None:
    async with asyncio.timeout(patience + 9), runner:
        await until.wait()


async def check(ear: Ear, url: str, *, fails: bool | None, secret: str = CANARY, user: str = USER) -> None:
    """Use the address; nothing of the secret is to be seen anywhere."""
    asyncio.get_running_loop().set_debug(True)
    errors, seen = await use(url, 30 if fails is False else 1)
    assert fails is None or bool(errors) is fails, told(errors)
    for text in (told(errors), seen, ear.text):
        assert shown(text, secret, user)[:4] == []


# --- the search itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        CANARY,
        quote(CANARY, safe=""),
        repr(CANARY.encode()),
        repr({"sasl": b"\0finch\0" + CANARY.encode()}),
        "amqp://finch:Kanari",
    ],
)
def test_the_search_finds_it(text: str) -> None:
    assert shown(f"Sending <StartOk {text}>", user=USER)


# --- RabbitMQ -------------------------------------------------------------------------------------


@pytest.fixture
def rabbit_user(rabbitmq_vhost: RabbitMQAddress) -> Iterator[str]:
    """A user with the planted password, who may do all; `host:port/vhost` is where."""
    vhost = rabbitmq_vhost.url.rpartition("/")[2]
    name = f"{USER}-{secrets.token_hex(3)}"
    rabbitmq_vhost.manage("PUT", f"users/{name}", {"password": CANARY, "tags": "management"})
    rabbitmq_vhost.manage("PUT", f"permissions/{vhost}/{name}", {"configure": ".*", "write": ".*", "read": ".*"})
    yield name
    rabbitmq_vhost.manage("DELETE", f"users/{name}")


def _at_rabbit(address: RabbitMQAddress, user: str, password: str = CANARY) -> str:
    host = address.url.rpartition("@")[2]
    api = quote(str(address.management_url).replace("guest:guest", f"{user}:{quote(password, safe='')}"), safe="")
    return at("amqp", f"{host}?management_url={api}", password, user)


async def test_rabbitmq_that_lets_in(ear: Ear, rabbitmq_vhost: RabbitMQAddress, rabbit_user: str) -> None:
    await check(ear, _at_rabbit(rabbitmq_vhost, rabbit_user), fails=False, user=rabbit_user)
    assert "aiormq" in ear.text


async def test_rabbitmq_over_tls(ear: Ear, rabbitmq_vhost: RabbitMQAddress, rabbit_user: str) -> None:
    files = f"cafile={rabbitmq_vhost.ca}&certfile={rabbitmq_vhost.cert}&keyfile={rabbitmq_vhost.key}"
    url = at("amqps", f"{str(rabbitmq_vhost.tls_url).rpartition('@')[2]}?{files}", user=rabbit_user)
    await check(ear, url, fails=True, user=rabbit_user)  # there is no management API at its default port


async def test_rabbitmq_that_refuses_the_password(ear: Ear, rabbitmq_vhost: RabbitMQAddress) -> None:
    await check(ear, _at_rabbit(rabbitmq_vhost, "guest"), fails=True, user="guest")


async def test_rabbitmq_without_that_virtual_host(
    ear: Ear, rabbitmq_vhost: RabbitMQAddress, rabbit_user: str
) -> None:
    await check(
        ear, _at_rabbit(rabbitmq_vhost, rabbit_user).replace("/test-", "/none-"), fails=True, user=rabbit_user
    )


# --- Kafka ----------------------------------------------------------------------------------------


@pytest.mark.real_kafka("authentication")
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
async def test_kafka_that_lets_in(ear: Ear, kafka: KafkaAddress, mechanism: str) -> None:
    assert kafka.sasl_url is not None and kafka.username is not None and kafka.password is not None
    host = kafka.sasl_url.removeprefix("kafka://")
    url = at("kafka", f"{host}?sasl={mechanism}", kafka.password, kafka.username)
    # Some of it may fail where there are very many topics; what it shows is the same.
    await check(ear, url, fails=None, secret=kafka.password, user=kafka.username)
    assert "SaslAuthenticateRequest" in ear.text
    assert ",p=" not in ear.text and ",s=" not in ear.text  # SCRAM's proof and salt: enough to try passwords with


@pytest.mark.real_kafka("authentication")
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_kafka_that_refuses_the_password(ear: Ear, kafka: KafkaAddress, mechanism: str) -> None:
    assert kafka.sasl_url is not None and kafka.username is not None
    url = at("kafka", f"{kafka.sasl_url.removeprefix('kafka://')}?sasl={mechanism}", user=kafka.username)
    await check(ear, url, fails=True, user=kafka.username)


# --- what answers otherwise, or not at all --------------------------------------------------------

SHORT = "connect_timeout=0.5"


@pytest.mark.parametrize("scheme", ["amqp", "amqps", "kafka", "kafkas"])
@pytest.mark.parametrize("kind", ["nothing", "closes", "http", "unknown"])
async def test_an_address_that_does_not_work(ear: Ear, scheme: str, kind: str) -> None:
    said = b"HTTP/1.1 400 Bad Request\r\n\r\n" if kind == "http" else b""
    async with closing_port(after=said) as port:
        host = {
            "nothing": f"127.0.0.1:{free_ports(1)[0]}",
            "unknown": "no-such-host.invalid:9",
        }.get(kind, f"127.0.0.1:{port}")
        await check(ear, at(scheme, f"{host}/?{SHORT}"), fails=True)


@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized", "500 Oops", "302 Found", "999 \x1b[31m"])
async def test_http_with_a_token(ear: Ear, status: str) -> None:
    asyncio.get_running_loop().set_debug(True)
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nLocation: /x\r\nConnection: close\r\n\r\n".encode()
    errors: list[BaseException] = []
    async with closing_port(after=answer) as port:
        async with HTTPProducer("q", url=f"http://127.0.0.1:{port}", send_timeout=1) as producer:
            try:
                await producer.send("x", headers={"Authorization": f"Bearer {CANARY.encode().hex()}"})
            except Exception as error:  # noqa: BLE001
                errors.append(error)
    assert bool(errors) is (status != "200 OK")
    for text in (told(errors), ear.text):
        assert not shown(text)


@pytest.mark.parametrize("shown_to_it", [CANARY_TOKEN, "another-" + CANARY_TOKEN[::-1]], ids=["right", "wrong"])
async def test_http_with_tokens_of_its_own(ear: Ear, shown_to_it: str) -> None:
    asyncio.get_running_loop().set_debug(True)
    errors: list[BaseException] = []
    consumer = HTTPConsumer("canaries", url=HTTPSettings(tokens=[CANARY_TOKEN]), port=0)  # type: ignore[arg-type]

    @consumer()
    async def handle(msg: str) -> None:
        raise ValueError("this one fails")

    running = asyncio.create_task(handle())
    await wait_until(lambda: consumer.address[1] != 0)
    settings = HTTPSettings(port=consumer.address[1], tokens=[shown_to_it])  # type: ignore[arg-type]
    async with HTTPProducer("canaries", url=settings, send_timeout=1) as producer:
        try:
            await producer.send("x")
        except Exception as error:  # noqa: BLE001
            errors.append(error)
        made = [producer, consumer, settings, consumer.settings, str(settings), settings.safe_url]
    consumer.stop()
    await running
    assert errors
    for text in (told(errors), ear.text, repr(made), str(settings.model_dump())):
        assert not shown(text, CANARY_TOKEN) and not shown(text, shown_to_it)


# --- the command line -----------------------------------------------------------------------------

SERVICE = """
from streamtools import ConsumerFactory, ConsumerRunner, Retry

consumers = ConsumerFactory(retry=Retry(retries=0), connect_timeout=2)

@consumers.route("canaries")
async def handle(msg: str) -> None:
    print("handled", flush=True)
    raise ValueError("this one fails")

runner = ConsumerRunner(consumers)
"""


class Command:
    """`streamtools ...` as a process, all that it prints in one file."""

    def __init__(self, directory: Path, *arguments: str, **variables: str) -> None:
        self.log = directory / f"{secrets.token_hex(4)}.txt"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMTOOLS")}
        environment = kept | {"PYTHONPATH": str(ROOT), "PYTHONASYNCIODEBUG": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streamtools", *arguments],
                cwd=directory,
                env=environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="backslashreplace")

    def family(self) -> list[str]:
        """The argument lists of the process and of those that it started, as `ps` shows them."""
        found = [self.process.pid]
        for pid in found:
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
            except OSError:
                continue  # it has ended
        return [_arguments(pid) for pid in found]

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def _arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="backslashreplace")
    except OSError:
        return ""


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    (tmp_path / "service.py").write_text(SERVICE)
    started: list[Command] = []

    def start(*arguments: str, **variables: str) -> Command:
        started.append(Command(tmp_path, *arguments, **variables))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.end()


@pytest.mark.parametrize("extra", [["--workers", "2"], ["--reload"], []], ids=str)
async def test_a_service_at_debug_shows_no_password_nor_do_its_processes(
    command: Callable[..., Command],
    rabbitmq_vhost: RabbitMQAddress,
    rabbit_user: str,
    extra: list[str],
    tmp_path: Path,
) -> None:
    url = _at_rabbit(rabbitmq_vhost, rabbit_user)
    (tmp_path / "url").write_text(f"{url}\n")
    arguments = ["service:runner", "--log-level", "debug", *extra, "--url", f"@{tmp_path}/url"]
    service = await asyncio.to_thread(command, "run", *arguments)
    async with Producer("canaries", url=url) as producer:
        await producer.send("x")
    await wait_until(lambda: "this one fails" in service.output)
    family = service.family()
    assert len(family) >= (1 + len(extra) // 2 * 2 if extra else 1)
    await asyncio.to_thread(service.end)
    assert not shown("\n".join(family) + service.output, user=rabbit_user)


@pytest.mark.real_kafka("authentication")
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
async def test_a_service_on_kafka_at_debug_shows_no_password(
    command: Callable[..., Command], kafka: KafkaAddress, mechanism: str
) -> None:
    assert kafka.sasl_url is not None and kafka.username is not None and kafka.password is not None
    host = kafka.sasl_url.removeprefix("kafka://")
    url = at("kafka", f"{host}?sasl={mechanism}", kafka.password, kafka.username)
    service = await asyncio.to_thread(command, "run", "service:runner", "--log-level", "debug", STREAMTOOLS_URL=url)
    await wait_until(lambda: "SaslAuthenticateRequest" in service.output)
    async with Producer("canaries", url=url) as producer:
        await producer.send("x")
    await wait_until(lambda: "this one fails" in service.output)
    await asyncio.to_thread(service.end)
    assert not shown(service.output, kafka.password, kafka.username)
    assert ",p=" not in service.output


COMMANDS = [
    "run service:runner --log-level debug",
    "doctor --json",
    "queues list",
    "send canaries x",
    "errors redrive --yes",
]


@pytest.mark.parametrize("scheme", ["amqp", "kafka", "rabbit"])
async def test_a_command_that_fails_shows_no_password(command: Callable[..., Command], scheme: str) -> None:
    url = at(scheme, f"127.0.0.1:{free_ports(1)[0]}/{'?' + SHORT if scheme in ('amqp', 'kafka') else ''}")

    def fail(line: str) -> Command:
        failing = command(*line.split(), STREAMTOOLS_URL=url)
        for _ in range(4):  # what sends goes on trying for longer; a busy machine takes its time for the imports
            with suppress(subprocess.TimeoutExpired):
                failing.process.wait(15)
            if failing.output or failing.process.poll() is not None:
                break
        if failing.process.poll() is None:
            failing.end()
        return failing

    for failing in await asyncio.gather(*(asyncio.to_thread(fail, line) for line in COMMANDS)):
        assert failing.output
        assert shown(failing.output, user=USER)[:4] == []


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "queues {}",
        "queues list {}",
        "queues create --partitions {}",
        "receive q --max {}",
        "receive q {}",
        "receive {}",
        "send q --file {}",
        "send q --header {} x",
        "run m:a --workers {}",
        "run {}",
        "schema {}",
        "errors list {}",
        "errors redrive --limit {}",
        "errors redrive --to {}",
        "errors show --filter {}",
        "doctor {}",
        "--version {}",
        "--{}",
    ],
)
def test_a_url_in_the_wrong_place_is_repeated_without_its_password(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMTOOLS_URL", f"sqlite:///{tmp_path}/x.db")
    result = CliRunner().invoke(app, line.format(f"{at('amqp', '127.0.0.1:1/')}\x1b[31m").split(" "))
    assert result.exit_code in (1, 2) or "version" in line
    assert not shown(result.output + result.stderr, user=USER)
    assert "\x1b" not in result.output + result.stderr


def test_a_password_in_an_argument_is_warned_of_once_and_still_works(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--url", at("amqp", "127.0.0.1:1/?connect_timeout=0.1")])
    assert result.stderr.count("every user of this machine can see a password in --url") == 1
    assert "--url @FILE" in result.stderr and "STREAMTOOLS_URL" in result.stderr
    assert not shown(result.output + result.stderr, user=USER)


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("sqlite:///x.db", False),
        ("amqp://shop@h/", False),
        ("amqp://h/?heartbeat=5", False),
        ("amqp://shop:pw@h/", True),
        ("amqp://shop:p/w@h/", True),  # not encoded
        ("amqp://h/?password=pw", True),
        ("amqp://h/?management_url=http%3A%2F%2Fu%3Apw%40h", True),
        ("kafka://shop:pw@h:1", True),
        ("http://h:1/?tokens=0123456789abcdef", True),
    ],
)
def test_what_is_warned_of(url: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", "nothing:at_all", "--url", url])
    assert result.exit_code == 2
    assert ("every user of this machine can see" in result.stderr) is warned


def test_the_url_can_stand_in_a_file_or_on_standard_input(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queues.db"
    (tmp_path / "url").write_text(f"\n{url}\n")
    runner = CliRunner()
    assert runner.invoke(app, ["send", "orders", "one", "--url", f"@{tmp_path}/url"]).exit_code == 0
    assert runner.invoke(app, ["send", "orders", "two", "--url", "@-"], input=f"{url}\n").exit_code == 0
    assert '"ready": 2' in runner.invoke(app, ["queues", "stats", "orders", "--json", "--url", url]).stdout


@pytest.mark.parametrize(
    ("content", "text"), [(None, "No such file"), (b"", "contains no URL"), (b"\xff\xfe\x00", "is not a text")]
)
def test_a_file_without_a_url_is_wrong_usage(tmp_path: Path, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / "url").write_bytes(content)
    result = CliRunner().invoke(app, ["queues", "list", "--url", f"@{tmp_path}/url"])
    assert result.exit_code == 2 and text in result.stderr


@pytest.mark.parametrize(
    "arguments", [["run", at("amqp", "h/x")], ["run", "--url", "sqlite://", f"{at('kafka', 'h')}:a"]]
)
def test_a_url_in_the_wrong_place_is_not_repeated(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert not shown(result.output + result.stderr, user=USER)
