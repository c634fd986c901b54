"""The management API: over TLS where the broker is, with the same authority; and what is said where it is not."""

from __future__ import annotations

import base64
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from streamtools import ADMINS, ConfigurationError, ConnectError
from streamtools.drivers.rabbitmq.looking import management
from streamtools.drivers.rabbitmq.looking.management import Management
from streamtools.settings import RabbitMQSettings
from tests.brokers.address import RabbitMQAddress
from tests.brokers.certificates import Certificates, make_certificates
from tests.brokers.processes import free_ports

USER = "amqps://shop:hunter2@127.0.0.1"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def trust(files: Certificates) -> str:
    return f"cafile={files.ca}&certfile={files.client_cert}&keyfile={files.client_key}"


class Plugin:
    """Stands in for the management plugin, at its own default port or another; takes down who asked."""

    def __init__(self, files: Certificates | None) -> None:
        self.asked: list[str] = []
        self.port = 0
        self.redirect = ""
        self._tls: ssl.SSLContext | None = None
        if files is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(files.ca))
            self._tls.load_cert_chain(files.server_cert, files.server_key)
            self._tls.verify_mode = ssl.CERT_REQUIRED
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)

    async def start(self, port: int) -> None:
        self.port = port
        await self._runner.setup()
        for host in ("127.0.0.1", "127.0.0.2"):  # the certificate names the first
            await web.TCPSite(self._runner, host, port, ssl_context=self._tls).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        login = request.headers.get("Authorization", "").removeprefix("Basic ")
        self.asked.append(base64.b64decode(login).decode())
        if self.redirect:
            raise web.HTTPFound(self.redirect)
        return web.json_response([])


@pytest.fixture
async def secure(files: Certificates) -> AsyncIterator[Plugin]:
    """Over TLS, and only with a client certificate."""
    plugin = Plugin(files)
    await plugin.start(free_ports(1)[0])
    yield plugin
    await plugin.stop()


@pytest.fixture
async def plain() -> AsyncIterator[Plugin]:
    """Without TLS."""
    plugin = Plugin(None)
    await plugin.start(free_ports(1)[0])
    yield plugin
    await plugin.stop()


async def ask(url: str) -> object:
    return await Management(RabbitMQSettings.from_url(url)).get("queues/%2F")


async def test_of_a_broker_over_tls_it_is_asked_over_tls_at_its_port_for_it(
    secure: Plugin, plain: Plugin, trust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert management.PORTS == {"http": 15672, "https": 15671}
    monkeypatch.setattr(management, "PORTS", {"http": plain.port, "https": secure.port})
    assert await ask(f"{USER}?{trust}") == []
    assert (secure.asked, plain.asked) == (["shop:hunter2"], [])
    assert await ask("amqp://shop:hunter2@127.0.0.1") == []
    assert plain.asked == ["shop:hunter2"]


async def test_an_authority_that_is_not_trusted_gets_no_password(secure: Plugin) -> None:
    with pytest.raises(ConnectError, match=r"cannot be verified: .*cafile=") as caught:
        await ask(f"{USER}?management_url=https://127.0.0.1:{secure.port}")
    assert caught.value.permanent and secure.asked == []
    assert "hunter2" not in str(caught.value)


async def test_a_host_that_the_certificate_does_not_name_gets_no_password(secure: Plugin, trust: str) -> None:
    with pytest.raises(ConnectError, match=r"cannot be verified: .*127\.0\.0\.2"):
        await ask(f"{USER}?{trust}&management_url=https://127.0.0.2:{secure.port}")
    assert secure.asked == []


async def test_a_port_without_tls_gets_no_password(plain: Plugin, trust: str) -> None:
    with pytest.raises(ConnectError, match="does not answer"):
        await ask(f"{USER}?{trust}&management_url=https://127.0.0.1:{plain.port}")
    assert plain.asked == []


async def test_a_redirect_is_not_followed(secure: Plugin, plain: Plugin, trust: str) -> None:
    secure.redirect = f"http://127.0.0.1:{plain.port}/api/queues"
    with pytest.raises(ConnectError, match="answered 302"):
        await ask(f"{USER}?{trust}&management_url=https://127.0.0.1:{secure.port}")
    assert plain.asked == []


async def test_a_user_in_the_management_url_is_the_one_who_asks(plain: Plugin) -> None:
    await ask(f"{USER}?management_url=http://w%252Fatch:p%2540%253A@127.0.0.1:{plain.port}/")
    assert plain.asked == ["w/atch:p@:"]


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", 0), ("127.9.9.9", 0), ("localhost", 0), ("[::1]", 0), ("10.1.2.3", 1), ("localhost.evil", 1)],
)
async def test_clear_text_to_another_machine_is_warned_of_once(
    host: str, warned: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(management, "_clear", set())
    for vhost in "ab":
        settings = RabbitMQSettings.from_url(f"{USER}/{vhost}?management_url=http://w:hunter2@{host}:99")
        await Management(settings)._tls()
    lines = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == warned
    assert "hunter2" not in caplog.text
    if warned:
        assert f"{host}:99" in caplog.text and "IN CLEAR TEXT" in caplog.text


@pytest.mark.parametrize(
    "wrong", ["host:15672", "ftp://h", "http://", "http://:1", "http://h:hunter2", "//h", "http://u:1/hunter2@h"]
)
def test_a_management_url_that_is_none_is_refused_without_showing_it(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"management_url: .*https://host:15671") as caught:
        RabbitMQSettings(management_url=wrong)  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_an_empty_management_url_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMQ_MANAGEMENT_URL", "")
    assert RabbitMQSettings.from_environment().management_url is None


async def test_a_rabbitmq_that_wants_a_client_certificate_lists_its_queues(
    strict_rabbitmq: RabbitMQAddress, tmp_path: Path
) -> None:
    address = strict_rabbitmq
    where = f"{address.tls_url}?cafile={address.ca}&management_url={address.management_tls_url}"
    with_certificate = f"{where}&certfile={address.cert}&keyfile={address.key}"
    async with ADMINS["rabbitmq"](url=with_certificate) as admin:
        await admin.create("orders")
        assert {"orders"} <= {info.name for info in await admin.list()}
    with pytest.raises(ConnectError, match="does not answer"):
        await ask(where)


async def test_a_management_api_that_does_not_answer_is_one_plain_sentence(url: str) -> None:
    port = free_ports(1)[0]
    where = f"{url}?management_url=http://user:hunter2@127.0.0.1:{port}"
    async with ADMINS["rabbitmq"](url=where) as admin:
        with pytest.raises(ConnectError, match="rabbitmq-plugins enable") as caught:
            await admin.list()
    text = str(caught.value)
    assert f"127.0.0.1:{port} does not answer: Connect call failed" in text
    assert "ConnectionKey" not in text and "hunter2" not in text
