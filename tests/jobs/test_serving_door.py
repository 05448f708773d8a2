"""A server as a stranger meets it: who has no token gets nothing from any of its ports, and no head stops it."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from ray.serve.generated.serve_pb2 import ASGIRequest

from raytower.serving import deploy, protocol
from tests.support.processes import clean_environment, free_port, wait_for
from tests.support.served_index import write_version

pytestmark = pytest.mark.processes

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
# One method of each service that a port may hold, and what asks it: none of these may be answered.
METHODS = [
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.serve.ASGIService/HandleRequest",
    "/ray.serve.ASGIService/HandleRequestStreaming",
]
# A client that joins by its address: by Ray, and by the GCS alone.
JOIN = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", _node_ip_address="127.0.0.1")
print("JOINED", ray.nodes())
"""
ASK_GCS = """
import sys
from ray._raylet import GcsClient
print("ANSWERED", GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=5))
"""


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    stderr: Path

    def family(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def listening(self) -> list[tuple[str, str, int]]:
        """Name of the process, address and port of every listening socket of the tree."""
        return [
            (member.name(), link.laddr.ip, link.laddr.port)
            for member in self.family()
            for link in member.net_connections("tcp")
            if link.status == psutil.CONN_LISTEN
        ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, dummy_encoder_dir: Path) -> Iterator[Server]:
    """`raytower serve` in processes of its own, with a key, and with a proxy in the environment that goes nowhere."""
    folder = tmp_path_factory.mktemp("door")
    write_version(folder / "index", "000001", dummy_encoder_dir)
    port = free_port()
    nowhere = "http://127.0.0.1:9"
    environment = clean_environment(
        SEARCH_KEY="open sesame", http_proxy=nowhere, https_proxy=nowhere, HF_HUB_OFFLINE="1"
    )
    environment.pop("no_proxy", None)
    command = [sys.executable, "-m", "raytower.cli", "serve", "--index", str(folder / "index")]
    command += ["--port", str(port), "--api_key_env", "SEARCH_KEY", "--layout", "sharded"]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as error:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=out, stderr=error, start_new_session=True
        )
    try:
        ready = lambda: (folder / "stderr").read_text().find("serving index version") >= 0  # noqa: E731
        wait_for(lambda: ready() or process.poll() is not None, "the server starts", 240)
        assert process.poll() is None, (folder / "stderr").read_text()
        yield Server(process, port, folder / "stderr")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            finally:
                process.kill()


def test_every_port_is_on_loopback(server: Server) -> None:
    listening = server.listening()
    assert {name for name, _, _ in listening} >= {"gcs_server", "raylet"}
    assert any("ServeReplica" in name for name, _, _ in listening)
    assert [found for found in listening if found[1] not in LOOPBACK] == []


def test_no_port_takes_a_job_over_http(server: Server, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    body = json.dumps({"entrypoint": f"touch {marker}"})
    answers = {}
    for path in ("/api/job_agent/jobs/", "/api/jobs/", "/get_or_create_runtime_env"):
        for _, _, port in server.listening():
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                link.request("POST", path, body, {"Content-Type": "application/json"})
                answers[port, path] = link.getresponse().status
            except (OSError, http.client.HTTPException):
                continue  # it speaks gRPC
            finally:
                link.close()
    assert set(answers.values()) <= {401, 403, 404, 405}
    assert 401 in answers.values()
    time.sleep(1)
    assert not marker.exists()


def test_no_port_answers_grpc(server: Server) -> None:
    refused = 0
    for name, _, port in server.listening():
        for method in METHODS:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                ask = channel.unary_unary(method, request_serializer=None, response_deserializer=None)
                with pytest.raises(grpc.RpcError) as caught:
                    ask(b"", timeout=5)
            # UNIMPLEMENTED: gRPC without this service; UNAVAILABLE: no gRPC.
            expected = {
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.UNAVAILABLE,
            }
            assert caught.value.code() in expected, (name, method)
            refused += caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert refused >= len(METHODS), "each method is asked of one port that has it"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


def test_a_replica_unpickles_nothing_of_a_stranger(server: Server, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(Touch(marker))
    request = ASGIRequest(pickled_request_metadata=payload, request_args=payload).SerializeToString()
    codes = []
    for name, _, port in server.listening():
        if "ServeReplica" in name:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(request, timeout=5)
                codes.append(caught.value.code())
    assert codes.count(grpc.StatusCode.UNAUTHENTICATED) == 4, "ingress, conductor and both shards"
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists(), "it would have been made"


@pytest.fixture(scope="module")
def strangers(server: Server) -> dict[tuple[str, str], tuple[int, str, str]]:
    """What came of those who join by either way, without a token and with another: exit code, stdout, stderr.

    All at once, since Ray asks again for 20 seconds before it gives up.
    """
    (port,) = (port for name, _, port in server.listening() if name == "gcs_server")
    tokens = {"none": {}, "another": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}}

    def join(way: str, token: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", {"ray.init": JOIN, "GCS": ASK_GCS}[way], f"127.0.0.1:{port}"]
        # Left alone, Ray would ask the reachable address of the machine, where nobody listens.
        environment = clean_environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **tokens[token])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    asked = [(way, token) for way in ("ray.init", "GCS") for token in tokens]
    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(zip(asked, pool.map(lambda pair: join(*pair), asked), strict=True))


@pytest.mark.parametrize("way", ["ray.init", "GCS"])
@pytest.mark.parametrize("token", ["none", "another"])
def test_nobody_joins_without_the_token(
    strangers: dict[tuple[str, str], tuple[int, str, str]], way: str, token: str
) -> None:
    code, out, error = strangers[way, token]
    assert code != 0
    assert "JOINED" not in out + error
    assert "ANSWERED" not in out
    assert "nauthenticated" in error or "AuthenticationError" in error, error


def test_the_key_is_in_no_process_but_the_drivers(server: Server) -> None:
    held = [member.environ().get("SEARCH_KEY") for member in server.family()]
    assert held[0] == "open sesame"
    assert set(held[1:]) == {None}


def test_with_a_proxy_in_the_environment_the_server_stays(server: Server) -> None:
    assert server.process.poll() is None
    assert deploy.served_version(f"http://127.0.0.1:{server.port}") == "000001"


# --- heads of requests ----------------------------------------------------------------------------------------


def offer(port: int, first: bytes, piece: bytes, megabytes: int = 8) -> float:
    """Megabytes of an unfinished head that the server takes before it answers or hangs up."""
    taken = 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        try:
            link.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + first)
            while taken < megabytes * 2**20:
                link.sendall(piece)
                taken += len(piece)
                time.sleep(0.01)
        except OSError:
            pass
    return taken / 2**20


def test_a_long_head_is_refused(server: Server) -> None:
    assert offer(server.port, b"X-A: ", b"x" * 2**16) < 4
    assert offer(server.port, b"", (b"X-A: " + b"y" * 1000 + b"\r\n") * 64) < 4
    # What fits is answered: the limit is 64 KiB.
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    link.request("GET", "/healthz", headers={"X-A": "x" * 30_000})
    assert link.getresponse().status == 200


def wait_for_end(port: int, start: bytes) -> float:
    """Seconds until the server hangs up on a head that begins with `start` and never ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        began = time.monotonic()
        link.sendall(start)
        while True:
            assert time.monotonic() - began < protocol.HEAD_TIMEOUT_S + 10, "still waited for"
            try:
                if start:
                    link.sendall(b"X-A: y\r\n")  # a byte now and then earns no more time
                link.settimeout(0.5)
                if link.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        return time.monotonic() - began


def answers_twice(port: int) -> list[int]:
    """Two answers over one connection, further apart than the limit of a head."""
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    codes = []
    for pause in (0.0, protocol.HEAD_TIMEOUT_S + 1):
        time.sleep(pause)
        link.request("GET", "/readyz")
        answer = link.getresponse()
        codes.append(answer.status)
        answer.read()
    return codes


def test_a_head_that_does_not_come_is_not_waited_for_and_a_kept_connection_stays(server: Server) -> None:
    """The three wait at the same time."""
    starts = {"nothing": b"", "half": b"GET /healthz HTTP/1.1\r\nHost: x\r\n"}
    with ThreadPoolExecutor(3) as clients:
        kept = clients.submit(answers_twice, server.port)
        ended = {name: clients.submit(wait_for_end, server.port, start) for name, start in starts.items()}
        assert kept.result() == [200, 200]
        for name, end in ended.items():
            assert end.result() > protocol.HEAD_TIMEOUT_S - 1, name


# --- the end (last: it ends the server) -----------------------------------------------------------------------


def test_sigterm_to_the_group_ends_all_of_it_in_time(server: Server) -> None:
    family = server.family()
    private = {
        Path(link.laddr).parents[3]
        for member in family
        for link in member.net_connections("unix")
        if link.laddr.endswith("plasma_store")
    }
    assert all(folder.is_dir() for folder in private)
    os.killpg(server.process.pid, signal.SIGTERM)
    began = time.monotonic()
    assert server.process.wait(20) in (0, 143)
    assert time.monotonic() - began < 12, "8 seconds, and what a busy machine adds"
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert [folder for folder in private if folder.exists()] == []
    assert "PC: @" not in server.stderr.read_text()
