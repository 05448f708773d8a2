"""What operators are answered where a change is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.serving.control import SwapRefusedError
from raytower.serving.errors import ApiError
from raytower.serving.http.admin import AdminRoutes


class Failing:
    """A control that raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def status(self) -> dict[str, Any]:
        return {"epoch": 1}

    async def reload(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        raise self.error

    rollback = reload


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("no such version"), 422, "invalid_value"),
        (FormatError("no such version"), 422, "invalid_value"),
        (SwapRefusedError("no such version"), 409, "not_changed"),
        (RaytowerError("no such version"), 409, "not_changed"),
    ],
)
def test_a_refusal_has_its_status(error: Exception, status: int, code: str) -> None:
    control = AdminRoutes(Failing(error))
    for call in (control.reload({}), control.rollback({})):
        with pytest.raises(ApiError, match="no such version") as caught:
            asyncio.run(call)  # type: ignore[arg-type]
        assert (caught.value.status, caught.value.code) == (status, code)
    assert asyncio.run(control.status()) == {"epoch": 1}  # type: ignore[arg-type]
