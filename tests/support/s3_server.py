"""A real S3 server in a process of its own on loopback: moto's, which keeps objects in its memory.

Importing this module gives the test process credentials that only moto knows, before a fixture starts Ray, whose
workers inherit them. Nobody's real credentials are ever used.
"""

from __future__ import annotations

import atexit
import http.client
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config as BotoConfig

REGION = "us-east-1"
# Headers that hold between two neighbours alone.
_OF_ONE_HOP = ("connection", "expect", "transfer-encoding", "content-length", "keep-alive")
# Workers read RAYTOWER_CACHE too, so it is set once for the whole session, before Ray starts.
CACHE = Path(tempfile.mkdtemp(prefix="raytower-cache-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

for _name in [name for name in os.environ if name.startswith("AWS_")]:
    del os.environ[_name]
os.environ |= {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests-secret",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "RAYTOWER_CACHE": str(CACHE),
}


@dataclass(frozen=True)
class S3Server:
    """`address` is host:port. `client` is boto3's, an implementation independent of pyarrow's."""

    address: str
    client: Any
    log: Path

    def uri(self, path: str, **options: str) -> str:
        query = {"endpoint_override": self.address, "scheme": "http", "region": REGION, **options}
        return f"s3://{path}?{'&'.join(f'{name}={value}' for name, value in query.items())}"

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Keys of all objects, without those that only mark a folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return sorted(key for key in keys if not key.endswith("/"))

    def read(self, bucket: str, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def requests(self) -> list[str]:
        """Method and path of every request so far, oldest first."""
        return re.findall(r'"\S*?([A-Z]+ /\S*) HTTP/1', self.log.read_text())

    def check_credentials(self) -> None:
        """From now on, refuse every request that is not signed by a user of this server with rights of its own."""
        request = urllib.request.Request(
            f"http://{self.address}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def s3_server(folder: Path, faults: Path | None = None) -> Iterator[S3Server]:
    """A running server with the bucket `bucket`; its log goes into `folder`. `faults`: see failing_s3.py."""
    log = folder / "s3.log"
    moto = ["moto.server", "-H", "127.0.0.1", "-p", "0"]
    command = [sys.executable, "-m", *(moto if faults is None else ["tests.support.failing_s3", str(faults)])]
    with open(log, "wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            address = _wait_for_address(process, log)
            client = boto3.client(
                "s3",
                endpoint_url=f"http://{address}",
                region_name=REGION,
                config=BotoConfig(retries={"max_attempts": 1}),
            )
            client.create_bucket(Bucket="bucket")
            yield S3Server(address, client, log)
        finally:
            process.kill()


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    # The system chooses a free port; the server says which.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"Running on http://(127\.0\.0\.1:\d+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()}")


@dataclass
class BusyFront:
    """What stands before a server and answers every so many requests with 503, as S3 does when it is asked too much.

    No request is refused twice in a row, so that a client that asks again gets its answer.
    """

    address: str
    refused: list[str]
    """Method, path and client of each request that was answered with 503."""
    answered: list[str]
    """Likewise of those that were passed on."""
    tokens: set[str]
    """Session tokens that requests brought; empty of those that brought none."""


class _Passing(BaseHTTPRequestHandler):
    """Reads requests and writes answers as S3's clients want them."""

    protocol_version = "HTTP/1.1"

    def asked_bytes(self) -> float:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        return int(last) - int(first) + 1 if first and last else math.inf

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in _OF_ONE_HOP:
                self.send_header(name, value)
        # Of HEAD it says how long the object is, and nothing follows.
        is_head = self.command == "HEAD"
        length = headers.get("content-length", "0") if is_head else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if not is_head:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def busy_front(server: S3Server, every: int) -> Iterator[BusyFront]:
    """A front before `server` on a port of its own, in a thread of this process."""
    front = BusyFront("", [], [], set())
    lock, due = threading.Lock(), set[tuple[str, str]]()
    count = 0

    class Handler(_Passing):
        def handle_one(self) -> None:
            nonlocal count
            body = self.read_body()
            who = (self.command, self.path)
            line = f"{self.command} {self.path} {self.headers.get('User-Agent', '')}"
            with lock:
                count += 1
                is_refused = count % every == 0 and who not in due
                (due.add if is_refused else due.discard)(who)
                (front.refused if is_refused else front.answered).append(line)
                front.tokens.add(self.headers.get("x-amz-security-token", ""))
            if is_refused:
                words = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
                # pyarrow's client has no room for more bytes than it asked for: a longer refusal is a broken stream to
                # it, which it does not ask for again (Arrow's footer is 10 bytes).
                if self.asked_bytes() < len(words):
                    words = b""
                self.answer(503, {"content-type": "application/xml"}, words)
                return
            kept = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_HOP}
            connection = http.client.HTTPConnection(server.address, timeout=60)
            try:
                connection.request(self.command, self.path, body, kept)
                reply = connection.getresponse()
                content = reply.read()
            finally:
                connection.close()
            headers = {name.lower(): value for name, value in reply.getheaders()}
            self.answer(reply.status, headers, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815 - names of the library

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    front.address = f"127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield front
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join(10)
