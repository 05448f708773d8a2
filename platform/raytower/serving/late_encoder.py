"""An encoder that is loaded when a request first needs it: a server whose searches go by words may never need it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from raytower.errors import RaytowerError
from raytower.serving.calls import ServedModel
from raytower.serving.errors import NotReadyError
from raytower.serving.forwards import Lane
from raytower.serving.parts import Encoded, TextModel
from raytower.serving.work import Deadline


class LateEncoder:
    """Stands for an encoder; requests that need it wait for it within their own time.

    One that cannot be loaded is tried again with the next request.
    """

    def __init__(self, load: Callable[[], TextModel], unloaded: ServedModel) -> None:
        """`load` blocks; `unloaded` is what is known before, without the length of its texts."""
        self._load = load
        self._unloaded = unloaded
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raytower-load")
        self._loading: Future[TextModel] | None = None
        self._lock = threading.Lock()

    @property
    def served(self) -> ServedModel:
        model = self._loaded
        return self._unloaded if model is None else model.served

    def predict(self, texts: Sequence[str], lane: Lane) -> float:
        """Seconds of forward passes that the texts would take; 0 where nothing is known yet."""
        model = self._loaded
        return 0.0 if model is None else model.predict(texts, lane)

    async def encode(
        self,
        texts: Sequence[str],
        prefix: str,
        lane: Lane,
        deadline: Deadline,
        max_length: int | None = None,
    ) -> Encoded:
        """As the encoder's own. Raises OutOfTimeError, and NotReadyError where it cannot be loaded."""
        # Shielded: who gives up waiting takes it from nobody else.
        waiting = asyncio.shield(asyncio.wrap_future(self._begin()))
        try:
            model = await asyncio.wait_for(waiting, deadline.remaining_s())
        except TimeoutError:
            raise deadline.exceeded() from None
        except RaytowerError as error:
            raise NotReadyError(f"the encoder cannot be loaded: {error}") from error
        return await model.encode(texts, prefix, lane, deadline, max_length)

    def decode(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """As the encoder's own. Raises NotReadyError where it is not loaded yet: the caller's loop does not wait."""
        model = self._loaded
        if model is None:
            self._begin()
            raise NotReadyError(
                "the encoder, whose token ids these are, is being loaded; try again, or send texts",
                headers={"Retry-After": "1"},
            )
        return model.decode(token_ids)

    @property
    def _loaded(self) -> TextModel | None:
        loading = self._loading
        if loading is None or not loading.done() or loading.exception() is not None:
            return None
        return loading.result()

    def _begin(self) -> Future[TextModel]:
        with self._lock:
            failed = self._loading is not None and self._loading.done() and self._loading.exception()
            if self._loading is None or failed:
                self._loading = self._thread.submit(self._load)
            return self._loading
