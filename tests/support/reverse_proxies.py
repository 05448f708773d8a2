"""nginx and Caddy with the configurations of deploy/, on free ports of loopback in front of a server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@dataclass(frozen=True)
class Proxy:
    """Where it answers: with TLS and without, both with the prefix."""

    secure: str
    plain: str
    certificate: Path


def make_certificate(folder: Path) -> Path:
    """A certificate for localhost with its key beside it, as `cert.pem` and `key.pem`."""
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([_find("openssl"), "req", "-x509", *kind, *files, *names], check=True, capture_output=True)
    return folder / "cert.pem"


@contextmanager
def nginx(folder: Path, upstream: str) -> Iterator[Proxy]:
    """nginx with deploy/nginx.conf."""
    certificate, secure, plain = make_certificate(folder), free_port(), free_port()
    site = _replaced(
        (DEPLOY / "nginx.conf").read_text(encoding="utf-8"),
        {
            "server 127.0.0.1:8000;": f"server {upstream};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{secure} ssl http2; listen 127.0.0.1:{plain};",
            "/etc/ssl/raytower/fullchain.pem": str(certificate),
            "/etc/ssl/raytower/privkey.pem": str(folder / "key.pem"),
        },
    )
    (folder / "site.conf").write_text(site, encoding="utf-8")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log {folder}/access.log; {temporary} include {folder}/site.conf; }}\n",
        encoding="utf-8",
    )
    command = [
        _find("nginx"),
        "-p",
        str(folder),
        "-c",
        str(folder / "nginx.conf"),
        "-e",
        str(folder / "error.log"),
    ]
    with _running(command, folder, [secure, plain]):
        yield Proxy(f"https://localhost:{secure}/search", f"http://127.0.0.1:{plain}/search", certificate)


@contextmanager
def caddy(folder: Path, upstream: str) -> Iterator[Proxy]:
    """Caddy with deploy/Caddyfile."""
    certificate, secure, plain = make_certificate(folder), free_port(), free_port()
    # A site that has a certificate of its own answers over TLS alone, so the file is there twice.
    sites = [
        _replaced(
            (DEPLOY / "Caddyfile").read_text(encoding="utf-8"),
            {"reverse_proxy 127.0.0.1:8000 {": f"reverse_proxy {upstream} {{", "search.example.org {": head},
        )
        for head in (
            f"https://localhost:{secure} {{\n\ttls {certificate} {folder}/key.pem\n",
            f"http://127.0.0.1:{plain} {{",
        )
    ]
    options = f"{{\n\tadmin off\n\tauto_https off\n\tstorage file_system {folder}/storage\n}}\n"
    (folder / "Caddyfile").write_text(options + "\n".join(sites), encoding="utf-8")
    command = [_find("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    with _running(command, folder, [secure, plain]):
        yield Proxy(f"https://localhost:{secure}/search", f"http://127.0.0.1:{plain}/search", certificate)


PROXIES: dict[str, Callable[[Path, str], object]] = {"nginx": nginx, "caddy": caddy}


def _find(name: str) -> str:
    # Debian puts servers where the paths of ordinary users do not lead.
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _replaced(text: str, values: dict[str, str]) -> str:
    for former, new in values.items():
        assert text.count(former) == 1, former
        text = text.replace(former, new)
    return text


@contextmanager
def _running(command: list[str], folder: Path, ports: list[int]) -> Iterator[None]:
    # Caddy keeps its own files below the home folder.
    environment = {
        **os.environ,
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
    }
    with (folder / "output.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + 30
        for port in ports:
            while not _listens(port):
                assert process.poll() is None, _logs(folder)
                assert time.monotonic() < end, _logs(folder)
                time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))
