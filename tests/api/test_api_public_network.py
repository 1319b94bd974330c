"""Requests to addresses that users name."""

import asyncio
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from flexllm_vllm.api import public_network
from flexllm_vllm.api.public_network import AddressError, PublicTransport, is_public


def fetch(url: str, resolve: Any = public_network.resolve) -> httpx.Response:
    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=PublicTransport(resolve)) as client:
            return await client.get(url)

    return asyncio.run(get())


def resolver(*answers: list[str]) -> Any:
    """Gives an answer for each time it is asked, and fails when it is asked once more."""
    left = list(answers)

    async def resolve(_host: str, _port: int) -> list[str]:
        return left.pop(0)

    return resolve


@pytest.fixture
def app() -> FastAPI:
    """Tells the Host header that it got."""
    app = FastAPI()

    @app.get("/")
    def root(request: Request) -> str:
        return request.headers["host"]

    return app


def test_what_is_public() -> None:
    for address in ("1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"):
        assert is_public(address), address
    for address in ("::ffff:127.0.0.1", "fe80::1%eth0", "240.0.0.1", "ff02::1", "::", "192.0.2.1"):
        assert not is_public(address), address


def test_no_connection_is_made_to_a_private_address(
    app: FastAPI, serve: Callable[[FastAPI], str]
) -> None:
    url = serve(app)
    assert httpx.get(url).status_code == 200
    with pytest.raises(AddressError, match="not public"):
        fetch(url)
    with pytest.raises(AddressError, match="not public"):
        fetch(url.replace("127.0.0.1", "localhost"))


def test_one_private_address_among_public_ones_is_enough() -> None:
    with pytest.raises(AddressError):
        fetch("http://receiver.example/", resolver(["1.1.1.1", "127.0.0.1"]))


def test_an_unknown_host_is_a_connection_error() -> None:
    with pytest.raises(httpx.ConnectError, match="not known"):
        fetch("http://receiver.invalid/")


def test_the_connection_goes_to_the_address_that_was_checked(
    app: FastAPI, serve: Callable[[FastAPI], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = serve(app).rpartition(":")[2]
    checked = []
    monkeypatch.setattr(public_network, "is_public", lambda a: checked.append(a) or True)
    # Asked once, though no such name exists; the address that refuses is passed over.
    answer = fetch(f"http://receiver.example:{port}/", resolver(["127.0.0.2", "127.0.0.1"]))
    assert answer.json() == f"receiver.example:{port}"
    assert checked == ["127.0.0.2", "127.0.0.1"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls_is_checked_against_the_name(
    app: FastAPI, run_server: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
        f"-subj /CN=receiver.example -addext subjectAltName=DNS:receiver.example "
        f"-keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(public_network, "is_public", lambda _: True)
    server, thread, url = run_server(app, ssl_keyfile=str(key), ssl_certfile=str(certificate))
    port = url.rpartition(":")[2]
    name = f"receiver.example:{port}"
    assert fetch(f"https://{name}/", resolver(["127.0.0.1"])).json() == name
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(f"https://other.example:{port}/", resolver(["127.0.0.1"]))
    server.should_exit = True
    thread.join(timeout=10)
