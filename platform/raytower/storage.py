"""Storage by URI through pyarrow filesystems: local paths, file://, s3://, gs://, hdfs://.

Nothing half-written is ever visible: a file is written beside its name, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
from pyarrow import fs as pafs

from raytower.errors import FormatError, InputError

_COPY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Location:
    """A place in a filesystem. Child places are made with `/`, never by joining strings."""

    filesystem: pafs.FileSystem
    path: str

    @staticmethod
    def of(uri: str | os.PathLike[str] | Location) -> Location:
        """Parse a URI or a local path.

        Raises:
            InputError: the URI's scheme is not one that pyarrow knows.
        """
        if isinstance(uri, Location):
            return uri
        text = os.fspath(uri)
        if "://" not in text:
            return Location(pafs.LocalFileSystem(), str(Path(text).expanduser().absolute()))
        try:
            filesystem, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise InputError(f"storage URI {text!r} cannot be opened: {error}") from error
        return Location(filesystem, path)

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, str(PurePosixPath(self.path) / name))

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

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
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        return self.info().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        return self.info().type == pafs.FileType.File

    def is_dir(self) -> bool:
        return self.info().type == pafs.FileType.Directory

    def size_bytes(self) -> int:
        return int(self.info().size)

    def children(self, recursive: bool = False) -> list[Location]:
        """Entries of this directory in name order; empty where it does not exist."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        infos = sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)
        return [Location(self.filesystem, info.path) for info in infos]

    def make_dir(self) -> Location:
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def delete(self) -> None:
        """Remove this file or directory tree; nothing happens where there is none."""
        kind = self.info().type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def open_read(self) -> pa.NativeFile:
        """A seekable stream of the file's bytes. Raises InputError where there is no such file."""
        if not self.is_file():
            raise InputError(f"no file at {self}; check the path")
        return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        with self.open_read() as stream:
            return bytes(stream.read())

    def read_json(self) -> Any:
        """Raises InputError where the file is missing, FormatError where it holds no JSON."""
        try:
            return json.loads(self.read_bytes())
        except ValueError as error:
            raise FormatError(f"{self} is not valid JSON: {error}") from error

    @contextmanager
    def open_write(self) -> Iterator[pa.NativeFile | IO[bytes]]:
        """Write a whole file: the name appears only when the block ends without an exception."""
        if self.is_local:
            self.make_parent()
            beside = Path(self.path).with_name(f".{self.name}.{uuid.uuid4().hex}.tmp")
            try:
                with open(beside, "wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(beside, self.path)
                fsync_dir(Path(self.path).parent)
            finally:
                beside.unlink(missing_ok=True)
            return
        # Object stores show an object only once its upload has completed: no rename is needed (or cheap).
        # An exception must not complete the upload, so the bytes are spooled locally first.
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            with self.filesystem.open_output_stream(self.path) as stream:
                shutil.copyfileobj(spool, stream, _COPY_BYTES)

    def write_bytes(self, content: bytes) -> None:
        with self.open_write() as stream:
            stream.write(content)

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n")

    def make_parent(self) -> None:
        self.parent.make_dir()

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with self.open_read() as stream:
            while chunk := stream.read(_COPY_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def move_from_local(self, source: Path) -> None:
        """Put a finished local file at this place: a rename where both are local, an upload otherwise."""
        if self.is_local:
            self.make_parent()
            with open(source, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(source, self.path)
            fsync_dir(Path(self.path).parent)
            return
        with open(source, "rb") as stream, self.filesystem.open_output_stream(self.path) as sink:
            shutil.copyfileobj(stream, sink, _COPY_BYTES)
        source.unlink()

    def fetch(self, cache_dir: Path, sha256: str) -> Path:
        """A local copy of this file: itself where it is local, else a download kept under its checksum."""
        if self.is_local:
            return Path(self.path)
        target = cache_dir / sha256[:2] / f"{sha256}-{self.name}"
        if not target.exists():
            with self.open_read() as stream, Location.of(target).open_write() as sink:
                while chunk := stream.read(_COPY_BYTES):
                    sink.write(chunk)
        return target


def absolute_if_local(name: str) -> str:
    """`name` as an absolute path where it is something on this machine, else (a hub id, a URI) as it is.

    Workers run in directories of their own, so a relative path must not travel to them.
    """
    path = Path(name).expanduser()
    return str(path.absolute()) if "://" not in name and path.exists() else name


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publish_directory(target: Location) -> Iterator[Path]:
    """Yield an empty local directory and put its content at `target` when the block ends well.

    On local storage the directory appears by one rename. On remote storage files are uploaded in name order with
    `raytower.json` or `manifest.json` last, so that a reader that asks for those never sees half a directory.
    """
    if target.is_local:
        target.make_parent()
        beside = Path(target.path).with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        old = Path(target.path).with_name(f".{target.name}.{uuid.uuid4().hex}.old")
        beside.mkdir()
        try:
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as stream:
                        os.fsync(stream.fileno())
            if Path(target.path).exists():
                os.rename(target.path, old)
            os.rename(beside, target.path)
            fsync_dir(Path(target.path).parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        last = {"raytower.json", "manifest.json"}
        files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (f.name in last, str(f)))
        for file in files:
            place = target
            for part in file.relative_to(folder).parts:
                place = place / part
            place.move_from_local(file)
