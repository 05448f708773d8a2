"""Small files for the tests of the readers, and what is read from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raytower.data.config import InputConfig
from raytower.data.pieces import Survey, read_piece, survey
from raytower.data.records import RecordKind

Row = dict[str, Any]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, rows: Iterable[Any], ensure_ascii: bool = False) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows))


def survey_of(path: Path | str, kind: RecordKind, rows_per_piece: int = 8192, **settings: Any) -> Survey:
    """Survey `path`; settings are those of InputConfig."""
    return survey(InputConfig(path=str(path), **settings), kind, rows_per_piece, "fail")


def quarantined(
    path: Path | str, kind: RecordKind, folder: Path, **settings: Any
) -> tuple[Survey, list[Row]]:
    """Survey `path` with on_error quarantine; also the entries of the quarantine file."""
    surveyed = survey(InputConfig(path=str(path), **settings), kind, 3, "quarantine", str(folder))
    if surveyed.quarantine_file is None:
        return surveyed, []
    lines = Path(surveyed.quarantine_file).read_bytes().removesuffix(b"\n").split(b"\n")
    return surveyed, [json.loads(line) for line in lines]


def rows_of(surveyed: Survey) -> list[Row]:
    """All rows, piece by piece."""
    return [row for piece in surveyed.pieces for row in read_piece(piece).to_pylist()]


def read(path: Path | str, kind: RecordKind, **settings: Any) -> list[Row]:
    return rows_of(survey_of(path, kind, **settings))


def beir_folder(folder: Path) -> Path:
    """Three documents, two queries, and judgements for the splits train and test."""
    write_jsonl(
        folder / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Tea", "text": "green\u2028leaves"},
            {"_id": "d2", "title": "only a title", "text": ""},
            {"_id": "d3", "title": "", "text": "三号文档"},
        ],
    )
    write_jsonl(
        folder / "queries.jsonl", [{"_id": "q1", "text": "what is tea"}, {"_id": "q2", "text": "问题"}]
    )
    header = "query-id\tcorpus-id\tscore\n"
    write(folder / "qrels" / "train.tsv", header + "q2\td3\t2\nq1\td1\t1\nq1\td2\t0\nq1\td3\t1\n")
    write(folder / "qrels" / "test.tsv", header + "q1\td2\t1\nq1\td1\t0\nq2\td1\t0\n")
    return folder
