"""The keys of a server, before anything starts."""

from __future__ import annotations

import hashlib
import os

from raytower.errors import InputError
from raytower.serving.config import ServeConfig

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def key_digest_of(config: ServeConfig) -> str | None:
    """The hexadecimal SHA-256 of the key to ask for; None asks for none.

    Raises:
        InputError: its variable is unset or empty, or there is no key on an address that others reach.
    """
    variable = config.security.key_env
    if variable is None:
        if config.host not in _LOOPBACK and not config.security.open:
            raise InputError(
                f"host {config.host!r} is reached from other machines, and no key is asked for; name one as "
                "api_key_env, or set security.open to serve everybody"
            )
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"api_key_env names {variable!r}, which is unset or empty; export the key in it or set api_key_env to null"
        )
    return hashlib.sha256(key.encode()).hexdigest()
