"""What operators ask of a server, with its refusals as HTTP says them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.serving.control import Control
from raytower.serving.errors import ApiError, ConflictError, UnprocessableError


class AdminRoutes:
    """A `control.Control` whose errors are ApiErrors: 422 for what cannot be served, 409 where nothing was changed."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def status(self) -> Mapping[str, Any]:
        return await _answered(self._control.status())

    async def reload(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        return await _answered(self._control.reload(wanted))

    async def rollback(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        return await _answered(self._control.rollback(wanted))


async def _answered(asked: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await asked
    except ApiError:
        raise
    except (InputError, FormatError) as error:
        raise UnprocessableError(str(error)) from error
    except RaytowerError as error:
        raise ConflictError(str(error)) from error
