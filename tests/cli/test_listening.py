"""Where a server listens: Unix sockets, HTTPS, and files of certificates that cannot be used."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from cenote.cli import listening
from cenote.config import ServerConfig
from cenote.errors import ConfigError
from tests import PATIENCE, checkpoints
from tests.server.test_process import Process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.bert(tmp_path_factory.mktemp("model") / "bert"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A key and its certificate for the loopback address."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(file), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return str(key), str(file)


def test_a_unix_socket(model: str, tmp_path: Path) -> None:
    """It is for this user alone, and one that a killed server left is replaced."""
    path = tmp_path / "cenote.sock"
    for _ in range(2):
        server = Process(model, "--uds", str(path))
        assert f"serving http on {path}, " in server.log
        assert path.stat().st_mode & 0o777 == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            answer = client.post("/v1/embeddings", json={"input": "a"}, timeout=PATIENCE)
            assert len(answer.json()["data"][0]["embedding"]) == checkpoints.HIDDEN
        with pytest.raises(ConfigError, match="another process does"):
            listening.bound(ServerConfig(uds=str(path)))
        server.kill()


def test_https(model: str, certificate: tuple[str, str]) -> None:
    """Also a head that is too large is answered, and clients without a certificate are not if they need one."""
    key, file = certificate
    server = Process(model, "--ssl-keyfile", key, "--ssl_certfile", file, "--max-header-bytes", "2000")
    url = server.url.replace("http:", "https:")
    trusting = ssl.create_default_context(cafile=file)
    try:
        with httpx.Client(verify=trusting, base_url=url, timeout=PATIENCE) as client:
            assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
            assert client.get("/health", headers={"X": "a" * 3000}).status_code == 431
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health", timeout=PATIENCE)
        assert "Traceback" not in server.log
    finally:
        server.kill()


def test_certificates_of_clients(certificate: tuple[str, str]) -> None:
    key, file = certificate
    config = ServerConfig(ssl_keyfile=key, ssl_certfile=file)
    assert listening.certificates(ServerConfig()) == {}
    assert listening.certificates(config) == {"ssl_keyfile": key, "ssl_certfile": file}
    checked = listening.certificates(config.model_copy(update={"ssl_ca_certs": file}))
    assert (checked["ssl_ca_certs"], checked["ssl_cert_reqs"]) == (file, ssl.CERT_REQUIRED)


def test_a_certificate_that_cannot_be_used(certificate: tuple[str, str], tmp_path: Path) -> None:
    key, file = certificate
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    for files in ((key, str(other)), (str(other), file), (str(tmp_path / "none"), file)):
        with pytest.raises(ConfigError, match="the files of HTTPS cannot be used: "):
            listening.bound(ServerConfig(port=0, ssl_keyfile=files[0], ssl_certfile=files[1]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ssl_keyfile": "x"}, "HTTPS needs both ssl_keyfile and ssl_certfile, got one of them"),
        ({"ssl_ca_certs": "x"}, "ssl_ca_certs is for HTTPS"),
    ],
    ids=str,
)
def test_half_a_certificate(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ServerConfig(**options)


def test_a_port_that_is_taken_leaves_no_listener() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1:"):
            listening.bound(ServerConfig(port=0, metrics_port=taken.getsockname()[1]))
