"""The keys of a server, read before anything starts."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from raytower.errors import InputError
from raytower.serving.config import ServeConfig

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# As JSON: name, sha256 (hexadecimal), admin.
StoredKey = dict[str, Any]


def keys_of(config: ServeConfig) -> list[StoredKey]:
    """The keys that requests may bring, hashed; none asks for none.

    Raises:
        InputError: a variable is unset or empty, or there is no key on an address that others reach.
    """
    security = config.security
    if not security.has_keys and config.host not in _LOOPBACK and not security.open:
        raise InputError(
            f"host {config.host!r} is reached from other machines, and no key is asked for; name one as api_key_env, "
            "or set security.open to serve everybody"
        )
    variables = {security.key_env: False, security.admin_key_env: True}
    return [_key(name, admin) for name, admin in variables.items() if name is not None]


def _key(variable: str, admin: bool) -> StoredKey:
    text = os.environ.get(variable, "").strip()
    if not text:
        raise InputError(
            f"the key's variable {variable!r} is unset or empty; export the key in it, or name none (api_key_env, "
            "security.admin_key_env)"
        )
    return {"name": variable, "sha256": hashlib.sha256(text.encode()).hexdigest(), "admin": admin}
