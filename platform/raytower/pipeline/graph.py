"""Which steps wait for which, and steps that run as soon as they may. Knows neither jobs nor files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

# What a step has to do, in any thread; what it returns is handed to `end`.
Work = Callable[[], Any]


@dataclass(frozen=True)
class Access:
    """The names of what a step reads and of what it writes or changes."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def waits(steps: Sequence[Access], touches: Callable[[str, str], bool]) -> list[frozenset[int]]:
    """For each step the positions of the earlier ones that have to end before it begins. Pure.

    A step waits for what writes where it reads or writes, and for what reads where it writes; so any order that
    follows this leaves what the given order does.

    Args:
        steps: in their order.
        touches: whether what is named first may lie, in whole or part, where the second is written.
    """
    return [
        frozenset(n for n, earlier in enumerate(steps[:number]) if _must_follow(step, earlier, touches))
        for number, step in enumerate(steps)
    ]


def _must_follow(step: Access, earlier: Access, touches: Callable[[str, str], bool]) -> bool:
    reads_it = any(touches(name, place) for name in (*step.reads, *step.writes) for place in earlier.writes)
    return reads_it or any(touches(name, place) for name in earlier.reads for place in step.writes)


def run_graph(
    waits: Sequence[Set[int]],
    parallel: int,
    begin: Callable[[int], Work | None],
    end: Callable[[int, Any], None],
    *,
    stop: Callable[[], None] = lambda: None,
) -> Mapping[int, Exception]:
    """Run steps as soon as all that they wait for has ended, at most `parallel` at once, earlier ones first.

    With `parallel` 1 they run in this thread in their order, up to the first that fails. With more, each runs in a
    thread of its own, and one that fails keeps back only those that wait for it.

    Args:
        waits: for each step the positions of the earlier ones that it waits for.
        begin: says what a step has to do, None where nothing; called in this thread when the step's turn has come.
        end: takes what a step has returned, in this thread.
        stop: called where something other than a step's error (Ctrl-C, say) ends this: steps that are at work have to
            end soon then.

    Returns:
        by position what each failed step has raised.
    """
    if parallel == 1:
        return _run_in_order(len(waits), begin, end)
    ended: set[int] = set()
    failed: dict[int, Exception] = {}
    running: dict[Future[Any], int] = {}
    waiting = list(range(len(waits)))
    with ThreadPoolExecutor(parallel, thread_name_prefix="raytower-step") as pool:
        try:
            while True:
                # A step that has nothing to do may set free an earlier one than the next.
                while len(running) < parallel:
                    free = next((number for number in waiting if waits[number] <= ended), None)
                    if free is None:
                        break
                    waiting.remove(free)
                    try:
                        work = begin(free)
                    except Exception as error:
                        failed[free] = error
                        continue
                    if work is None:
                        ended.add(free)
                    else:
                        running[pool.submit(work)] = free
                if not running:
                    return failed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    try:
                        end(number, future.result())
                        ended.add(number)
                    except Exception as error:
                        failed[number] = error
        except BaseException:
            stop()
            raise


def _run_in_order(
    count: int, begin: Callable[[int], Work | None], end: Callable[[int, Any], None]
) -> Mapping[int, Exception]:
    for number in range(count):
        try:
            work = begin(number)
            if work is not None:
                end(number, work())
        except Exception as error:
            return {number: error}
    return {}
