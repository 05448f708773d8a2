"""The keys of a server, read before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from raytower.serving.config import ServeConfig
from raytower.serving.http.security import Key, check_security, load_keys

# As JSON: name, sha256 (hexadecimal), admin, and limits.
StoredKey = dict[str, Any]


def keys_of(config: ServeConfig) -> list[StoredKey]:
    """The keys to ask for, hashed, as plain values that go to replicas; none asks for none.

    Raises:
        InputError: a variable is unset or empty, a file cannot be read, or there is no key on an address that others
            reach.
    """
    check_security(config)
    return [key.model_dump(mode="json") for key in load_keys(config.security, dict(os.environ))]


def read_keys(values: Sequence[StoredKey]) -> list[Key]:
    """What `keys_of` gave."""
    return [Key.model_validate(value) for value in values]
