"""The documents of an index: one version of a Lance table, and the changes that make the next one.

Lance (https://lance.org, package pylance) keeps versions, deletions, updates, scalar indices and garbage; this
module is all that knows it. A row has a number, the column `row`, that no other document ever gets; where it lies
in the table is asked of `row_map`, since updates and compaction move rows.

Shape legend: N rows, D dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.query import MatchQuery
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.index.config import ExactDtype, TokensConfig
from raytower.index.json_values import json_rows
from raytower.index.manifest import TABLE_NAME
from raytower.index.rowmap import RowMap, Rows
from raytower.index.tokens import joined
from raytower.storage import Location
from raytower.storage.errors import as_storage_error, one_line

ROW, ID, TEXT, VECTOR, TOKENS = "row", "id", "text", "vector", "tokens"
# Columns of the table that are not the user's.
OWN_COLUMNS = (ROW, VECTOR, TOKENS)
_ADDRESS = "_rowaddr"
_INVERTED_NAME = "tokens_idx"
# Tokens are cut already. One partition counts documents together; positions broke in optimising (lance#7653).
_INVERTED: dict[str, Any] = {
    "base_tokenizer": "whitespace",
    "max_token_length": None,
    "lower_case": False,
    "stem": False,
    "remove_stop_words": False,
    "ascii_folding": False,
    "with_position": False,
    "num_workers": 1,
}
# Tokens of a batch of long texts would overflow the offsets of a plain string.
_TOKENS_FIELD = pa.field(TOKENS, pa.large_string())
_SCAN_ROWS = 65_536
_TEXTS_SCANNED = 2_048
# One take asks for so many rows: larger ones are slower by the row.
_TAKE_ROWS = 4_096
# So many ids are looked up one by one in the id's index; more are joined in one scan.
_IDS_LOOKED_UP = 20_000
_IDS_PER_QUERY = 4_000
_ROWS_PER_FRAGMENT = 1 << 20
# Integers beyond it are not all whole numbers as float64.
_EXACT_FLOAT = 1 << 53
# Lance says which kind of error it had before, and which line of its source raised it behind, what went wrong.
_LANCE_WRAPPING = re.compile(r"(External error: |LanceError\(\w+\): )|, \S+\.rs:\d+:\d+")
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_REMOTE_ERROR = re.compile(r"Generic (S3|GCS|MicrosoftAzure|HTTP client) error")
_DAMAGE = re.compile(r"LanceError\(IO\)|Not found: |[Cc]orrupt|Generic \w+ error|metadata range overflows")
_CONFLICT = re.compile(r"commit conflict|Incompatible transaction|Ref conflict")


@dataclass(frozen=True)
class Document:
    """A stored document; `metadata` holds the columns besides id and text, as JSON has them (see `json_values`)."""

    id: str
    text: str
    metadata: dict[str, Any]


class DocumentTable:
    """One version of the table. Reading is safe for threads; a change returns the version that it made."""

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self._dataset = dataset

    @classmethod
    def open(cls, index: Location, version: int | None = None) -> DocumentTable:
        """A version of the table of an index, or the latest. Raises FormatError where it is not there."""
        place = index / TABLE_NAME
        uri, options = place.lance_uri()

        def explained(error: Exception) -> RaytowerError:
            if _storage_failed(error):
                return _failure(error, place)
            what = "a table" if version is None else f"version {version} of its table"
            return FormatError(
                f"{place} cannot be opened at {what}: {_said(error)}; roll back, or build the index again"
            )

        with _raising(explained):
            return cls(lance.dataset(uri, version=version, storage_options=options))

    @classmethod
    def latest(cls, index: Location) -> DocumentTable | None:
        """The latest version, or None where there is no table yet."""
        return cls.open(index) if (index / TABLE_NAME / "_versions").is_dir() else None

    @property
    def version(self) -> int:
        return int(self._dataset.version)

    @property
    def num_rows(self) -> int:
        return int(self._dataset.count_rows())

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the documents: id, text and the user's, without row and vector."""
        return pa.schema([field for field in self._dataset.schema if field.name not in OWN_COLUMNS])

    @property
    def dim(self) -> int:
        return int(self._dataset.schema.field(VECTOR).type.list_size)

    @property
    def vector_dtype(self) -> ExactDtype:
        stored = self._dataset.schema.field(VECTOR).type.value_type
        return "float16" if pa.types.is_float16(stored) else "float32"

    @cached_property
    def row_map(self) -> RowMap:
        """Where every row lies, by one scan of the row numbers. Raises FormatError where a row stands twice."""
        batches = self._dataset.scanner(
            columns=[ROW], with_row_address=True, batch_size=_SCAN_ROWS
        ).to_batches()
        with self._readable():
            found = ((batch.column(ROW), batch.column(_ADDRESS)) for batch in batches)
            return RowMap.of_batches((rows.to_numpy(), at.to_numpy().astype(np.int64)) for rows, at in found)

    # Reading

    def take(self, rows: Rows, columns: Sequence[str]) -> pa.Table:
        """Some columns of `rows` (n,), in their order. Raises FormatError for a row that is not there."""
        addresses = self.row_map.addresses_of(rows)
        if (addresses < 0).any():
            gone = int(rows[np.flatnonzero(addresses < 0)[0]])
            raise FormatError(
                f"version {self.version} of the table holds no row {gone}; open the index again"
            )
        # In the order that they lie in they are read twice as fast.
        order = np.argsort(addresses, kind="stable")
        addresses = addresses[order]
        with self._readable():
            parts = [
                self._dataset._take_rows(
                    addresses[start : start + _TAKE_ROWS].tolist(), columns=list(columns)
                )
                for start in range(0, len(addresses), _TAKE_ROWS)
            ]
        if not parts:
            return self._dataset.schema.empty_table().select(list(columns))
        taken = pa.concat_tables(parts)
        return taken if (order[1:] > order[:-1]).all() else taken.take(pa.array(np.argsort(order)))

    def documents(self, rows: Rows) -> list[Document]:
        """The documents of `rows` (n,), in their order; their metadata as `json_values` writes it."""
        return documents_of(self.take(rows, self.schema.names))

    def vectors(self, rows: Rows, *, unit: bool) -> NDArray[np.float32]:
        """The vectors (N, D) of some rows, of unit length where asked."""
        column = self.take(rows, [VECTOR])[VECTOR]
        flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        vectors = np.ascontiguousarray(flat.reshape(-1, column.type.list_size), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit else vectors

    def scan(
        self, columns: Sequence[str], where: str | None = None, *, addresses: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows, or of those that an SQL condition holds for; a batch at a time.

        Raises InputError where the condition does not fit the columns.
        """
        # A batch of long texts would overflow its offsets, and take memory for them.
        wide = set(columns) - {ROW, ID, VECTOR}
        size = _TEXTS_SCANNED if wide else _SCAN_ROWS
        with self._readable(where):
            scanner = self._dataset.scanner(
                columns=list(columns), filter=where, with_row_address=addresses, batch_size=size
            )
            batches = iter(scanner.to_batches())
        while True:
            # What the caller raises between two batches is no matter of the table.
            with self._readable(where):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def matching(self, where: str) -> Rows:
        """The rows (n,) that an SQL condition holds for, rising. Raises InputError if it does not fit the columns."""
        # Asked for addresses only, a scalar index answers without reading a column.
        parts = [
            batch.column(_ADDRESS).to_numpy().astype(np.int64)
            for batch in self.scan([], where, addresses=True)
        ]
        rows = self.row_map.rows_at(np.concatenate([np.empty(0, np.int64), *parts]))
        return rows if (rows[1:] > rows[:-1]).all() else np.sort(rows)

    def find(self, column: str, values: pa.Array, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the rows whose `column`, as a string, is one of `values`, in any order."""
        if column == ID and len(values) <= _IDS_LOOKED_UP:
            names = values.to_pylist()
            for start in range(0, len(names), _IDS_PER_QUERY):
                listed = ", ".join(quoted(name) for name in names[start : start + _IDS_PER_QUERY])
                yield from self.scan(wanted, f"{ID} IN ({listed})")
            return
        for batch in self.scan(list(dict.fromkeys([column, *wanted]))):
            found = batch.filter(pc.is_in(batch.column(column).cast(values.type), value_set=values))
            if found.num_rows:
                yield found.select(list(wanted))

    def _readable(self, where: str | None = None) -> AbstractContextManager[None]:
        """What Lance fails at while it reads is damage, or a condition that does not fit, or the storage below."""

        def explained(error: Exception) -> RaytowerError:
            if _storage_failed(error):
                return _failure(error, self._dataset.uri)
            if where is not None and not _DAMAGE.search(str(error)):
                return InputError(f"the filter cannot be evaluated: {_said(error)}")
            return FormatError(
                f"{self._dataset.uri} version {self.version} is damaged: {_said(error)}; roll back, or build the index "
                "again"
            )

        return _raising(explained)

    def best_matches(self, words: Sequence[str], limit: int, where: str | None = None) -> Rows:
        """The rows (n,) that match some tokens best, as the inverted index counts, each as often as it is given.

        Raises InputError where the condition does not fit the columns.
        """
        query = MatchQuery(" ".join(words), TOKENS)
        with self._readable(where):
            found = self._dataset.scanner(
                columns=[_ADDRESS, "_score"],
                full_text_query=query,
                filter=where,
                prefilter=where is not None,
                limit=limit,
            ).to_table()
        return self.row_map.rows_at(found[_ADDRESS].to_numpy().astype(np.int64))

    # Changing

    def restored(self) -> DocumentTable:
        """The latest version, made equal to this one where something was committed since."""
        if self._dataset.latest_version == self.version:
            return self
        dataset = self._own()
        with _explained(dataset.uri):
            dataset.restore()
        return DocumentTable(dataset)

    def widened(self, schema: pa.Schema) -> DocumentTable:
        """With the columns of `schema` (documents), each of its type: new ones null, narrower ones widened.

        Raises:
            InputError: integers that the wider type, a float, cannot hold.
        """
        table = self
        for field in schema:
            known = table.schema.field(field.name) if field.name in table.schema.names else None
            if known is None or known.type != field.type:
                table = table._with_column(field, known)
        return table

    def _with_column(self, field: pa.Field, known: pa.Field | None) -> DocumentTable:
        if known is None:
            return self._changed(lambda dataset: dataset.add_columns(field.with_nullable(True)))
        if pa.types.is_integer(known.type) and pa.types.is_floating(field.type):
            name = f"`{field.name}`"
            lost = int(self._dataset.count_rows(f"{name} > {_EXACT_FLOAT} OR {name} < -{_EXACT_FLOAT}"))
            if lost:
                raise InputError(
                    f"column {field.name!r} is {known.type} in the index and {field.type} in the addition, and {lost} "
                    "integers of the index are too large for that; give it one type, or another name"
                )
        return self._with_cast_copy(field, known)

    def _with_cast_copy(self, field: pa.Field, known: pa.Field) -> DocumentTable:
        """With a copy of a column, cast to another type, in its place: Lance alters no integer column to a float one.

        Raises InputError for values that the other type does not hold.
        """
        name = f"_{field.name}_widened"
        while name in self._dataset.schema.names:
            name = f"_{name}"
        copy = pa.field(name, field.type)
        failed: list[pa.ArrowInvalid] = []

        @lance.batch_udf(output_schema=pa.schema([copy]))
        def widened(batch: pa.RecordBatch) -> pa.RecordBatch:
            try:
                return pa.record_batch([batch.column(0).cast(field.type)], schema=pa.schema([copy]))
            except pa.ArrowInvalid as error:  # which Lance would hide behind an error of its own
                failed.append(error)
                raise

        renamed: Any = {"path": copy.name, "name": field.name}
        try:
            table = self._changed(lambda dataset: dataset.add_columns(widened, read_columns=[field.name]))
        except RaytowerError as error:
            if not failed:
                raise
            raise InputError(
                f"column {field.name!r} is {known.type} in the index and cannot become {field.type}, as in the "
                f"addition: {failed[0]}; give it one type, or another name"
            ) from error
        table = table._changed(lambda dataset: dataset.drop_columns([field.name]))
        return table._changed(lambda dataset: dataset.alter_columns(renamed))

    def appended(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> DocumentTable:
        """With more documents. Raises what `batches` raises."""
        with _reading(batches, schema) as reader:
            return self._changed(lambda dataset: dataset.insert(reader, max_rows_per_file=_ROWS_PER_FRAGMENT))

    def upserted(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> tuple[DocumentTable, int]:
        """With more documents, which replace those with their ids; and how many were replaced.

        Raises what `batches` raises.
        """
        counts: dict[str, int] = {}

        def change(dataset: lance.LanceDataset) -> None:
            merge = dataset.merge_insert(ID).when_matched_update_all().when_not_matched_insert_all()
            counts.update(merge.execute(reader))

        with _reading(batches, schema) as reader:
            table = self._changed(change)
        return table, counts["num_updated_rows"]

    def without(self, ids: pa.Array) -> DocumentTable:
        """Without the documents with some ids."""
        gone = pa.table({ID: ids})
        return self._changed(lambda dataset: dataset.merge_insert(ID).when_matched_delete().execute(gone))

    def without_matching(self, where: str) -> DocumentTable:
        """Without the documents that an SQL condition holds for."""
        return self._changed(lambda dataset: dataset.delete(where))

    def with_values(self, values: pa.Table) -> DocumentTable:
        """With other values in some columns: `values` holds the ids and those columns."""
        return self._changed(
            lambda dataset: dataset.merge_insert(ID).when_matched_update_all().execute(values)
        )

    def with_value_where(self, values: Mapping[str, str], where: str) -> DocumentTable:
        """With one value, an SQL literal, in each of some columns wherever an SQL condition holds."""
        return self._changed(lambda dataset: dataset.update(dict(values), where=where))

    def indexed(self, columns: Sequence[str]) -> DocumentTable:
        """With a scalar index on the id and on some columns, its type chosen by theirs; those that are there stay."""
        table = self
        known = {name for index in self._dataset.describe_indices() for name in index.field_names}
        for name in dict.fromkeys([ID, *columns]):
            if name not in known:
                create = partial(_create_index, column=name, kind=self._dataset.schema.field(name).type)
                table = table._changed(create)
        return table

    @property
    def has_tokens(self) -> bool:
        return TOKENS in self._dataset.schema.names

    def with_tokens(self, settings: TokensConfig) -> DocumentTable:
        """With the tokens of every text, in place of those that are there.

        Raises:
            RaytowerError: Lance could not add the column, or what reading a text's tokens raised.
        """
        failed: list[Exception] = []

        @lance.batch_udf(output_schema=pa.schema([_TOKENS_FIELD]))
        def tokenised(batch: pa.RecordBatch) -> pa.RecordBatch:
            try:
                return pa.record_batch(
                    [_tokens_of(batch.column(0), settings)], schema=pa.schema([_TOKENS_FIELD])
                )
            except Exception as error:  # which Lance would hide behind an error of its own
                failed.append(error)
                raise

        table = self.without_tokens()
        try:
            return table._changed(
                lambda dataset: dataset.add_columns(tokenised, read_columns=[TEXT], batch_size=_TEXTS_SCANNED)
            )
        except RaytowerError:
            if failed:
                raise failed[0] from None
            raise

    def without_tokens(self) -> DocumentTable:
        """Without tokens, and without the inverted index over them."""
        if not self.has_tokens:
            return self
        return self._changed(lambda dataset: dataset.drop_columns([TOKENS]))

    def lexically_indexed(self) -> DocumentTable:
        """With an inverted index over the tokens that holds every row, where there are tokens."""
        if not self.has_tokens:
            return self
        known = {name for index in self._dataset.describe_indices() for name in index.field_names}
        if TOKENS not in known:
            return self._changed(_create_inverted_index)
        if not self._dataset.stats.index_stats(_INVERTED_NAME)["num_unindexed_rows"]:
            return self
        return self._changed(lambda dataset: dataset.optimize.optimize_indices(index_names=[_INVERTED_NAME]))

    def tidied(self) -> DocumentTable:
        """Few fragments, no deletion files, indices that hold every row."""
        dataset = self._own()
        with _explained(dataset.uri):
            dataset.optimize.optimize_indices()
            dataset.optimize.compact_files(target_rows_per_fragment=_ROWS_PER_FRAGMENT)
            dataset.optimize.optimize_indices()
        return DocumentTable(dataset)

    def _own(self) -> lance.LanceDataset:
        """A handle that a change may move to the version that it makes."""
        return self._dataset.checkout_version(self.version)

    def _changed(self, change: Callable[[lance.LanceDataset], Any]) -> DocumentTable:
        """What one commit made of this version.

        Raises:
            RaytowerError: the commit does not follow this version, so that someone else's is below it.
        """
        dataset = self._own()
        with _explained(dataset.uri):
            change(dataset)
        if dataset.version not in (self.version, self.version + 1):
            raise RaytowerError(
                f"the table was changed by another writer (version {dataset.version} follows "
                f"{self.version}); nothing was "
                "published: run the command again"
            )
        return DocumentTable(dataset)

    # Versions

    def pin(self, name: str) -> None:
        """Keep this version from being cleaned, under a name."""
        with _explained(self._dataset.uri):
            if name in self._dataset.tags.list():
                self._dataset.tags.update(name, self.version)
            else:
                self._dataset.tags.create(name, self.version)

    def keep_pins(self, names: set[str]) -> None:
        """Let go of all versions but those that were pinned under one of some names."""
        with _explained(self._dataset.uri):
            for name in set(self._dataset.tags.list()) - names:
                self._dataset.tags.delete(name)

    def clean(self) -> int:
        """Remove what neither the latest version nor a pinned one needs; the bytes that were freed."""
        with _explained(self._dataset.uri):
            removed = self._dataset.cleanup_old_versions(
                older_than=timedelta(0), error_if_tagged_old_versions=False
            )
        return int(removed.bytes_removed)


def documents_of(table: pa.Table | pa.RecordBatch) -> list[Document]:
    """Rows with a column `id`, perhaps `text` (else it is empty), and others: the metadata, as `json_values` has it."""
    return [Document(row.pop(ID), row.pop(TEXT, None) or "", row) for row in json_rows(table)]


def table_schema(documents: pa.Schema, dim: int, dtype: ExactDtype, *, has_tokens: bool = False) -> pa.Schema:
    """The table's columns for documents of this schema; with their tokens, where it has a lexical side."""
    value = pa.float16() if dtype == "float16" else pa.float32()
    own = [pa.field(ROW, pa.int64()), pa.field(VECTOR, pa.list_(value, dim))]
    own += [_TOKENS_FIELD] if has_tokens else []
    return pa.schema(
        [own[0], *(field.with_nullable(True) for field in documents), *own[1:]]
    ).remove_metadata()


def table_batch(
    documents: pa.Table,
    vectors: NDArray[Any],
    first_row: int,
    schema: pa.Schema,
    tokens: TokensConfig | None = None,
) -> pa.RecordBatch:
    """Documents and their vectors (N, D) as a batch of the table, numbered from `first_row`.

    `tokens` says how texts become the tokens of a table that has them.

    Raises:
        InputError: a value that the column's type cannot hold without loss.
    """
    columns: list[Any] = []
    for field in schema:
        if field.name == ROW:
            columns.append(pa.array(np.arange(first_row, first_row + len(vectors))))
        elif field.name == VECTOR:
            flat = np.ascontiguousarray(vectors, dtype=field.type.value_type.to_pandas_dtype()).reshape(-1)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size))
        elif field.name == TOKENS and tokens is not None:
            columns.append(_tokens_of(documents[TEXT], tokens))
        else:
            columns.append(_conformed(documents, field))
    return pa.record_batch(columns, schema=schema)


def write_fragments(index: Location, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> list[str]:
    """Put rows beside the table, to be committed together by `commit_fragments`; any number of workers may."""
    uri, options = (index / TABLE_NAME).lance_uri()
    with _explained(index / TABLE_NAME), _reading(batches, schema) as reader:
        fragments = lance.fragment.write_fragments(
            reader, uri, schema=schema, storage_options=options, max_rows_per_file=_ROWS_PER_FRAGMENT
        )
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def fragments_exist(index: Location, fragments: Sequence[str]) -> bool:
    """Whether the files of fragments that were put beside the table are still there."""
    parsed = [lance.FragmentMetadata.from_json(fragment) for fragment in fragments]
    data = index / TABLE_NAME / "data"
    return all((data / file.path).is_file() for fragment in parsed for file in fragment.files)


def commit_fragments(index: Location, fragments: Sequence[str], schema: pa.Schema) -> DocumentTable:
    """The version that holds those rows and nothing else."""
    uri, options = (index / TABLE_NAME).lance_uri()
    parsed = [lance.FragmentMetadata.from_json(fragment) for fragment in fragments]
    latest = DocumentTable.latest(index)
    with _explained(index / TABLE_NAME):
        dataset = lance.LanceDataset.commit(
            uri,
            lance.LanceOperation.Overwrite(schema, parsed),
            read_version=latest.version if latest else 0,
            storage_options=options,
        )
    return DocumentTable(dataset)


def is_own(name: str) -> bool:
    """Whether the table keeps this name of a column for itself."""
    return name in OWN_COLUMNS or name.startswith("_row")


def refuse_unindexable(documents: pa.Schema, columns: Sequence[str]) -> None:
    """Raises InputError for columns that get no scalar index: those that there are not, or of types without an
    order.
    """
    for name in columns:
        if name not in documents.names:
            raise InputError(
                f"indexed names the column {name!r}, which there is not; columns are {documents.names}"
            )
        kind = documents.field(name).type
        kind = kind.value_type if pa.types.is_list(kind) else kind
        if pa.types.is_null(kind) or pa.types.is_nested(kind) or pa.types.is_dictionary(kind):
            raise InputError(
                f"indexed names the column {name!r} of type {documents.field(name).type}, which has no index"
            )


def quoted(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def unified(ours: pa.Schema, theirs: pa.Schema, what: str) -> pa.Schema:
    """The documents' columns of an index and of an addition, each with a type that holds both without loss.

    Raises:
        InputError: a column of two types that have no such type, naming both.
    """
    fields = {field.name: field for field in ours}
    for field in theirs:
        known = fields.setdefault(field.name, field)
        kind = _common_type(known.type, field.type)
        if kind is None:
            raise InputError(
                f"column {field.name!r} is {known.type} in the index and {field.type} in {what}; give it one type, or "
                "another name"
            )
        fields[field.name] = field.with_type(kind)
    return pa.schema(list(fields.values())).remove_metadata()


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both; of integers and floats only if the integers are small enough."""
    types = pa.types
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if types.is_list(one) and types.is_list(other):
        member = _common_type(one.value_type, other.value_type)
        return None if member is None else pa.list_(member)
    kinds = {one, other}
    if kinds <= {pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()}:
        return pa.int64()
    if kinds <= {pa.int64(), pa.float32(), pa.float64()}:
        return pa.float64()
    if types.is_timestamp(one) and types.is_timestamp(other) and one.tz == other.tz:
        return pa.timestamp("ns", one.tz)
    return None


def _conformed(documents: pa.Table, field: pa.Field) -> Any:
    if field.name not in documents.column_names:
        return pa.nulls(documents.num_rows, field.type)
    column = documents[field.name]
    try:
        column = column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"column {field.name!r} is {column.type} and cannot become {field.type} as in the index: {error}"
        ) from error
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


@contextmanager
def _reading(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatchReader]:
    """A reader over `batches` for Lance, which hides what they raise behind an error of its own."""
    raised: list[BaseException] = []

    def relayed() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except BaseException as error:
            raised.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(schema, relayed())
    except Exception:
        if raised:
            raise raised[0] from None
        raise


def _explained(place: Location | str) -> AbstractContextManager[None]:
    """What Lance fails at while it writes, in one message that names the place."""
    return _raising(lambda error: _failure(error, place))


@contextmanager
def _raising(explained: Callable[[Exception], RaytowerError]) -> Iterator[None]:
    """Raise what is explained in place of what Lance raises. A panic, which some damage leads to, is no Exception in
    Python, and its class can be imported from nowhere.
    """
    try:
        yield
    except RaytowerError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise explained(error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise explained(RuntimeError(str(error))) from error


def _failure(error: Exception, place: Location | str) -> RaytowerError:
    said = _said(error)
    if _CONFLICT.search(said):
        return RaytowerError(
            f"{place} was changed by another writer meanwhile: {said}; nothing was published: run the command again"
        )
    system = _SYSTEM_ERROR.search(said)
    return as_storage_error(OSError(int(system[1]), said) if system else OSError(said), str(place))


def _storage_failed(error: Exception) -> bool:
    return bool(_SYSTEM_ERROR.search(str(error)) or _REMOTE_ERROR.search(str(error)))


def _tokens_of(texts: pa.Array | pa.ChunkedArray, settings: TokensConfig) -> pa.Array:
    return pa.array([joined(text or "", settings) for text in texts.to_pylist()], _TOKENS_FIELD.type)


def _create_inverted_index(dataset: lance.LanceDataset) -> None:
    dataset.create_scalar_index(TOKENS, "INVERTED", name=_INVERTED_NAME, **_INVERTED)


def _create_index(dataset: lance.LanceDataset, column: str, kind: pa.DataType) -> None:
    index: Any = "BITMAP" if pa.types.is_boolean(kind) else "BTREE"
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    dataset.create_scalar_index(column, "LABEL_LIST" if is_list else index)


def _said(error: Exception) -> str:
    """What Lance says in one line, without what belongs to its source."""
    return _LANCE_WRAPPING.sub("", one_line(error)) or type(error).__name__
