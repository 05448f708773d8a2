"""One job at a time on an output: the lock that trainings, encodings and jobs from file to file share."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from raytower.errors import InputError, RaytowerError
from raytower.progress import log
from raytower.storage import Lease, Location, StorageError, writer_lease


@contextmanager
def only_job(
    place: Location,
    output: str,
    *,
    owner: str = "a job",
    doing: str = "written by another job",
    wait_seconds: float = 0.0,
) -> Iterator[Lease | None]:
    """Refuse a second job on an output while one is at work: they would share or replace what they write.

    Args:
        place: where the lock lies.
        output: how messages call the output.
        owner: how the message of a second job calls the one that holds the lock.
        doing: what the output is being, for that message.
        wait_seconds: how long the other job may take to end.

    Yields:
        the lease; None where the storage cannot tell, which is logged.

    Raises:
        InputError: another job holds the lock. StorageError: the storage fails.
    """
    with ExitStack() as stack:
        lease = None
        try:
            named = f"{owner} (process {os.getpid()} on {socket.gethostname()})"
            lease = stack.enter_context(writer_lease(place, owner=named, wait_seconds=wait_seconds))
        except StorageError:
            raise
        except InputError:  # hdfs and some network drives: neither locks nor conditional writes
            log(f"warning: {output} cannot be locked; start no second job on it")
        except RaytowerError as error:
            raise InputError(
                f"output {output!r} is being {doing}: {error}; or choose another output"
            ) from error
        yield lease
