"""Columns that a corpus passes through: one type for each over all files, and tables made to that schema."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from raytower.data.records import RecordKind, canonical_schema
from raytower.data.row_batch import Parsed
from raytower.data.sources import SourceFile
from raytower.errors import InputError

_EXACT_IN_FLOAT = 2**53
_INT64_LIMIT = 2**63


class ExtraTypes:
    """Learns what type each passed-through column has, from all rows of all files.

    JSON keys whose values are all booleans, integers, numbers or strings get that type. A key with nested or mixed
    values is carried as text: strings as they are, everything else as JSON.
    """

    def __init__(self) -> None:
        self._json: dict[str, set[str]] = {}
        self._arrow: dict[str, tuple[pa.DataType, SourceFile]] = {}

    def observe(self, parsed: Parsed, file: SourceFile) -> None:
        """Take in the good rows of one slice. Raises InputError where two files disagree on a column's type."""
        if isinstance(parsed.extra, dict):
            for name, column in parsed.extra.items():
                self._observe_arrow(name, column.type, file)
            return
        for row in parsed.extra:
            for name, value in row.items():
                seen = self._json.setdefault(name, set())
                if value is not None:
                    seen.add(_json_type(value))

    def schema(self, kind: RecordKind) -> pa.Schema:
        """The full schema of tables of `kind`: canonical columns, then the passed-through ones as first seen."""
        extra = [pa.field(name, _arrow_type(seen)) for name, seen in self._json.items()]
        extra += [pa.field(name, data_type) for name, (data_type, _) in self._arrow.items()]
        return pa.schema([*canonical_schema(kind), *extra])

    def _observe_arrow(self, name: str, data_type: pa.DataType, file: SourceFile) -> None:
        known, known_file = self._arrow.setdefault(name, (data_type, file))
        if known == data_type:
            return
        schemas = [pa.schema([(name, known)]), pa.schema([(name, data_type)])]
        try:
            wider = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
        except pa.ArrowException as error:
            raise InputError(
                f"{file}: column {name!r} is {data_type}, but {known} in {known_file}; give it one type in all files"
            ) from error
        self._arrow[name] = (wider, file)


def build_table(parsed: Parsed, schema: pa.Schema) -> pa.Table:
    """The rows of `parsed` as a table of exactly `schema`; columns that they lack are null."""
    arrays = []
    for column in schema:
        if column.name in parsed.columns:
            arrays.append(parsed.columns[column.name])
        elif isinstance(parsed.extra, dict):
            found = parsed.extra.get(column.name)
            arrays.append(
                pa.nulls(parsed.num_rows, column.type) if found is None else found.cast(column.type)
            )
        else:
            values = [_to_type(row.get(column.name), column.type) for row in parsed.extra]
            arrays.append(pa.array(values, column.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _json_type(value: Any) -> str:
    if type(value) is int:
        if abs(value) <= _EXACT_IN_FLOAT:
            return "integer"
        return "long" if -_INT64_LIMIT <= value < _INT64_LIMIT else "other"
    return {bool: "boolean", float: "float", str: "string"}.get(type(value), "other")


def _arrow_type(seen: set[str]) -> pa.DataType:
    if seen == {"boolean"}:
        return pa.bool_()
    if seen and seen <= {"integer", "long"}:
        return pa.int64()
    if seen and seen <= {"integer", "float"}:
        return pa.float64()
    return pa.string()


def _to_type(value: Any, data_type: pa.DataType) -> Any:
    if value is None or type(value) is str:
        return value
    if pa.types.is_string(data_type):
        return json.dumps(value, ensure_ascii=False)
    return float(value) if pa.types.is_floating(data_type) else value
