"""Checks of a file's first bytes before it is parsed, because a file may be other than its name says."""

from __future__ import annotations

import re

from raytower.data.sources import SourceFile
from raytower.errors import InputError

# The first bytes, what such a file is, and the remedy.
_OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer",
        "fetch its content with `git lfs pull`",
    ),
    (b"/annex/objects/", "a git-annex pointer", "fetch its content with `git annex get`"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "write it as UTF-8: `iconv -f UTF-32 -t UTF-8`"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "write it as UTF-8: `iconv -f UTF-32 -t UTF-8`"),
    (b"\xff\xfe", "UTF-16 text", "write it as UTF-8: `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "UTF-16 text", "write it as UTF-8: `iconv -f UTF-16 -t UTF-8`"),
    (b"PK\x03\x04", "a zip archive (.xlsx is one too)", "unpack it, or save the sheet as .csv"),
    (b"\x1f\x8b", "compressed with gzip", "give it the extension .gz after its own, or unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "give it the extension .zst after its own, or unpack it"),
    (b"BZh", "compressed with bzip2", "unpack it"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"SQLite format 3\x00", "an SQLite database", "export its table as .csv"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as .csv"),
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"\x93NUMPY", "a NumPy array", "give a file of texts"),
    (b"Obj\x01", "an Avro file", "convert it to Parquet"),
    (b"ORC", "an ORC file", "convert it to Parquet"),
)
_HTML = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html[\s>])", re.IGNORECASE)
_TAR_MARK = slice(257, 262)
# Text holds a stray NUL at most. UTF-16 without a byte order mark has one in every second byte of ASCII text.
_MAX_NUL_SHARE = 0.1
_MAX_NULS = 3
_MIN_FOREIGN_LINES = 3


def binary_format(head: bytes) -> str | None:
    """`parquet` or `arrow` where a file that begins with `head` is one."""
    if head.startswith(b"PAR1"):
        return "parquet"
    # Arrow's file format, and its stream format: a continuation mark and the length of the schema.
    is_stream = head.startswith(b"\xff\xff\xff\xff") and 0 < int.from_bytes(head[4:8], "little") < 2**24
    return "arrow" if head.startswith(b"ARROW1\x00\x00") or is_stream else None


def refuse_other_file(file: SourceFile, head: bytes) -> None:
    """Raise InputError where `head`, the decompressed first bytes of `file`, shows another kind of file (zip, say)."""
    for mark, what, remedy in _OTHER_FILES:
        if head.startswith(mark):
            # A mark of letters alone (ORC, BZh) may also begin a text; a NUL byte proves that it does not.
            if mark.isalpha() and b"\x00" not in head:
                continue
            raise InputError(f"{file} is {what}, whatever its name says; {remedy}")
    if head[_TAR_MARK] == b"ustar":
        raise InputError(f"{file} is a tar archive, whatever its name says; unpack it")


def refuse_other_text(file: SourceFile, head: bytes) -> None:
    """Raise InputError where `head` is not the beginning of UTF-8 text with lines that end in newline characters."""
    if _HTML.match(head):
        raise InputError(f"{file} is an HTML page, perhaps of an error at download; fetch the file again")
    if head.count(0) > max(_MAX_NUL_SHARE * len(head), _MAX_NULS):
        raise InputError(
            f"{file} is no UTF-8 text: {head.count(0)} of its first {len(head)} bytes are NUL; UTF-16 is made UTF-8 by "
            "`iconv -f UTF-16LE -t UTF-8`"
        )
    lines = {line for line in head.split(b"\n")[:-1] if not line.isascii()}
    if len(lines) >= _MIN_FOREIGN_LINES and not any(is_utf8(line) for line in lines):
        raise InputError(
            f"{file} is no UTF-8 text: none of its first {len(lines)} non-ASCII lines is UTF-8; if it "
            "is GBK, `iconv -f GB18030 -t UTF-8` makes it UTF-8"
        )
    if b"\r" in head.rstrip(b"\r\n") and b"\n" not in head:
        raise InputError(
            f"{file} ends its lines with carriage returns alone, as old Macs did; `tr '\\r' '\\n'` makes them newlines"
        )


def is_utf8(text: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
