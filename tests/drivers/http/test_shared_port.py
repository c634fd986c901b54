"""One port for all consumers of an event loop."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer
from streamtools.errors import ConfigurationError, ConnectError
from streamtools.settings import HTTPSettings
from tests.drivers.http.conftest import request, serving, talk


async def first(msg: Any) -> str:
    return "first"


async def second(msg: Any) -> str:
    return "second"


async def test_consumers_of_one_port_each_have_their_path() -> None:
    async with serving(first, "a") as a, serving(second, "b") as b:
        assert a.address == b.address
        assert (await talk(a, request(path="/a", body=b"1"))).body == b"first"
        assert (await talk(a, request(path="/b", body=b"1"))).body == b"second"


async def test_get_and_post_on_one_path_are_two_consumers() -> None:
    async with serving(first, "a", method="GET") as a, serving(second, "a", method="POST"):
        assert (await talk(a, request("GET", "/a"))).body == b"first"
        assert (await talk(a, request("POST", "/a", b"1"))).body == b"second"
        wrong = await talk(a, request("PUT", "/a", b"1"))
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")


async def test_a_path_and_method_taken_twice_is_a_clear_error() -> None:
    async with HTTPConsumer("a", port=0) as one:
        with pytest.raises(ConfigurationError, match=r"takes POST /a on port 0 already.*method="):
            await HTTPConsumer("a", port=0).open()
        assert (await talk(one, request("GET", "/a"))).status == 405


async def test_a_consumer_that_left_is_expected_back_as_long_as_another_is_there() -> None:
    async with HTTPConsumer("stays", port=0) as stays:
        async with HTTPConsumer("leaves", port=0):
            pass
        assert (await talk(stays, request(path="/leaves", body=b"1"))).status == 503
        assert (await talk(stays, request(path="/never", body=b"1"))).status == 404
        async with HTTPConsumer("leaves", port=0) as back:
            asked = asyncio.create_task(talk(stays, request(path="/leaves", body=b"1")))
            await (await back.receive(timeout=5))[0].ack()
            assert (await asked).status == 202


async def test_many_open_and_close_at_once() -> None:
    consumers = [HTTPConsumer(f"q{n}", port=0) for n in range(20)]
    await asyncio.gather(*(consumer.open() for consumer in consumers))
    address = consumers[0].address
    assert {consumer.address for consumer in consumers} == {address}
    await asyncio.gather(*(consumer.close() for consumer in consumers))
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)


async def test_a_port_in_use_is_a_clear_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectError, match=rf"Cannot listen on 127.0.0.1:{port}: .*port=") as caught:
            await HTTPConsumer("a", port=port).open()
    assert caught.value.permanent
    async with HTTPConsumer("a", port=port) as consumer:
        assert consumer.address[1] == port


async def test_a_host_that_is_not_one_is_a_clear_error() -> None:
    with pytest.raises(ConnectError, match="Cannot listen on no.such.host.invalid:0"):
        await HTTPConsumer("a", host="no.such.host.invalid", port=0).open()


async def test_the_address_is_the_consumers_then_the_settings() -> None:
    settings = HTTPSettings(host="localhost:1234")
    assert HTTPConsumer("a").address == ("127.0.0.1", 9000)
    assert HTTPConsumer("a", url=settings).address == ("localhost", 1234)
    assert HTTPConsumer("a", url=settings, host="::1", port=5).endpoint == "http://[::1]:5/a"
    assert HTTPConsumer("a b", url="http://h:1/v%201/").endpoint == "http://h:1/v%201/a%20b"
    assert HTTPConsumer("a", url="http://h:0").address == ("h", 0)


async def test_http_host_says_where_both_sides_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_HOST", "example.test:81")
    assert HTTPConsumer("a").address == ("example.test", 81)


async def test_a_prefix_stands_before_the_queue() -> None:
    async with serving(first, "a", url="http://127.0.0.1:0/v1/") as consumer:
        assert (await talk(consumer, request(path="/v1/a", body=b"1"))).status == 200
        assert (await talk(consumer, request(path="/a", body=b"1"))).status == 404


@pytest.mark.parametrize("queue", ["..", "a/../b", "./x", "http://host/path", "", "a\n"])
def test_a_name_that_cannot_be_a_path_is_a_clear_error(queue: str) -> None:
    with pytest.raises(ConfigurationError):
        HTTPConsumer(queue)


def test_a_method_that_is_none_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="'FETCH' is not one of GET, POST"):
        HTTPConsumer("a", method="FETCH")


@pytest.mark.parametrize(
    "ends_well", [True, pytest.param(False, marks=pytest.mark.filterwarnings("ignore::ResourceWarning"))]
)
def test_a_server_ends_with_its_loop(ends_well: bool) -> None:
    async def leave_it_open() -> None:
        await HTTPConsumer("a", port=0).open()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_it_open())
    if ends_well:
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
    left = weakref.ref(loop)
    del loop
    asyncio.run(leave_it_open())  # what a loop that ended badly has left is let go of in the next one
    gc.collect()
    assert left() is None
