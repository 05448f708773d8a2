"""Storage by URI through pyarrow filesystems: local paths, file://, s3://, gs://, hdfs://.

Nothing half-written is ever visible: a file is written beside its name, flushed to disk and renamed; an object appears
when its upload is complete. A failure of the storage becomes one message that names the location.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from raytower.errors import FormatError, InputError
from raytower.storage import local, objects, s3
from raytower.storage.errors import as_storage_error, explaining

_COPY_BYTES = 4 * 1024 * 1024
# A read from an object store is one request: fewer and larger ones hide its latency.
_DOWNLOAD_BYTES = 16 * 1024 * 1024
_UPLOAD_BYTES = 64 * 1024 * 1024
_LISTING_ATTEMPTS = 5
_CACHE_BYTES = 50 * 2**30
# When a cached file was last written, as we set it once its checksum is proven: whoever writes it sets another time.
_PROVEN_NS = 0
_JUST_FETCHED_SECONDS = 600.0
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_ACCOUNT_KEY, or a managed identity",
    "abfss": "AZURE_STORAGE_ACCOUNT_KEY, or a managed identity",
}
# A folder that holds one of these counts as complete.
_WRITTEN_LAST = ("raytower.json", "shard.json", "manifest.json")


@dataclass(frozen=True)
class Location:
    """A file or folder in some filesystem. Children are made with `/`, never by joining strings."""

    filesystem: pafs.FileSystem
    path: str

    @staticmethod
    def of(uri: str | os.PathLike[str] | Location) -> Location:
        """Parse a URI or a local path.

        Raises:
            InputError: the URI's scheme or options are not known, or it holds credentials.
            StorageError: AWS was asked for a bucket's region and did not answer.
        """
        if isinstance(uri, Location):
            return uri
        text = os.fspath(uri)
        if "://" not in text:
            return Location(pafs.LocalFileSystem(), str(Path(os.path.expanduser(text)).absolute()))
        _refuse_credentials(text)
        try:
            if text.startswith(s3.PREFIX):
                return Location(*s3.open_s3(text))
            # pyarrow takes only URIs of plain ASCII without spaces.
            return Location(*pafs.FileSystem.from_uri(quote(text, safe="%/:?#[]@!$&'()*+,;=~")))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"storage URI {text!r} cannot be opened: {error}") from error
        except OSError as error:
            raise as_storage_error(error, text) from error

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, str(PurePosixPath(self.path) / name))

    def __str__(self) -> str:
        """The local path, or a URI from which `of` finds the same place in any process."""
        if self.is_local:
            return self.path
        if isinstance(self.filesystem, pafs.S3FileSystem):
            return s3.s3_uri(self.filesystem, self.path)
        return _remote_uri(self.filesystem, self.path)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> Location:
        return Location(self.filesystem, str(PurePosixPath(self.path).parent))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def local_path(self) -> Path:
        """The path on this machine. Raises FormatError for remote storage."""
        if not self.is_local:
            raise FormatError(f"{self} is remote storage; this step needs a local path")
        return Path(self.path)

    def info(self) -> pafs.FileInfo:
        with explaining(self):
            return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        return self.info().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        return self.info().type == pafs.FileType.File

    def is_dir(self) -> bool:
        return self.info().type == pafs.FileType.Directory

    def size_bytes(self) -> int:
        return int(self.info().size)

    def children(self) -> list[Location]:
        """Entries of this directory in name order; empty where it does not exist."""
        return [Location(self.filesystem, info.path) for info in self.infos()]

    def infos(self, recursive: bool = False) -> list[pafs.FileInfo]:
        """As `children`, with size and time of each."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        with explaining(self):
            return sorted(self._entries(selector), key=lambda info: info.path)

    def _entries(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        # A race in pyarrow: it opens the directory, and if that fails it looks whether the directory exists. If another
        # process makes it in between, pyarrow says that it exists and cannot be listed. The next try succeeds.
        for _ in range(_LISTING_ATTEMPTS - 1):
            try:
                return list(self.filesystem.get_file_info(selector))
            except FileNotFoundError:
                continue
        return list(self.filesystem.get_file_info(selector))

    def make_dir(self) -> Location:
        with explaining(self):
            if self.is_local:
                local.make_dirs(Path(self.path))
            else:
                self.filesystem.create_dir(self.path, recursive=True)
        return self

    def delete(self) -> None:
        """Remove this file or directory tree; nothing happens where there is none."""
        kind = self.info().type
        with explaining(self):
            if kind == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind == pafs.FileType.File:
                self.filesystem.delete_file(self.path)

    def open_read(self) -> pa.NativeFile:
        """A seekable stream of the file's bytes. Raises InputError where there is no such file."""
        if self.is_local and not self.is_file():
            raise InputError(f"no file at {self}; check the path")
        with explaining(self):
            try:
                return self.filesystem.open_input_file(self.path)
            except FileNotFoundError as error:
                raise InputError(f"no file at {self}; check the path") from error

    def read_bytes(self) -> bytes:
        with self.open_read() as stream, explaining(self):
            return bytes(stream.read())

    def read_json(self) -> Any:
        """Raises InputError where the file is missing, FormatError where it holds no JSON."""
        try:
            return json.loads(self.read_bytes())
        except ValueError as error:
            raise FormatError(f"{self} is not valid JSON: {error}") from error

    @contextmanager
    def open_write(self) -> Iterator[pa.NativeFile | IO[bytes]]:
        """Write a whole file: the name appears only when the block ends without an exception.

        Raises:
            StorageError: the place cannot be written, or has no space left.
        """
        if not self.is_local:
            # pyarrow completes an upload even after an exception, so the bytes are gathered on this machine first.
            with _spool(self) as folder:
                gathered = folder / "content"
                with open(gathered, "wb") as stream:
                    yield stream
                self.move_from_local(gathered)
            return
        beside = local.beside(Path(self.path))
        try:
            with explaining(self):
                self.parent.make_dir()
                stream = open(beside, "wb")  # noqa: SIM115
            # close() writes too, so its errors must be explained as well.
            with explaining(self, only_full=True), stream:
                yield stream
            self.move_from_local(beside)
        finally:
            beside.unlink(missing_ok=True)

    def write_bytes(self, content: bytes) -> None:
        with self.open_write() as stream:
            stream.write(content)

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n")

    def put_if_absent(self, content: bytes) -> bool:
        """Make this file where there is none. Of several callers at once, one gets True and the others False.

        After a StorageError it is unknown whether the file was made.
        """
        if self.is_local:
            with explaining(self):
                return local.create_file(Path(self.path), content)
        return objects.create(self.filesystem, self.path, content)

    def lance_uri(self) -> tuple[str, dict[str, str]]:
        """The uri and the storage_options by which Lance opens a dataset here."""
        return (self.path, {}) if self.is_local else objects.uri_and_options(self.filesystem, self.path)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def prove(self, sha256: str, remedy: str) -> None:
        """Raises FormatError where this file is missing or has another checksum."""
        if not self.is_file():
            raise FormatError(f"{self} is missing; {remedy}")
        self.prove_content(self.sha256(), sha256, remedy)

    def prove_content(self, found: str, sha256: str, remedy: str) -> None:
        """Raises FormatError where the checksum that this file was found to have is another than is expected."""
        if found != sha256:
            raise FormatError(
                f"{self} has sha256 {found[:12]}…, its manifest says {sha256[:12]}…: it was changed; {remedy}"
            )

    def _chunks(self) -> Iterator[bytes]:
        with self.open_read() as stream:
            while chunk := self.read_chunk(stream):
                yield chunk

    def read_chunk(self, stream: pa.NativeFile) -> bytes:
        """What comes next in a stream of this file, as much as one request should ask for; nothing at its end."""
        with explaining(self):
            return bytes(stream.read(_COPY_BYTES if self.is_local else _DOWNLOAD_BYTES))

    def move_from_local(self, source: Path) -> None:
        """Put a finished local file here: a rename where both are local, an upload otherwise."""
        with explaining(self):
            if self.is_local:
                self.parent.make_dir()
                local.fsync_dir(source)
                os.replace(source, self.path)
                local.fsync_dir(Path(self.path).parent)
                return
            self._upload(source)
            source.unlink()

    def _upload(self, source: Path) -> None:
        stream = self.filesystem.open_output_stream(self.path)
        try:
            with open(source, "rb") as content:
                while chunk := content.read(_UPLOAD_BYTES):
                    stream.write(chunk)
                    # pyarrow sends all parts at once in the background; waiting for them bounds their memory.
                    stream.flush()
        except BaseException:
            _abandon(stream)
            raise
        stream.close()

    def fetch(self, cache_dir: Path, sha256: str, size_bytes: int) -> Path:
        """A local copy of this file: a local file itself, unchecked; otherwise a download, kept under its checksum.

        A download is kept only if it has this checksum. An earlier one is used again if its size is right and nobody
        has written it since; if somebody has, as its time says, its checksum is computed anew. Any number of processes
        may fetch one file: one downloads, the others wait.

        Raises:
            InputError: there is no such file. FormatError: its content has another checksum.
            StorageError: the storage failed, or the cache has no space left.
        """
        if self.is_local:
            return Path(self.path)
        target = cache_dir / sha256[:2] / f"{sha256}-{self.name}"
        with local.locked(target.with_name(f"{target.name}.lock")):
            if not _is_whole(target, sha256, size_bytes):
                self._download(target, sha256)
                _evict(cache_dir)
            # Read now, so it is not among the next to be evicted; as for writing, that would change the mark.
            os.utime(target, ns=(time.time_ns(), _PROVEN_NS))
        return target

    def _download(self, target: Path, sha256: str) -> None:
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            leftover.unlink()  # a killed process left it; nobody else downloads while this one has the lock
        digest = hashlib.sha256()
        with Location.of(target).open_write() as sink:
            for chunk in self._chunks():
                digest.update(chunk)
                sink.write(chunk)
            if digest.hexdigest() != sha256:
                raise FormatError(
                    f"{self} has sha256 {digest.hexdigest()[:12]}…, {sha256[:12]}… was expected: it was changed, or "
                    "damaged on its way; nothing was kept"
                )


def absolute_if_local(name: str) -> str:
    """`name` in a form by which every worker finds the same thing.

    Workers run in directories of their own, so a path on this machine becomes absolute. They may have another
    environment, so an s3:// URI gets its endpoint and region. Anything else (a hub id, say) stays as it is.
    """
    if name.startswith(s3.PREFIX):
        return str(Location.of(name))
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if "://" not in name and path.exists() else name


def cache_dir() -> Path:
    """Where this machine keeps fetched files and exported ONNX graphs: $RAYTOWER_CACHE, else ~/.cache/raytower."""
    return Path(os.environ.get("RAYTOWER_CACHE", Path.home() / ".cache" / "raytower"))


def _is_whole(file: Path, sha256: str, size_bytes: int) -> bool:
    """Whether a file of the cache is there as it was downloaded."""
    if not file.is_file() or file.stat().st_size != size_bytes:
        return False
    return file.stat().st_mtime_ns == _PROVEN_NS or Location.of(file).sha256() == sha256


def _evict(cache: Path) -> None:
    """Remove the files that were not used for longest, until the cache keeps to $RAYTOWER_CACHE_BYTES.

    A file fetched moments ago stays, because its process may not have opened it yet. An open or mapped file may be
    removed, because its bytes stay until it is closed.
    """
    given = os.environ.get("RAYTOWER_CACHE_BYTES", str(_CACHE_BYTES))
    if not given.isdecimal():
        raise InputError(f"RAYTOWER_CACHE_BYTES is {given!r}; it is a whole number of bytes")
    used = []
    for path in cache.glob("[0-9a-f][0-9a-f]/[!.]*"):
        with suppress(FileNotFoundError):  # another process evicts too
            status = path.stat()
            used.append((status.st_atime, status.st_size, path))
    excess = sum(size for _, size, _ in used) - int(given)
    for when, size, path in sorted(used):
        if excess <= 0 or when > time.time() - _JUST_FETCHED_SECONDS:
            return
        if path.suffix != ".lock":
            path.unlink(missing_ok=True)
            excess -= size


def _refuse_credentials(uri: str) -> None:
    parts = urlsplit(uri, allow_fragments=False)
    secret = re.search(r"(?:^|&)(account_key|client_secret|sas_token|sig)=", parts.query)
    if not (secret or parts.password is not None or (parts.scheme == "s3" and parts.username)):
        return
    where = f"{parts.scheme}://{'…@' if parts.username else ''}{parts.hostname}{parts.path}"
    raise InputError(
        f"{where} holds credentials, which would end up in manifests and logs; leave them out of the URI and set "
        f"{_CREDENTIALS.get(parts.scheme, 'them where the client of that storage looks for them')}"
    )


def _remote_uri(filesystem: pafs.FileSystem, path: str) -> str:
    """A URI without credentials from which pyarrow makes an equal filesystem."""
    state = filesystem.__reduce__()[1][0]
    escaped = quote(path, safe="/")
    if isinstance(filesystem, pafs.GcsFileSystem):
        options = [f"{name}={state[name]}" for name in ("endpoint_override", "scheme") if state[name]]
        who = "anonymous@" if state["anonymous"] else ""
        return f"gs://{who}{escaped}" + (f"?{'&'.join(options)}" if options else "")
    if isinstance(filesystem, pafs.AzureFileSystem):
        return f"abfs://{state['account_name']}@{escaped}"
    return f"{filesystem.type_name}://{path}"


@contextmanager
def publish_directory(target: Location) -> Iterator[Path]:
    """Yield an empty local directory, and put its content at `target` if the block ends without an exception.

    On local storage the directory appears by one rename. On remote storage `raytower.json`, `shard.json` and
    `manifest.json` are uploaded last, and those of an older directory at that place are removed first, so that a
    reader that asks for them never sees half a directory.

    Raises:
        StorageError: the place cannot be written, or has no space left.
    """
    if not target.is_local:
        with _spool(target) as folder:
            yield folder
            _upload_directory(folder, target)
        return
    # Follow a link to its folder: an output may lie on another disk, and a rename works within one disk.
    path = Path(os.path.realpath(target.path))
    beside, old = local.beside(path), local.beside(path, "old")
    try:
        with explaining(target):
            local.make_dirs(path.parent)
            beside.mkdir()
        with explaining(target, only_full=True):
            yield beside
            for file in filter(Path.exists, (beside, *beside.rglob("*"))):
                local.fsync_dir(file)
        with explaining(target):
            if path.exists() and not local.exchange(beside, path):
                os.rename(path, old)
            if not path.exists():
                os.rename(beside, path)
            local.fsync_dir(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if path.exists():  # otherwise `old` is the only copy left
            shutil.rmtree(old, ignore_errors=True)


def _upload_directory(folder: Path, target: Location) -> None:
    """Replace what is at `target` by the files of `folder`; _WRITTEN_LAST are removed first and uploaded last."""
    files = (file for file in folder.rglob("*") if file.is_file())
    places = {(target / file.relative_to(folder).as_posix()).path: file for file in files}

    def last(path: str) -> tuple[bool, str]:
        return PurePosixPath(path).name in _WRITTEN_LAST, path

    there = [info.path for info in target.infos(recursive=True) if info.type == pafs.FileType.File]
    for path in sorted(there, key=last, reverse=True):
        if last(path)[0] or path not in places:
            Location(target.filesystem, path).delete()
    for path in sorted(places, key=last):
        Location(target.filesystem, path).move_from_local(places[path])


@contextmanager
def _spool(target: Location) -> Iterator[Path]:
    """A temporary local folder in which the files for remote `target` are gathered."""
    with tempfile.TemporaryDirectory(prefix="raytower-") as name:
        what = f"{name}, where {target} is gathered before its upload (set TMPDIR to a larger disk)"
        with explaining(what, only_full=True):
            yield Path(name)


def _abandon(stream: pa.NativeFile) -> None:
    """Keep an upload from ever completing. Closing or destroying the stream would complete it with half a file.

    pyarrow cannot abort an upload, so the stream is never destroyed; it holds at most one buffer.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))
