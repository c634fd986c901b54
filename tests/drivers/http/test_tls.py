"""TLS on both sides, with a certificate made for the test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer, HTTPProducer
from streamtools.errors import ConfigurationError, ConnectError
from streamtools.settings import HTTPSettings
from tests.drivers.http.conftest import serving

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs openssl. Type: apt-get install openssl"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    folder: Path = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603
    return {"certfile": str(folder / "cert.pem"), "keyfile": str(folder / "key.pem")}


async def echo(msg: Any) -> Any:
    return msg


async def test_a_call_over_tls(files: dict[str, Any]) -> None:
    async with serving(echo, url=HTTPSettings(tls=True, **files)) as consumer:
        assert consumer.endpoint.startswith("https://127.0.0.1:")
        trusting = HTTPSettings(tls=True, port=consumer.address[1], cafile=files["certfile"])
        async with HTTPProducer("orders", url=trusting) as producer:
            assert (await producer.send({"a": 1})).json() == {"a": 1}
            assert (await producer.send({"a": 2}, endpoint=consumer.endpoint)).json() == {"a": 2}
        url = f"https://127.0.0.1:{consumer.address[1]}?verify=false"
        async with HTTPProducer("orders", url=url) as producer:
            assert (await producer.send("x")).body == b"x"


async def test_a_certificate_that_no_one_vouches_for_is_a_clear_error_at_once(files: dict[str, Any]) -> None:
    async with serving(echo, url=HTTPSettings(tls=True, **files)) as consumer:
        async with HTTPProducer("orders", url=HTTPSettings(tls=True, port=consumer.address[1])) as producer:
            with pytest.raises(ConnectError, match=r"TLS failed.*certificate") as caught:
                await producer.send(1)
    assert caught.value.permanent


async def test_tls_to_a_port_without_it_is_a_clear_error() -> None:
    async with serving(echo) as consumer:
        async with HTTPProducer("orders", url=HTTPSettings(tls=True, port=consumer.address[1])) as producer:
            with pytest.raises(ConnectError, match="TLS failed"):
                await producer.send(1)


async def test_a_port_has_one_certificate(files: dict[str, Any]) -> None:
    async with HTTPConsumer("a", url=HTTPSettings(tls=True, **files), port=0):
        with pytest.raises(ConfigurationError, match="same TLS settings"):
            await HTTPConsumer("b", port=0).open()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tls": True}, "needs its certificate"),
        ({"certfile": "cert.pem"}, "write https://"),
        ({"tls": True, "certfile": "/no/such.pem"}, "certfile='/no/such.pem'.*No such file"),
        ({"tls": True, "certfile": __file__}, "cannot be used"),
    ],
)
async def test_half_of_the_settings_are_a_clear_error(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        await HTTPConsumer("a", url=HTTPSettings(**settings), port=0).open()


async def test_a_cafile_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="cafile='/no/such.pem'"):
        await HTTPProducer("a", url=HTTPSettings(tls=True, cafile="/no/such.pem")).open()
