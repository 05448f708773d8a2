"""Failures of storage, as errors that name the location, the reason and the remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from raytower.errors import InputError, RaytowerError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.EROFS)
_AWS_ERROR = re.compile(r"AWS Error (\w+)|HTTP status (\d+)|<Code>(\w+)")
_UNREACHABLE = ("NETWORK_CONNECTION", "REQUEST_TIMEOUT")
_NO_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket")
_DENIED = (
    "403",
    "ACCESS_DENIED",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "EXPIRED_TOKEN",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "INVALID_SIGNATURE",
    "MISSING_AUTHENTICATION_TOKEN",
    "SIGNATURE_DOES_NOT_MATCH",
    "UNRECOGNIZED_CLIENT",
)


class StorageError(RaytowerError, OSError):
    """Storage that failed or could not be reached; the message names the location."""


class StorageRefusedError(StorageError, InputError):
    """Storage that refuses a request: no permission, no such bucket, a file where a folder should be."""


@contextmanager
def explaining(place: object, *, only_full: bool = False) -> Iterator[None]:
    """Turn errors of a filesystem or the system into a StorageError about `place` (a Location or a path).

    With `only_full` only a full disk is turned. That is for blocks of callers, which may fail for other reasons.

    Raises:
        StorageError: in place of the error; StorageRefusedError if the user can correct the request.
    """
    try:
        yield
    except RaytowerError:
        raise
    except Exception as error:
        if not is_full(error) and (only_full or not isinstance(error, OSError)):
            raise
        raise as_storage_error(error, str(place)) from error


def as_storage_error(error: Exception, place: str) -> StorageError:
    """The error to raise for `error`: a StorageRefusedError if the user can correct the request."""
    detail = one_line(error)
    if is_full(error):
        return StorageError(f"no space is left for {place}: {detail}; make room there and run the job again")
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return StorageRefusedError(
            f"{place} cannot be used: {detail}; choose another place, or change its permissions"
        )
    found = _AWS_ERROR.search(detail)
    code = (found[found.lastindex or 0]) if found else ""
    if code in _UNREACHABLE:
        return StorageError(f"{place} cannot be reached: {detail}; check the endpoint and the network")
    if code in _DENIED:
        return StorageRefusedError(
            f"{place} refuses access: {detail}; check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "a profile) and what they permit"
        )
    if code in _NO_BUCKET or detail.startswith("Bucket '"):
        return StorageRefusedError(
            f"{place} is in a bucket that does not exist: {detail}; create it, or add allow_bucket_creation=true to "
            "the URI"
        )
    return StorageError(f"{place} failed: {detail}")


def is_full(error: Exception) -> bool:
    """Whether a disk or a quota is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # FAISS gives the system's error as text only, without its number.
    return os.strerror(errno.ENOSPC) in str(error)


def one_line(error: Exception) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())
