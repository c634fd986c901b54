"""Who may ask at a port: tokens, client certificates, host names, web pages, content types."""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer, HTTPProducer
from streamtools.errors import ConfigurationError, ConnectError, OptionError, ResponseError, SendError
from streamtools.message import Message
from streamtools.settings import HTTPSettings
from streamtools.validation.tokens import Tokens, read_tokens
from tests.brokers.certificates import Certificates, make_certificates
from tests.drivers.http.conftest import producer_to, request, serving, talk
from tests.drivers.http.peer import peer
from tests.drivers.http.test_producer import fine

OLD, NEW = "old-0123456789abcdef", "new-0123456789abcdef"
GUARDED = HTTPSettings(tokens=[OLD, NEW])


async def handler(msg: Message) -> list[str]:
    return [name.lower() for name in msg.headers]


# --- tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shown",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {OLD}",
        f"Bearer {OLD}x",
        f"Bearer {OLD[:-1]}",
        OLD,
        f"Bearer {OLD},{NEW}",
    ]
    + [f"Bearer {OLD.upper()}", "Bearer \xff", f"Bearer {OLD} {NEW}"],
)
@pytest.mark.parametrize("path", ["/orders", "/nowhere"])
@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
async def test_who_shows_no_token_learns_nothing(shown: str | None, path: str, method: str) -> None:
    async with serving(handler, url=GUARDED) as consumer:
        headers = {} if shown is None else {"Authorization": shown}
        reply = await talk(consumer, request(method, path, body=b"{}", **headers))
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert OLD not in repr(reply)


@pytest.mark.parametrize("shown", [f"Bearer {OLD}", f"Bearer {NEW}", f"bearer {NEW}", f"Bearer  {NEW}"])
async def test_each_of_several_tokens_opens_and_no_handler_sees_it(shown: str) -> None:
    async with serving(handler, url=GUARDED) as consumer:
        reply = await talk(consumer, request(body=b"{}", Authorization=shown, X_A="1"))
        packed = {"streamtools_headers": f"Authorization=Bearer%20{OLD}"}
        assert (await talk(consumer, request(body=b"{}", **packed))).status == 401
    assert (reply.status, reply.json()) == (200, ["x-a"])


async def test_two_authorizations_are_none() -> None:
    line = f"Authorization: Bearer {OLD}\r\n".encode()
    data = request(body=b"{}").replace(b"Host: test\r\n", b"Host: test\r\n" + line + line)
    async with serving(handler, url=GUARDED) as consumer:
        assert (await talk(consumer, data)).status in (400, 401)


async def test_a_producer_shows_its_first_token_at_its_own_address_and_at_no_other() -> None:
    async with serving(handler, url=GUARDED) as consumer, peer(fine) as elsewhere:
        settings = HTTPSettings(port=consumer.address[1], tokens=[NEW])
        async with HTTPProducer("orders", url=settings) as producer:
            assert (await producer.send({})).status == 200
            await producer.send({}, endpoint=f"http://127.0.0.1:{elsewhere.port}/a")
        async with HTTPProducer(f"http://127.0.0.1:{elsewhere.port}/b", url=settings) as producer:
            await producer.send({})
        async with producer_to(consumer) as stranger:
            with pytest.raises(ResponseError, match="401"):
                await stranger.send({})
    assert [asked.headers.get("Authorization") for asked in elsewhere.asked] == [None, None]


async def test_no_token_stands_in_a_text_or_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(handler, url=GUARDED) as consumer:
        settings = HTTPSettings(port=consumer.address[1], tokens=[NEW])
        async with HTTPProducer("orders", url=settings) as producer:
            await producer.send({})
            request_of = producer._request(Message(body=b"", queue="orders", id="1"), producer._read_send_options({}))
            shown = [consumer, producer, settings, GUARDED, settings.safe_url, request_of, GUARDED.model_dump()]
            shown += [consumer._server and consumer._server.access]
        await talk(consumer, request(body=b"{}", Authorization=f"Bearer {OLD}x"))
    for text in (caplog.text, *map(repr, shown), *map(str, shown)):
        assert OLD not in text and NEW not in text


@pytest.mark.parametrize(
    "tokens", ["short", "", [""], ["with space 0123456789"], ["0123456789abcde"], ["ü" * 20], 5, [5]]
)
def test_a_token_that_can_be_guessed_or_not_be_sent_is_refused_without_being_shown(tokens: Any) -> None:
    with pytest.raises(ConfigurationError, match="token") as caught:
        HTTPSettings(tokens=tokens)
    assert not tokens or not isinstance(tokens, str) or tokens not in str(caught.value)


@pytest.mark.parametrize("name", ["HTTP_TOKENS", "HTTP_CLIENT_CA", "HTTP_HOSTS"])
@pytest.mark.parametrize("value", ["", "  "])
def test_a_guard_that_was_not_filled_in_does_not_let_everyone_in(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="it is set, but empty"):
        HTTPSettings()
    monkeypatch.delenv(name)
    with pytest.raises(ConfigurationError, match="it is set, but empty"):
        HTTPSettings.from_url(f"http://127.0.0.1?{name.removeprefix('HTTP_').lower()}=")
    assert HTTPSettings(tokens=(), hosts=(), client_ca=None) == HTTPSettings()


def test_tokens_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_TOKENS", f"{OLD}, {NEW}")
    monkeypatch.setenv("HTTP_HOSTS", "shop.example,localhost")
    settings = HTTPSettings()
    assert [token.get_secret_value() for token in settings.tokens] == [OLD, NEW]
    assert settings.hosts == ("shop.example", "localhost")


def test_all_tokens_are_compared_whichever_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return secrets.compare_digest(one, other)

    monkeypatch.setattr("streamtools.validation.tokens.compare_digest", compare)
    tokens = Tokens(read_tokens([OLD, NEW]))
    assert [tokens.accept(f"Bearer {shown}") for shown in (OLD, NEW, "x")] == [True, True, False]
    assert (len(compared), len({len(digest) for digest in compared})) == (6, 1)


async def test_consumers_of_one_port_let_the_same_ask() -> None:
    async with serving(handler, "a", url=GUARDED):
        with pytest.raises(ConfigurationError, match="the same tokens, hosts and origins"):
            await HTTPConsumer("b", port=0).open()
        async with HTTPConsumer("b", port=0, url=HTTPSettings(tokens=[NEW, OLD])):
            pass


# --- host names and web pages -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("shop.example", 200),
        ("SHOP.example:9000", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:9000", 200),
        ("evil.example", 421),
        ("[::1]", 200),
        ("[::2]", 200),
        ("[::2]:80", 200),
        ("port.example:9000", 200),
        ("port.example:80", 421),
        ("shop.example.", 421),
        ("[shop.example]:80", 421),
        ("shop.example:\u0663", 421),
    ]
    + [("shop.example.evil", 421), ("", 421), ("shop.example:80@evil", 421), ("evil, shop.example", 421)],
)
async def test_a_port_answers_to_its_own_names_alone(host: str, status: int) -> None:
    settings = HTTPSettings(hosts=["Shop.example", "127.0.0.1", "::1", "[::2]", "port.example:9000"])
    async with serving(handler, url=settings) as consumer:
        assert (await talk(consumer, request(body=b"{}", Host=host))).status == status
        whole = request(path="http://evil.example/orders", body=b"{}", Host="shop.example")
        assert (await talk(consumer, whole)).status == 421
        assert (await talk(consumer, b"POST /orders HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")).status == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "HTTP://127.0.0.1", "file://", ""])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_no_web_page_asks_by_default(origin: str, content_type: str) -> None:
    async with serving(handler) as consumer:
        for site in ({}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}):
            data = request(body=b"{}", Origin=origin, Content_Type=content_type, **site)
            assert (await talk(consumer, data)).status == 403
        assert (await talk(consumer, request(body=b"{}", Sec_Fetch_Site="cross-site"))).status == 403
        assert (await talk(consumer, request("OPTIONS", Origin=origin))).status == 403
        assert (await talk(consumer, request(body=b"{}"))).status == 200


@pytest.mark.parametrize("site", ["none", "same-origin"])
async def test_what_the_user_of_a_browser_asks_for_itself_is_answered(site: str) -> None:
    async with serving(handler) as consumer:
        assert (await talk(consumer, request(body=b"{}", Sec_Fetch_Site=site))).status == 200
        mine = request(body=b"{}", Sec_Fetch_Site="same-origin", Origin="https://behind-a-proxy.example")
        assert (await talk(consumer, mine)).status == 200


async def test_pages_that_are_allowed_may_ask() -> None:
    async with serving(handler, url=HTTPSettings(origins=["https://Shop.example"])) as consumer:
        for origin, status in (
            ("https://shop.example", 200),
            ("http://shop.example", 403),
            ("https://shop.example.evil", 403),
        ):
            cross = request(body=b"{}", Origin=origin, Sec_Fetch_Site="cross-site")
            assert (await talk(consumer, cross)).status == status
    for written in ("https://shop.example/", "HTTPS://shop.example:443", "https://shop.example:443/"):
        assert HTTPSettings(origins=[written]).origins == ("https://shop.example",)
    for wrong in ("shop.example", "https://shop.example/orders", "https://", "https://a@shop.example", "http://[x"):
        with pytest.raises(ConfigurationError, match="origins"):
            HTTPSettings(origins=[wrong])
    async with serving(handler, url=HTTPSettings(origins="*")) as consumer:
        assert (await talk(consumer, request(body=b"{}", Origin="null"))).status == 200


# --- content types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/csv", 200), ("text/plain", 200)]
    + [
        ("application/xml", 415),
        ("", 415),
        (None, 415),
        ("textual/plain", 415),
        ("application/json-patch+json", 415),
    ],
)
async def test_other_content_types_than_those_of_the_option_are_415(content_type: str | None, status: int) -> None:
    async with serving(handler, content_types=["application/json", "text/*"]) as consumer:
        headers = {} if content_type is None else {"Content_Type": content_type}
        reply = await talk(consumer, request(body=b"{}", **headers))
    assert reply.status == status
    assert status == 200 or reply.headers["accept"] == "application/json, text/*"


async def test_a_query_has_no_content_type() -> None:
    async with serving(handler, method="GET", content_types=["application/json"]) as consumer:
        assert (await talk(consumer, request("GET", "/orders?a=1"))).status == 200


@pytest.mark.parametrize("wrong", ["json", "*/*", "", "a/b; c", 5])
def test_an_option_that_names_no_content_type_is_a_clear_error(wrong: Any) -> None:
    with pytest.raises((ConfigurationError, OptionError, TypeError)):
        HTTPConsumer("orders", content_types=[wrong])


# --- client certificates ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl. Type: apt-get install openssl")
    folder: Path = tmp_path_factory.mktemp("authorities")
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Certificates:
    """An authority, a server and a client of it."""
    return make_certificates(folder / "ours")


@pytest.fixture(scope="module")
def strangers(folder: Path) -> Certificates:
    """The same of another authority."""
    return make_certificates(folder / "strangers")


async def test_with_client_ca_only_clients_with_a_certificate_of_it_may_ask(
    ours: Certificates, strangers: Certificates
) -> None:
    def client_of(made: Certificates) -> dict[str, Any]:
        return {"certfile": str(made.client_cert), "keyfile": str(made.client_key)}

    server = {"certfile": str(ours.server_cert), "keyfile": str(ours.server_key)}
    async with serving(handler, url=HTTPSettings(tls=True, client_ca=str(ours.ca), **server)) as consumer:
        address = {"tls": True, "cafile": str(ours.ca), "port": consumer.address[1]}
        async with HTTPProducer("orders", url=HTTPSettings(**address, **client_of(ours))) as producer:
            assert (await producer.send({})).status == 200
        for stranger in ({}, client_of(strangers)):
            async with HTTPProducer("orders", url=HTTPSettings(**address, **stranger), send_timeout=1) as producer:
                with pytest.raises((SendError, ConnectError)):
                    await producer.send({})


async def test_client_ca_without_tls_or_of_no_file_is_a_clear_error(ours: Certificates) -> None:
    server = {"certfile": str(ours.server_cert), "keyfile": str(ours.server_key)}
    for settings in (HTTPSettings(client_ca="ca.pem"), HTTPSettings(tls=True, client_ca="missing.pem", **server)):
        with pytest.raises(ConfigurationError, match="client_ca"):
            await HTTPConsumer("orders", port=0, url=settings).open()
