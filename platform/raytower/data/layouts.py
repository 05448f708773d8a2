"""How the rows of one file are to be read: its format, its columns, and where its rows begin."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import pyarrow as pa

from raytower.data.config import InputConfig
from raytower.data.first_bytes import binary_format, refuse_other_file, refuse_other_text
from raytower.data.records import (
    EXPECTED_HEADER,
    HEADERLESS,
    INSTRUCTION,
    RecordField,
    RecordKind,
    canonical_schema,
    fields_of,
    is_corpus_like,
)
from raytower.data.slices import Cut, RangeReader, Slice, row_ends
from raytower.data.sources import FORMAT_BY_SUFFIX, SourceFile
from raytower.errors import InputError

FileFormat = Literal["lines", "tsv", "csv", "jsonl", "json", "parquet", "arrow"]
"""tsv: columns separated by tabs; a quote is an ordinary character. csv: separated by the layout's delimiter; fields
may be quoted. jsonl: one object a line. json: one array of objects."""

_BOM = b"\xef\xbb\xbf"
_FIRST_LINE_BYTES = 1024 * 1024
_HEAD_BYTES = 64 * 1024
# Names that only a header has. A first line with one of them, but without the wanted columns, is refused.
_HEADER_WORDS = {
    "id", "_id", "docid", "doc_id", "pid", "text", "title", "content", "contents", "document", "passage", "label"
}  # fmt: skip
# Names of columns in other people's files of pairs and labelled texts. A first line of nothing else is a header.
_COLUMN_NAMES = _HEADER_WORDS | {
    "query", "queries", "question", "questions", "question1", "question2", "answer", "answers", "anchor", "positive",
    "pos", "negative", "neg", "sentence", "sentences", "sentence1", "sentence2", "sentence_1", "sentence_2", "text1",
    "text2", "text_a", "text_b", "texta", "textb", "q1", "q2", "passages", "documents", "doc", "response",
    "instruction", "input", "output", "context", "abstract", "summary", "body", "premise", "hypothesis", "similar_text",
    "query_text", "doc_text", "source", "target", "review", "reviews", "comment", "comments", "message", "utterance",
    "tweet", "description", "name", "labels", "class", "classes", "category", "categories", "sentiment", "intent",
    "topic", "tag", "tags", "type", "rating", "stars", "score", "gold", "gold_label", "is_duplicate",
    "文本", "内容", "正文", "句子", "标题", "问题", "答案", "回答", "查询", "文档", "评论", "标签", "类别", "分类",
    "意图", "情感", "类型", "主题", "分数", "相似度",
}  # fmt: skip
# A column says how well two texts go together where its name is made of these words, at least one of the first:
# `score`, `gold_label`, `isDuplicate`; and not `label_source`, `match_id`.
_VERDICTS = {
    "label", "labels", "score", "scores", "similarity", "similarities", "relevance", "relevances", "relevant",
    "relatedness", "duplicate", "duplicates", "paraphrase", "match", "matches", "verdict", "entailment", "judgement",
    "judgment", "correct", "grade", "grades", "sim", "标签", "分数", "得分", "相似度", "相关性", "相关度", "匹配",
    "匹配度", "是否匹配", "是否相关", "是否相似", "是否正确", "是否重复",
}  # fmt: skip
_BESIDE_VERDICTS = {
    "is", "are", "gold", "human", "true", "final", "mean", "avg", "average", "pair", "sentence", "text", "semantic",
    "textual", "cosine", "cos", "binary", "sts", "teacher", "reranker", "rerank", "ce", "bm",
}  # fmt: skip
_VERDICTS_BY_SIGN = ({"is", "positive"}, {"is", "negative"}, {"is", "pos"}, {"is", "neg"})
# Names of a second text beside `text`, which then is one side of a pair.
_SECOND_TEXTS = {"sentence2", "sentence_2", "sentence_b", "similar_text", "text2", "text_2", "text_b"}
# Likewise of texts that do not go with the query: `neg_title`, `hard_negatives`; and not `neg_count`, `negative_ids`.
_NEGATIVES = {"neg", "negs", "negative", "negatives"}
_BESIDE_NEGATIVES = {
    "hard", "random", "easy", "soft", "mined", "dense", "bm", "title", "titles", "text", "texts", "passage", "passages",
    "document", "documents", "doc", "docs", "ctx", "ctxs", "context", "contexts", "answer", "answers", "sentence",
    "sentences", "response", "responses", "sample", "samples", "example", "examples", "candidates", "list",
}  # fmt: skip
_MIN_REPEATED_LINES = 8
_MIN_TEXT_CHARACTERS = 4


@dataclass(frozen=True)
class Layout:
    """Which columns to read from a file, in which format, and from which byte on. Picklable."""

    kind: RecordKind
    format: FileFormat
    fields: tuple[RecordField, ...]
    columns: tuple[str, ...] = ()
    """TSV, CSV and lines: the name of each column, from the header or from what the kind says. Empty elsewhere."""
    delimiter: str = "\t"
    body_start: int = 0
    """Byte at which the first row begins, after a byte order mark and a header."""
    first_line: int = 1

    @property
    def passes_columns_through(self) -> bool:
        return self.kind == "corpus"

    @property
    def is_columnar(self) -> bool:
        return self.format in ("parquet", "arrow")

    @property
    def cut(self) -> Cut:
        """The end of a row in a text format."""
        cuts: dict[FileFormat, Cut] = {"csv": "quoted", "json": "elements"}
        return cuts.get(self.format, "lines")

    @property
    def schema(self) -> pa.Schema:
        """The columns of its records, without those that pass through."""
        schema = canonical_schema(self.kind)
        if INSTRUCTION not in self.fields:
            return schema
        return schema.append(pa.field(INSTRUCTION.name, INSTRUCTION.record_type))

    @property
    def has_ids(self) -> bool:
        """Whether rows may bring ids of their own."""
        has_id = not self.columns or name_among(self.fields[0], self.columns) is not None
        return is_corpus_like(self.kind) and has_id


@dataclass(frozen=True)
class Source:
    """A file and how to read it."""

    file: SourceFile
    layout: Layout


def name_among(field: RecordField, columns: Container[str]) -> str | None:
    """The best of the field's names that is one of `columns`, or None."""
    # A loop without a generator: this is asked for each field of each JSON row.
    for name in field.names:
        if name in columns:
            return name
    return None


def detect_layout(file: SourceFile, kind: RecordKind, config: InputConfig) -> Layout | None:
    """Decide from the config, the extension and the first bytes how `file` is read as records of `kind`.

    Returns None for an empty file.

    Raises:
        InputError: the file is not what its name says, the format cannot be told or does not fit the kind, a header is
            missing, or `id_field` names a column that the file does not have.
    """
    head = read_head(file)
    if not head.removeprefix(_BOM):
        if FORMAT_BY_SUFFIX.get(file.suffix) in ("parquet", "arrow"):
            raise InputError(f"{file} is no readable {file.suffix[1:]} file: it is empty; write it again")
        return None
    file_format = _detect_format(file, kind, config, head)
    fields = fields_of(
        kind, tuple(config.text_fields), config.id_field, instructions=config.reads_instructions
    )
    layout = Layout(kind, file_format, fields)
    if layout.is_columnar:
        return layout
    refuse_other_text(file, head)
    layout = dataclasses.replace(layout, body_start=split_first_line(head)[1])
    if file_format in ("jsonl", "json"):
        return layout
    if any(field.is_list for field in layout.fields):
        raise InputError(
            f"{file}: {kind} records hold lists, which format {file_format} cannot carry; give JSON lines or Parquet"
        )
    if file_format != "lines":
        layout = _table_layout(file, config, layout, head)
    elif is_corpus_like(kind):
        layout = dataclasses.replace(layout, columns=(config.text_fields[-1],))
    else:
        raise InputError(
            f"{file}: format lines holds one text a row, and {kind} records need more; give TSV, CSV, JSON lines "
            "or Parquet"
        )
    if config.id_field and is_corpus_like(kind) and not layout.has_ids:
        raise InputError(
            f"{file}: input.id_field is {config.id_field!r}, but the file has no such column "
            f"(columns: {', '.join(layout.columns)}); remove id_field or name a column of the file"
        )
    return layout


def refuse_repeated(file: SourceFile, columns: Sequence[str]) -> None:
    """Raise InputError where a file has two columns of one name: only one of them could be read."""
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"{file}: two columns are named {name!r}; give each a name of its own")


def _table_layout(file: SourceFile, config: InputConfig, layout: Layout, head: bytes) -> Layout:
    """TSV or CSV: its delimiter, quoting, columns, and whether the first line names them."""
    line, start, after_line = split_first_line(head)
    delimiter = _delimiter(line) if layout.format == "csv" else "\t"
    first = tuple(line.split("\t"))
    file_format: FileFormat = "csv" if delimiter != "\t" or _is_quoted(head) else "tsv"
    if file_format == "csv":
        after_line = next((int(end) for end in row_ends(head, "quoted") if end > start), len(head))
        line = head[start:after_line].decode("utf-8", errors="replace").rstrip("\r\n")
        first = tuple(next(csv.reader([line], delimiter=delimiter), []))
    columns, has_header = _table_columns(file, config, layout, first)
    if is_corpus_like(layout.kind) and not has_header and len(columns) > 1:
        _refuse_labels(file, config, head[start:])
        _refuse_commas(file, config, delimiter, first)
        _refuse_two_texts(file, config, delimiter, head[start:])
    start, number = (after_line, 2) if has_header else (start, 1)
    return Layout(layout.kind, file_format, layout.fields, columns, delimiter, start, number)


def _delimiter(line: str) -> str:
    """The delimiter of a .csv file with this first line; spreadsheets also write tabs and semicolons."""
    if "\t" in line:
        return "\t"
    cells = {cell.strip(' "').lower() for cell in line.split(";")}
    return ";" if "," not in line and len(cells) > 1 and cells & _HEADER_WORDS else ","


def _is_quoted(head: bytes) -> bool:
    """Whether fields between tabs are quoted as in CSV: every field that begins with a quote is a whole quoted one.

    Texts may begin and end with quotes too. So a file counts as quoted only if it also has a doubled quote inside a
    field, or a first line with every field in quotes.
    """
    rows = Slice(0, 1, head, "quoted").rows()
    # The last row may be cut off.
    lines = [row.split(b"\t") for row in (rows[:-1] if len(rows) > 1 and not head.endswith(b"\n") else rows)]
    fields = [field for line in lines for field in line if field.startswith(b'"')]
    whole = [len(f) > 1 and f.endswith(b'"') and b'"' not in f[1:-1].replace(b'""', b"") for f in fields]
    has_doubled = any(b'""' in field[1:-1] for field in fields)
    is_header = len(lines[0]) > 1 and all(re.fullmatch(rb'"\w+"', field) for field in lines[0])
    return bool(whole) and all(whole) and (has_doubled or is_header)


def _is_number(cell: str) -> bool:
    """Whether `cell` is a finite number, as labels of pairs are."""
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _reads_like_a_text(cell: str) -> bool:
    """Whether `cell` is a text and no id: it has spaces between words, or several characters beyond ASCII."""
    return " " in cell.strip() or (not cell.isascii() and len(cell) >= _MIN_TEXT_CHARACTERS)


def _refuse_labels(file: SourceFile, config: InputConfig, head: bytes) -> None:
    """Refuse `text <TAB> label` given as a corpus of `id <TAB> text`: its second column repeats."""
    rows = [line.split(b"\t") for line in head.split(b"\n")[:-1]]
    rows = [row for row in rows if len(row) == 2]
    second = {row[1] for row in rows}
    texts = sum(_reads_like_a_text(row[0].decode("utf-8", errors="replace")) for row in rows)
    if len(rows) >= _MIN_REPEATED_LINES and len(second) * 4 <= len(rows) < texts * 2:
        first, label = (cell.decode("utf-8", errors="replace")[:60] for cell in rows[0])
        raise InputError(
            f"{file}: read without a header, the first row has the id {first!r} and the text {label!r}, but its "
            f"second column has only {len(second)} different values in {len(rows)} rows, as labels do. Add the "
            "header `id<TAB>text` if they are texts, or `text<TAB>label` if they are labels"
        )


def _refuse_commas(file: SourceFile, config: InputConfig, delimiter: str, first: tuple[str, ...]) -> None:
    """Refuse texts with commas, one a line, that their extension makes columns of: the first one would be an id."""
    if config.format == "auto" and delimiter != "\t" and _reads_like_a_text(first[0]):
        raise InputError(
            f"{file}: read as CSV without a header, the first row has the id {first[0][:60]!r}, which reads like a "
            f"text, and the text {first[1][:60]!r}. Add the header `id{delimiter}text` if they are that; if each "
            f"line is a text, name the file .txt{config.remedy('or set input.format to lines')}"
        )


def _refuse_two_texts(file: SourceFile, config: InputConfig, delimiter: str, head: bytes) -> None:
    """Refuse two texts a line, of which the first would be an id that is never read: most of them read like texts."""
    rows = [line.decode("utf-8", errors="replace").split("\t") for line in head.split(b"\n") if line.strip()]
    pairs = [row for row in rows if len(row) == 2]
    if (
        config.format == "auto"
        and delimiter == "\t"
        and 2 * sum(" " in row[0].strip() for row in pairs) > len(rows)
    ):
        raise InputError(
            f"{file}: read without a header, a row has the id {pairs[0][0][:60]!r} and the text {pairs[0][1][:60]!r}, "
            "and most of its ids read like texts. Add the header `id<TAB>text` if they are ids; if each line is one "
            f"text, name the file .txt{config.remedy('or set input.format to lines')}; of pairs, a corpus is one column"
        )


def refuse_other_kind(
    place: str, kind: RecordKind, unread: Collection[str], used: Container[str | None]
) -> None:
    """Refuse to read rows as what they are not: a verdict on a pair, negatives, or the text of a document under its
    title, that the kind would pass over.

    Args:
        place: the file, or the file and its line.
        kind: what the rows are read as.
        unread: names of columns or keys of the file that the kind does not read.
        used: those that it reads.

    Raises:
        InputError: naming the column, what the rows are, and what to do.
    """
    if kind in ("pairs", "triples", "scored") and "title" in used and "text" in unread:
        # An index holds both, joined: the title alone would be none of its documents, and the whole a negative.
        raise InputError(
            f"{place}: the file has 'title' and 'text', and {kind} would read 'title' alone as the document; join both "
            "by a space in a column 'document', as an index of title and text holds them, or take 'text' out if the "
            "title is the document"
        )
    for column in sorted(unread):
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^\x00-\x7f]+", column)}
        if kind == "pairs" and (_are_all(words, _VERDICTS, _BESIDE_VERDICTS) or words in _VERDICTS_BY_SIGN):
            raise InputError(
                f"{place}: the file has {column!r}, so its rows are scored and not pairs (every row would count as "
                "a match); to train or to compare them, read it as scored (train.format, or labelled of similarity), "
                "with that column named label; to evaluate, mine or measure dev recall, keep the rows that match, "
                "without that column, or give a BEIR folder, whose qrels hold grades; if it is no verdict, take the "
                "column out"
            )
        if kind == "labelled" and column.lower() in _SECOND_TEXTS:
            raise InputError(
                f"{place}: the file has {column!r} beside text and label, so its rows are pairs with a score and not "
                "labelled texts; name the two texts query and document and read it as scored, or take the column out"
            )
        if kind in ("pairs", "triples") and _are_all(words, _NEGATIVES, _BESIDE_NEGATIVES):
            raise InputError(
                f"{place}: the file has {column!r}, which {kind} do not read, so its rows are others; read it as "
                "triples (query, document, negative), or as candidates (query, positive, negatives) where a query has "
                "several negatives"
            )


def _are_all(words: set[str], wanted: set[str], beside: set[str]) -> bool:
    """Whether a name says what `wanted` says: all its words are these or `beside`, and not all `beside`."""
    return bool(words & wanted) and words <= wanted | beside


def _detect_format(file: SourceFile, kind: RecordKind, config: InputConfig, head: bytes) -> FileFormat:
    if config.format == "beir":
        raise InputError(
            f"{file}: format beir needs a folder with corpus.jsonl, not a file; give the folder's path"
        )
    named = config.format if config.format != "auto" else FORMAT_BY_SUFFIX.get(file.suffix)
    binary = binary_format(head)
    if binary is None:
        refuse_other_file(file, head)
    if named is None and file.suffix:
        raise InputError(
            f"{file}: the extension {file.suffix!r} tells no format (known: {', '.join(FORMAT_BY_SUFFIX)}, also "
            f"with .gz or .zst); rename the file{config.remedy('or set input.format')}"
        )
    if binary is not None:
        if named not in (None, binary):
            raise InputError(f"{file} is {binary}, not {named}; give it the extension .{binary}")
        return cast(FileFormat, binary)
    is_array = head.removeprefix(_BOM).lstrip().startswith(b"[")
    line = split_first_line(head)[0]
    if named == "jsonl" or (named is None and (is_array or line.lstrip().startswith("{"))):
        return "json" if is_array else "jsonl"
    if named is None:
        return "tsv" if "\t" in line or not is_corpus_like(kind) else "lines"
    if named == "lines" and config.format == "auto":
        if not is_corpus_like(kind):
            return "tsv"
        _refuse_columns(file, config, head)
    return cast(FileFormat, named)


def _refuse_columns(file: SourceFile, config: InputConfig, head: bytes) -> None:
    """Refuse a .txt corpus with one tab in every line: whether the tab separates columns is not guessed."""
    lines = head.removeprefix(_BOM).split(b"\n")
    counts = {line.count(b"\t") for line in (lines[:-1] or lines)}
    if counts == {1}:
        line = split_first_line(head)[0]
        first, second = (cell[:60] for cell in line.split("\t"))
        raise InputError(
            f"{file}: every line has one tab. As lines the first text is {line[:120]!r}; as columns it is {second!r} "
            f"with the id {first!r}. Name the file .tsv for columns, with a header `text<TAB>label` if they are "
            f"texts and labels{config.remedy('set input.format to lines or tsv')}"
        )


def read_head(file: SourceFile) -> bytes:
    """The first bytes, decompressed: at least the first line, where that is no longer than a megabyte."""
    with RangeReader(file) as reader:
        head = reader.read(0, _HEAD_BYTES)
        if len(head) == _HEAD_BYTES and b"\n" not in head and binary_format(head) is None:
            head += reader.read(len(head), _FIRST_LINE_BYTES - len(head))
    return head


def split_first_line(head: bytes) -> tuple[str, int, int]:
    """The first line, the byte at which it begins and the byte after it. What is not UTF-8 in it is replaced."""
    start = len(_BOM) if head.startswith(_BOM) else 0
    newline = head.find(b"\n", start)
    end = len(head) if newline < 0 else newline
    line = head[start:end].removesuffix(b"\r").decode("utf-8", errors="replace")
    return line, start, len(head) if newline < 0 else newline + 1


def _table_columns(
    file: SourceFile, config: InputConfig, layout: Layout, first: tuple[str, ...]
) -> tuple[tuple[str, ...], bool]:
    """The columns of a TSV or CSV whose first line is `first`, and whether that line is a header."""
    kind, fields = layout.kind, layout.fields
    used = {name_among(field, first) for field in fields}
    if len(first) > 2:
        refuse_other_kind(f"{file}:1", kind, set(first) - used, used)
    if is_corpus_like(kind):
        return _corpus_columns(file, config, fields, first)
    expected = EXPECTED_HEADER.get(kind)
    required = [name_among(field, first) for field in fields if field.required]
    names_all = None not in required and len(set(required)) == len(required)
    # No row of texts names every column that is read. The columns beside them are said to be unread, as keys are.
    if names_all:
        return first, True
    if kind == "scored" and len(first) == len(HEADERLESS[kind]) and _is_number(first[-1]):
        return HEADERLESS[kind], False
    if expected is not None:
        raise InputError(
            f"{file}:1: no header; the first line of a {kind} file names its columns: {'<TAB>'.join(expected)}. "
            f"It is {'<TAB>'.join(first)[:120]!r}; add the header, or check that the file holds {kind}"
        )
    if len(first) > 1 and {cell.strip(" \"'").lower() for cell in first} <= _COLUMN_NAMES:
        names = "<TAB>".join(HEADERLESS[kind])
        raise InputError(
            f"{file}:1: the first line, {'<TAB>'.join(first)[:120]!r}, reads like a header, but does not name the "
            f"columns of {kind}, and as a row it would count. Name them {names} in it, or remove the line"
        )
    least = sum(field.required for field in fields if field.name in HEADERLESS[kind])
    return HEADERLESS[kind][: max(len(first), least)], False


def _corpus_columns(
    file: SourceFile, config: InputConfig, fields: tuple[RecordField, ...], first: tuple[str, ...]
) -> tuple[tuple[str, ...], bool]:
    identifier, *texts = fields
    named_texts = [field for field in texts if name_among(field, first) is not None]
    has_id = name_among(identifier, first) is not None
    has_text = name_among(texts[-1], first) is not None
    if len(first) > 1 and has_text and (has_id or len(named_texts) > 1 or first[0] == texts[-1].names[0]):
        return first, True
    text_name = config.text_fields[-1]
    if len(first) > 1 and _HEADER_WORDS & {cell.strip().lower() for cell in first}:
        raise InputError(
            f"{file}:1: the first line is {'<TAB>'.join(first)[:120]!r}. As a header it names no column {text_name!r} "
            f"beside one of {', '.join(map(repr, identifier.names))}; as a row its id is {first[0][:60]!r} and its "
            f"text {first[1][:60]!r}. Name the columns id and {text_name} in it, or put such a header above it"
            f"{config.remedy('or name the columns by input.id_field and input.text_fields')}"
        )
    if len(first) == 1 and config.format in ("auto", "csv"):
        return (first if has_text else (text_name,)), has_text
    return (identifier.names[0], text_name), False


def parquet_columns(file: SourceFile, layout: Layout, schema: pa.Schema) -> dict[str, str | None]:
    """The Parquet column that each field is read from; None for an optional field that the file does not have.

    Raises:
        InputError: a required column is missing or of a type that cannot be read as what the field holds.
    """
    refuse_repeated(file, schema.names)
    used = {name_among(field, schema.names) for field in layout.fields}
    refuse_other_kind(str(file), layout.kind, set(schema.names) - used, used)
    types = pa.types
    chosen: dict[str, str | None] = {}
    for field in layout.fields:
        name = name_among(field, schema.names)
        if name is None and field.required:
            raise InputError(
                f"{file}: no column {' or '.join(map(repr, field.names))}; {layout.kind} records need one. "
                f"The file has: {', '.join(schema.names)}"
            )
        if name is not None:
            found = schema.field(name).type
            is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
            element = found.value_type if is_list and field.is_list else found
            if field.is_list > is_list or not _holds(element, field):
                as_numbers = types.is_boolean(element) and field.type in ("number", "category")
                remedy = "true as 1 and false as 0" if as_numbers else f"it as a {field.expected}"
                raise InputError(
                    f"{file}: column {name!r} is {found}, which is no {'list of ' if field.is_list else ''}{field.type}"
                    f"; write {remedy}"
                )
        chosen[field.name] = name
    return chosen


def _holds(kind: pa.DataType, field: RecordField) -> bool:
    """Whether values of the Arrow type `kind` can be read as values of the field, or elements of its lists."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind):
        return True
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return field.type != "numbers"
    if types.is_integer(kind):
        return field.type not in ("text", "texts")
    return types.is_floating(kind) and field.type not in ("text", "texts", "id")
