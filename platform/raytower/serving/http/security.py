"""Who may ask: keys, their limits, and which names and origins a server without keys answers to."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import os
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from raytower.config import Config
from raytower.errors import InputError
from raytower.serving.errors import ForbiddenError, OverloadedError, UnauthorisedError, WrongHostError
from raytower.serving.http_config import HttpConfig, SecurityConfig

_HEX = r"[0-9a-fA-F]{64}"


class Key(Config):
    """A key as it is stored: its name and the digest of what callers send, never the key itself."""

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern=f"^{_HEX}$", description="hexadecimal SHA-256 of the key")
    admin: bool = False
    """Whether it opens the admin routes."""
    requests_per_second: float | None = Field(default=None, gt=0)
    """Requests that each replica takes in a second; null sets no limit."""
    max_in_flight: int | None = Field(default=None, ge=1)
    """Requests that each replica works on at once; null sets no limit."""


_KEY_LIST: TypeAdapter[list[Key]] = TypeAdapter(list[Key])


@dataclass(frozen=True)
class Access:
    """What a request may do, and by which key."""

    key: Key | None = None
    admin: bool = False


def check_security(config: HttpConfig) -> None:
    """Refuse a server that anybody on the network could use. Reads no key.

    Raises:
        InputError: neither a key nor `security.open` on another address than loopback.
    """
    if config.security.has_keys or config.security.open or is_loopback(config.host):
        return
    raise InputError(
        f"host {config.host!r} is reached from other machines, and no key is asked for; name keys as "
        "security.keys_file or security.key_env, or set security.open: true to serve everybody"
    )


def load_keys(
    security: SecurityConfig, environment: MutableMapping[str, str] | None = None
) -> tuple[Key, ...]:
    """Every key, hashed. Takes the variables out of the environment, so that no other process inherits them.

    Raises:
        InputError: a file that cannot be read, an entry that breaks its rule, a variable that is unset, a name twice.
    """
    environment = os.environ if environment is None else environment
    keys = _read_file(security.keys_file) if security.keys_file else []
    for setting, admin in (("key_env", False), ("admin_key_env", True)):
        variable = getattr(security, setting)
        if variable is None:
            continue
        text = environment.pop(variable, "").strip()
        if not text:
            raise InputError(
                f"security.{setting} names {variable!r}, which is unset or empty; export the key in it or set "
                f"{setting} to null"
            )
        keys.append(Key(name=variable, sha256=hash_key(text), admin=admin))
    for what, values in (
        ("name", [key.name for key in keys]),
        ("sha256", [key.sha256.lower() for key in keys]),
    ):
        if double := next((value for value in values if values.count(value) > 1), None):
            raise InputError(f"two keys have the {what} {double!r}; each must have its own")
    return tuple(keys)


def _read_file(path: str) -> list[Key]:
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        keys = _KEY_LIST.validate_python(read)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"security.keys_file {path!r} cannot be read: {error}") from error
    except ValidationError as error:
        # The input is left out: somebody may have written a key in clear.
        detail = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, detail["loc"])) or "the file"
        raise InputError(
            f"security.keys_file {path!r}, {place}: {detail['msg'].lower()}; it must be a list of keys, each with name "
            "and sha256 (printf %s KEY | sha256sum)"
        ) from error
    if not keys:
        raise InputError(f"security.keys_file {path!r} holds no key")
    return keys


def hash_key(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Doorkeeper:
    """Lets requests in by their keys, and without keys by the name that they ask for."""

    def __init__(
        self, config: HttpConfig, keys: Sequence[Key], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]
        self._budgets = {key.name: _Budget(key, clock) for key in keys}
        self._checks_host = not keys and not config.security.open
        self._is_local = not keys and is_loopback(config.host) and not config.security.open
        self._hosts = {host.lower() for host in config.security.allowed_hosts}
        self._origins = {origin.rstrip("/").lower() for origin in config.security.cors_origins}

    def admit(self, authorization: str, host: str) -> Access:
        """Raises UnauthorisedError, or WrongHostError where no key is asked for."""
        if not self._keys:
            if self._checks_host and not self._knows(host):
                raise WrongHostError(
                    f"this server answers to no name {host[:80]!r}; name it in security.allowed_hosts, or ask by "
                    "localhost"
                )
            return Access(admin=self._is_local)
        scheme, _, text = authorization.partition(" ")
        digest = hashlib.sha256(text.strip().encode("latin-1")).digest()
        # All are compared, each in constant time, so the time says nothing of how near a guess is.
        found = [key for known, key in self._keys if hmac.compare_digest(digest, known)]
        if scheme.lower() != "bearer" or not found:
            problem = "wrong API key" if authorization else "no API key"
            raise UnauthorisedError(
                f"{problem}; send it as 'Authorization: Bearer KEY'", headers={"WWW-Authenticate": "Bearer"}
            )
        return Access(key=found[0], admin=found[0].admin)

    @contextmanager
    def within_limits(self, access: Access) -> Iterator[None]:
        """Count a request against its key's limits. Raises OverloadedError beyond them."""
        if access.key is None:
            yield
            return
        with self._budgets[access.key.name].spend():
            yield

    def check_origin(self, origin: str, host: str) -> None:
        """Refuse a page of another site, as MCP asks servers to. Raises ForbiddenError.

        `null`, which a sandboxed frame of any site sends, is a stranger's.
        """
        if not origin or origin.lower() in self._origins or "*" in self._origins:
            return
        name = origin.partition("//")[2].lower() or origin.lower()
        if origin.lower() != "null" and (name == host.lower() or self._knows(name)):
            return
        raise ForbiddenError(f"pages of {origin[:80]!r} may not ask here; name it in security.cors_origins")

    def _knows(self, host: str) -> bool:
        """Whether no stranger's name stands in a Host header. Public DNS holds no name without a dot, and an address
        is no name: neither can be made to point elsewhere."""
        name = _host_name(host)
        return name in self._hosts or host.lower() in self._hosts or "." not in name or _is_address(name)


def require_admin(access: Access) -> None:
    """Raises ForbiddenError."""
    if not access.admin:
        raise ForbiddenError(
            "the admin routes ask for a key that is marked admin, or for a server without keys on loopback"
        )


class _Budget:
    """How many requests of one key may begin now: a bucket that fills by the key's rate, and a count of those open."""

    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self._key = key
        self._clock = clock
        self._size = max(key.requests_per_second or 0.0, 1.0)
        self._level = self._size
        self._filled = clock()
        self._open = 0

    @contextmanager
    def spend(self) -> Iterator[None]:
        most = self._key.max_in_flight
        if most is not None and self._open >= most:
            raise _too_many(f"key {self._key.name!r} has {most} requests open, its limit", 1)
        rate = self._key.requests_per_second
        if rate is not None:
            now = self._clock()
            self._level = min(self._level + (now - self._filled) * rate, self._size)
            self._filled = now
            if self._level < 1:
                wait = math.ceil((1 - self._level) / rate)
                raise _too_many(f"key {self._key.name!r} may ask {rate:g} times a second", wait)
            self._level -= 1
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1


def _too_many(message: str, wait_s: int) -> OverloadedError:
    return OverloadedError(message, "rate_limited", headers={"Retry-After": str(max(wait_s, 1))})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    return True


def is_loopback(host: str) -> bool:
    """Whether an address or a name can only mean this machine."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")
