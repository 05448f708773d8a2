"""A real S3 server in a process of its own on loopback: moto's, which keeps objects in its memory.

Importing this module gives the test process credentials that only moto knows, before a fixture starts Ray, whose
workers inherit them. Nobody's real credentials are ever used.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config as BotoConfig

REGION = "us-east-1"
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
