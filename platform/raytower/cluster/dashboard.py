"""What a cluster says of itself over its dashboard's HTTP: versions, nodes, jobs. Every question has a limit of time.

Ray's own client waits without one, and says of a wrong address, a missing token and another service the same.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raytower.errors import InputError
from raytower.progress import log

_ANSWER_S = 10.0
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_TOKEN_FILE = "~/.ray/auth_token"
# Modes of a file that others than its owner may use.
_OTHERS = 0o077
_MAX_NODES = 10_000
_RUNNING = ("PENDING", "RUNNING")
# What a job that was submitted here says of itself. Ray's metadata are texts, and everybody with the token sees them.
JOB_KEY, OUTPUT_KEY = "raytower", "raytower_output"


@dataclass(frozen=True, kw_only=True)
class Token:
    """What Ray's processes ask for, and where it was found. Its value is in no message."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Token(source={self.source!r})"


def find_token(environment: Mapping[str, str]) -> Token | None:
    """The token as Ray itself looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Ray sends none unless RAY_AUTH_MODE says `token`; here one that is found is sent unless the mode says otherwise.

    Raises:
        InputError: the file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if environment.get("RAY_AUTH_TOKEN"):
        return _token(environment["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN")
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(os.path.expanduser(named or _TOKEN_FILE))
    try:
        value = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if not named:
            return None
        raise InputError(
            f"RAY_AUTH_TOKEN_PATH names {named!r}, which cannot be read ({error.strerror}); name the file of the "
            "cluster's token, or unset it (~/.ray/auth_token is taken then)"
        ) from error
    mode = file.stat().st_mode & 0o777
    if value.strip() and mode & _OTHERS:
        log(
            f"warning: others may read {file} (mode {mode:o}), and whoever has read the token may run commands on the "
            "cluster; `chmod 600` keeps it to you"
        )
    return _token(value, str(file)) if value.strip() else None


def _token(value: str, source: str) -> Token:
    """Raises InputError where what was found is no token: it goes into a header, which is one line of ASCII."""
    value = value.strip()
    if not value.isascii() or not value.isprintable() or " " in value:
        raise InputError(
            f"{source} holds no token: one is a single word of ASCII characters, and this is several, or other "
            "characters; put nothing but the cluster's token there"
        )
    return Token(value=value, source=source)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection is an answer like another: urllib would send the token on to wherever it leads."""

    def redirect_request(self, *_: object) -> None:
        return None


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own, which no proxy is to be asked for."""
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """The dashboard at an address, asked with the token that was found."""

    address: str
    token: Token | None

    @staticmethod
    def at(address: str | None) -> Dashboard:
        """The dashboard at `address`, or at the environment's. Raises InputError where it is no address of one."""
        given = address or os.environ.get(_ADDRESS_VARIABLE)
        if given is None:
            raise InputError(
                f"address is null and {_ADDRESS_VARIABLE} unset; give the address of the cluster's dashboard, such as "
                "--address http://127.0.0.1:8265 (`ray dashboard cluster.yaml` forwards it there)"
            )
        named = given if "://" in given else f"http://{given}"
        if "@" in named:
            raise InputError(
                "address holds a name or a password, which would be shown in messages and logs; leave it out: the "
                "dashboard asks for the cluster's token (RAY_AUTH_TOKEN_PATH)"
            )
        try:
            parts = urlsplit(named)
            is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets without an end, a port that is no number
            is_one = False
        if not is_one:
            raise InputError(
                f"address is {given!r}; it must be that of the dashboard, http://HOST:8265 or https://…, through which "
                "jobs are submitted"
            )
        return Dashboard(address=named.rstrip("/"), token=find_token(os.environ))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token.value}"}

    def ask(self, path: str) -> Any:
        """The JSON that a GET of `path` answers with.

        Raises:
            InputError: nobody answers within seconds, what answers is no dashboard, or it refuses the token.
        """
        request = urllib.request.Request(f"{self.address}{path}", headers=self.headers)
        direct = [urllib.request.ProxyHandler({})] if is_loopback(self.address) else []
        opener = urllib.request.build_opener(_NoRedirect, *direct)
        try:
            with opener.open(request, timeout=_ANSWER_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused() from error
            if (other := error.headers.get("Location")) is not None:
                raise self._is_no_dashboard(f"it sends on to {other!r}, where no token is sent") from error
            raise self._is_no_dashboard(f"it answers {path} with status {error.code}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"address is {self.address!r}, and no dashboard answers there within {_ANSWER_S:g} s ({reason}): start "
                "the cluster, or give the address of its dashboard (`ray dashboard cluster.yaml` forwards it to "
                "http://127.0.0.1:8265); 6379 is another port of the head"
            ) from error
        except ValueError as error:
            raise self._is_no_dashboard(f"its answer to {path} is no JSON") from error

    def _refused(self) -> InputError:
        if self.token is None:
            return InputError(
                f"the cluster at {self.address} asks for a token, and there is none here: put the cluster's into "
                "~/.ray/auth_token (`raytower cluster init` makes it there before `ray up`), or name its file in "
                "RAY_AUTH_TOKEN_PATH"
            )
        return InputError(
            f"the cluster at {self.address} refuses the token of {self.token.source}: it is another cluster's, or has "
            "expired or been replaced since; take the one that the cluster was started with, or `ray down` and `ray "
            "up` it with this one"
        )

    def _is_no_dashboard(self, what: str) -> InputError:
        return InputError(
            f"address is {self.address!r}, and what answers there is no dashboard of Ray ({what}); give the "
            "dashboard's, which is http://HOST:8265 unless told otherwise"
        )

    def check_versions(self) -> dict[str, str]:
        """The cluster's versions of Ray and Python. Raises InputError where this process has others."""
        ray = str(self._of(self.ask("/api/version"), "ray_version"))
        data = self.ask("/api/v0/cluster_metadata").get("data") or {}
        python = str(data.get("pythonVersion") or data.get("python_version") or "")
        problems = other_versions(ray, python, version("ray"), platform.python_version())
        if problems:
            raise InputError("\n".join(problems))
        return {"ray": ray, "python": python}

    def nodes(self) -> list[dict[str, float]]:
        """The resources of each node that is alive; memory in bytes."""
        answer = self.ask(f"/api/v0/nodes?limit={_MAX_NODES}")
        rows = answer["data"]["result"]["result"]
        return [
            {name: float(amount) for name, amount in (row.get("resources_total") or {}).items()}
            for row in rows
            if row["state"] == "ALIVE"
        ]

    def check_job(self, job: str) -> None:
        """Raises InputError where the cluster knows no job of this id."""
        known = [row["submission_id"] for row in self.ask("/api/jobs/") if row.get("submission_id")]
        if job not in known:
            raise InputError(
                f"follow is {job!r}, and the cluster at {self.address} knows no job of that id; `raytower submit` "
                f"and `ray job list --address {self.address}` tell ids; a new cluster has none of before"
            )

    def running_jobs(self) -> list[RunningJob]:
        """The jobs that were submitted by raytower and have not ended."""
        return [
            RunningJob(
                id=row["submission_id"],
                job=row["metadata"][JOB_KEY],
                output=row["metadata"].get(OUTPUT_KEY),
            )
            for row in self.ask("/api/jobs/")
            if row["status"] in _RUNNING and JOB_KEY in (row.get("metadata") or {})
        ]

    def _of(self, answer: Any, name: str) -> Any:
        if not isinstance(answer, dict) or name not in answer:
            raise self._is_no_dashboard(f"its version has no {name}")
        return answer[name]


@dataclass(frozen=True, kw_only=True)
class RunningJob:
    """A job that was submitted before and has not ended."""

    id: str
    job: str
    output: str | None


def other_versions(ray: str, python: str, own_ray: str, own_python: str) -> list[str]:
    """What is wrong where the cluster's Ray or Python is another than the client's; patches of Python go together."""
    problems = []
    if ray != own_ray:
        problems.append(
            f"the cluster runs Ray {ray}, and this is Ray {own_ray}; both must be the same: install that one here "
            f"(`pip install 'ray[data,default]=={ray}'`), or `ray up` the cluster with this one"
        )
    if python and python.split(".")[:2] != own_python.split(".")[:2]:
        problems.append(
            f"the cluster runs Python {python}, and this is Python {own_python}; both must be the same up to "
            "the second number: submit from an environment of that Python, or `ray up` the cluster with this one"
        )
    return problems


def refuse_second_job(output: str | None, running: Sequence[RunningJob], address: str) -> None:
    """Raise InputError where a job that writes `output` runs already."""
    if output is None:
        return
    for other in running:
        if other.output is not None and _normal(other.output) == _normal(output):
            raise InputError(
                f"output {output!r} is being written by job {other.id} ({other.job}), which runs: follow "
                f"it by `raytower submit --address {address} --follow {other.id}`, stop it by `ray job stop --address "
                f"{address} {other.id}`, or name another output"
            )


def _normal(output: str) -> str:
    scheme, separator, path = output.rpartition("://")
    return f"{scheme}{separator}{os.path.normpath(path)}"
