"""The token that every Ray process of a cluster asks for: made on the machine that runs `ray up`, in no repository.

Its form and its place are Ray's own, so that `ray job submit` finds it too.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from raytower.cluster.config import ClusterInitConfig
from raytower.errors import InputError

_OTHERS = 0o077
_BYTES = 32


def init_cluster(config: ClusterInitConfig) -> dict[str, Any]:
    """Make the token unless there is one, readable by its owner alone.

    Raises:
        InputError: the token that is there is empty or others may read it, or the file cannot be written.
    """
    plan = plan_init(config)
    if not plan["made"]:
        return plan
    place = Path(plan["token_file"])
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(place, secrets.token_hex(_BYTES))
    except OSError as error:
        raise InputError(
            f"token_file: {place} cannot be written ({error.strerror}); name one in a folder of yours by --token_file"
        ) from error
    return plan


def _write(place: Path, token: str) -> None:
    """Beside it and whole before it has the name: whoever reads it finds the old token or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".auth_token", delete=False) as file:
        try:
            file.write(token)
            file.flush()
            os.replace(file.name, place)
        except OSError:
            os.unlink(file.name)
            raise


def plan_init(config: ClusterInitConfig) -> dict[str, Any]:
    """Whether a token would be made, and where.

    Raises:
        InputError: the token that is there is empty, is no file, or others may read it.
    """
    place = Path(os.path.expanduser(config.token_file)).absolute()
    if config.replace or not place.exists():
        return {"token_file": str(place), "made": True}
    if not place.is_file() or not place.read_bytes().strip():
        raise InputError(f"token_file: {place} holds no token; --replace writes one")
    mode = place.stat().st_mode & 0o777
    if mode & _OTHERS:
        raise InputError(
            f"token_file: others may read {place} (mode {mode:o}, not 600), and whoever has read it may run commands "
            "on the cluster; --replace makes a new token, `chmod 600` keeps this one"
        )
    return {"token_file": str(place), "made": False}
