"""Conditional writes on object stores, by the library obstore: pyarrow's filesystems have none.

The options are those of the Rust crate object_store, which Lance is built on too, so one table serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import quote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store
from pyarrow import fs as pafs

from raytower.errors import InputError
from raytower.storage.errors import as_storage_error

if TYPE_CHECKING:
    from obstore import UpdateVersion

Store: TypeAlias = S3Store | GCSStore | AzureStore
Options: TypeAlias = tuple[tuple[str, str], ...]

_CLIENT_OPTIONS = {"connect_timeout": "5s", "timeout": "30s"}
_RETRIES = {"max_retries": 2}


def scheme_and_options(filesystem: pafs.FileSystem, path: str) -> tuple[str, dict[str, str]]:
    """How object_store names the store behind a pyarrow filesystem: a scheme, and options without credentials.

    Raises:
        InputError: the storage has no conditional writes (hdfs).
    """
    if not isinstance(filesystem, (pafs.S3FileSystem, pafs.GcsFileSystem, pafs.AzureFileSystem)):
        raise InputError(
            f"{filesystem.type_name}://{path}: this storage cannot write under a condition, which an index needs; use "
            "a local disk, s3://, gs:// or abfs://"
        )
    # The state that a pickle carries is the one public way to a filesystem's options.
    state = filesystem.__reduce__()[1][0]
    if isinstance(filesystem, pafs.AzureFileSystem):
        return "az", {"azure_storage_account_name": state["account_name"]}
    is_s3, address = isinstance(filesystem, pafs.S3FileSystem), state["endpoint_override"]
    options = {
        "aws_endpoint" if is_s3 else "google_base_url": address and f"{state['scheme']}://{address}",
        "allow_http": state["scheme"] == "http",
        "aws_skip_signature" if is_s3 else "google_skip_signature": state["anonymous"],
        "aws_region": state.get("region"),
        "aws_virtual_hosted_style_request": state.get("force_virtual_addressing"),
    }
    given = {name: "true" if value is True else value for name, value in options.items() if value}
    return ("s3" if is_s3 else "gs"), given


def uri_and_options(filesystem: pafs.FileSystem, path: str) -> tuple[str, dict[str, str]]:
    scheme, options = scheme_and_options(filesystem, path)
    return f"{scheme}://{quote(path)}", options


def create(filesystem: pafs.FileSystem, path: str, content: bytes) -> bool:
    """Make an object where there is none; False where there is one."""
    return _put(filesystem, path, content, "create")


def replace(filesystem: pafs.FileSystem, path: str, content: bytes, etag: str) -> bool:
    """Replace the object that has this etag; False where it is another one or gone."""
    by_version = _version_key(filesystem) == "version"
    return _put(filesystem, path, content, {"version": etag} if by_version else {"e_tag": etag})


def _put(
    filesystem: pafs.FileSystem, path: str, content: bytes, mode: Literal["create"] | UpdateVersion
) -> bool:
    with _store(filesystem, path) as (store, key):
        try:
            obstore.put(store, key, content, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
        except FileNotFoundError as error:
            if mode == "create" or "NoSuchBucket" in str(error):
                raise
            return False
        return True


def read(filesystem: pafs.FileSystem, path: str) -> tuple[bytes, str] | None:
    """An object's content and etag, which belong together; None where there is none."""
    with _store(filesystem, path) as (store, key):
        try:
            found = obstore.get(store, key)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None
        return bytes(found.bytes()), str(found.meta[_version_key(filesystem)])


def etag(filesystem: pafs.FileSystem, path: str) -> str:
    """What every writing of an object changes: its etag, of Google's its generation.

    Raises:
        StorageError: there is no such object, or the store does not answer.
    """
    with _store(filesystem, path) as (store, key):
        return str(obstore.head(store, key)[_version_key(filesystem)])


def _version_key(filesystem: pafs.FileSystem) -> Literal["e_tag", "version"]:
    # Google's condition is on an object's generation, the others' on its etag.
    return "version" if isinstance(filesystem, pafs.GcsFileSystem) else "e_tag"


@contextmanager
def _store(filesystem: pafs.FileSystem, path: str) -> Iterator[tuple[Store, str]]:
    """The store and the key of a path; failures of the store inside the block become StorageErrors."""
    scheme, options = scheme_and_options(filesystem, path)
    bucket, _, key = path.partition("/")
    try:
        yield _open(scheme, bucket, tuple(sorted(options.items()))), key
    except (BaseError, OSError) as error:
        raise as_storage_error(error, f"{scheme}://{path}") from error


@lru_cache(maxsize=64)
def _open(scheme: str, bucket: str, options: Options) -> Store:
    kinds: dict[str, type[Store]] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    return kinds[scheme](bucket, config=dict(options), client_options=_CLIENT_OPTIONS, retry_config=_RETRIES)  # type: ignore[arg-type]
