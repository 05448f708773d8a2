"""What a process of its own holds of generations, by their ids: the part of `control.Holder` that all such share."""

from __future__ import annotations

from typing import Generic, TypeVar

from raytower.serving.errors import NotReadyError

HeldT = TypeVar("HeldT")


class Prepared(Generic[HeldT]):
    """What was prepared of each generation, until it is dropped."""

    def __init__(self) -> None:
        self._prepared: dict[str, HeldT] = {}

    def held(self) -> frozenset[str]:
        return frozenset(self._prepared)

    def activate(self, generation_id: str) -> None:
        """Requests name the generation that they are for, so nothing has to be done."""

    def drop(self, generation_id: str) -> None:
        self._prepared.pop(generation_id, None)

    def _of(self, generation_id: str) -> HeldT:
        """Raises NotReadyError where the generation is not held here."""
        if generation_id not in self._prepared:
            raise NotReadyError(
                f"generation {generation_id} is not prepared here; try again", headers={"Retry-After": "1"}
            )
        return self._prepared[generation_id]
