"""TLS with a self-signed certificate, clients that take forever to ask, and the command's words."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from reflexarc.client import HttpPolicyClient, PolicyClient
from reflexarc.contract import Observation
from reflexarc.contract.errors import ConfigError
from reflexarc.server import BackgroundServer, NullPolicy, http_protocol
from reflexarc.server.api_keys import ApiKeys
from reflexarc.server.protection import Protection

MakeObservation = Callable[..., Observation]
KEY = "a-key-of-the-robot-cell-7"
SERVE = (sys.executable, "-c", "from reflexarc.cli.main import serve_policy; serve_policy()")
REFLEXARC = (sys.executable, "-c", "from reflexarc.cli.main import main; main()")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``(certificate, private key)`` for this machine, signed by itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the command openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    kind = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    out = ("-out", files[0], "-keyout", files[1])
    subprocess.run([openssl, *kind, "-days", "2", *names, *out], check=True, capture_output=True)
    return files


@pytest.mark.parametrize("client", [PolicyClient, HttpPolicyClient])
def test_clients_ask_over_tls(
    certificate: tuple[Path, Path],
    make_observation: MakeObservation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    client: Any,
) -> None:
    guard = Protection(ApiKeys([KEY]), *certificate)
    with BackgroundServer(NullPolicy, protection=guard) as server:
        assert server.url.startswith("wss://") and server.http_url.startswith("https://")
        with pytest.raises(ConfigError, match=r"certificate of .* is not trusted .*SSL_CERT_FILE"):
            client(server.url, api_key=KEY, retry_for=60)
        assert "60 s" not in caplog.text, "it was asked again"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with client(server.url, api_key=KEY) as policy:
            for seed in range(3):  # frames of 301 kB, received in place
                assert policy.infer(make_observation(seed=seed)).seed == seed
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(server.http_url.replace("https", "http") + "/livez")


def test_wrong_files_are_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    cases = [
        ((tmp_path / "none.pem", None), "no such file"),
        ((certificate[0], tmp_path / "none.pem"), "no such file"),
        ((certificate[0], None), "belong together"),
        ((other, certificate[1]), "belong together"),
        ((None, certificate[1]), "goes with --tls-certificate"),
    ]
    for files, named in cases:
        with pytest.raises(ConfigError, match=named):
            Protection(ApiKeys(), *files)
    whole = tmp_path / "both.pem"
    whole.write_bytes(certificate[0].read_bytes() + certificate[1].read_bytes())
    assert Protection(certificate=whole).is_encrypted


def is_ended(client: socket.socket) -> bool:
    """Whether the server closes a connection before its timeout."""
    try:
        while client.recv(1000):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "part",
    [b"", b"GET / HT", b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf of it"],
    ids=["nothing", "half a head", "half a body"],
)
def test_who_takes_forever_to_ask_is_dropped(monkeypatch: pytest.MonkeyPatch, part: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.3)
    with (
        BackgroundServer(NullPolicy) as server,
        socket.create_connection((server.host, server.port), timeout=20) as slow,
        httpx.Client(base_url=server.http_url) as web,
    ):
        assert web.get("/livez").status_code == 200
        slow.sendall(part)
        assert is_ended(slow)
        assert web.get("/livez").status_code == 200, "a connection that asks in time lives on"
        with connect(f"{server.url}/v1/policy") as long_open:
            long_open.recv(timeout=20)
            time.sleep(0.8)  # a websocket's head has come, and it has no body
            long_open.send(b"")
            assert b"codec" in long_open.recv(timeout=20)


def test_sockets_far_above_the_cap_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "REFUSED_AT_ONCE", 2)
    with BackgroundServer(NullPolicy, protection=Protection(max_connections=1)) as server:
        idle = [socket.create_connection((server.host, server.port), timeout=20) for _ in range(3)]
        time.sleep(0.2)
        with socket.create_connection((server.host, server.port), timeout=20) as above:
            assert is_ended(above)
        for one in idle:
            one.close()
        with PolicyClient(server.url, retry_for=20) as client:
            assert client.contract.family


def test_who_serves_to_others_without_keys_is_told_how_to_set_them() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.20"):
        warning = Protection().warning(host)
        assert warning and "REFLEXARC_API_KEYS" in warning and host in warning
        assert Protection(ApiKeys([KEY])).warning(host) is None
    for host in ("127.0.0.1", "::1", "localhost"):
        assert Protection().warning(host) is None


def test_the_command_serves_with_a_key_and_clients_take_theirs_from_the_environment(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    plain = {**os.environ, "COLUMNS": "200"}
    plain.pop("REFLEXARC_API_KEY", None)
    options = ("--policy", "zero", "--port", "0", "--api-keys-file", str(file))
    with subprocess.Popen(
        [*SERVE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=plain
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = process.stdout.readline()
            url = re.findall(r"ws://\S+", said)[0]
            ask = [*REFLEXARC, "query", "--server", url, "--retry-for", "30"]
            seen = ("--random", "--instruction", "move")
            with_key = {**plain, "REFLEXARC_API_KEY": KEY}
            running = [
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
                )
                for command, env in (
                    (ask, plain),
                    (ask, with_key),
                    ([*ask[:-3], url.replace("ws", "http"), *ask[-2:], *seen], with_key),
                )
            ]
            ended = [(*client.communicate(timeout=120), client.returncode) for client in running]
        finally:
            process.terminate()
            said += process.stdout.read() + process.stderr.read()
    assert [code for _, _, code in ended] == [2, 0, 0], ended
    assert "error [unauthorized]" in ended[0][1] and "REFLEXARC_API_KEY" in ended[0][1]
    assert "Clients need one of 1 API keys" in said
    assert KEY not in said + "".join(out + err for out, err, _ in ended)
