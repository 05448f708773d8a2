"""Training inputs: finding their kind, surveying them, and refusing data that cannot train anything."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raytower.data.beir import is_beir
from raytower.data.config import DevRows, NamedInput, TrainRows
from raytower.data.pieces import Piece, Survey, read_piece, say_unread
from raytower.data.pieces import survey as survey_input
from raytower.data.records import RecordKind
from raytower.data.rejects import quarantine_of
from raytower.data.sources import refuse_output_inside, refuse_several_splits
from raytower.data.survey_notes import counted, remembered
from raytower.errors import InputError
from raytower.progress import log
from raytower.storage import Location, known_sha256
from raytower.training.config import DevConfig, TrainJobConfig
from raytower.training.dev_split import set_dev_aside

# Few, because a piece of a compressed file is found by reading all before it. More where these hold too few rows, as
# where each file has a line.
_SAMPLED_PIECES = 4


def survey_training(
    config: TrainJobConfig,
    path: str,
    wanted: str,
    kinds: Sequence[str],
    objective: str,
    split: str | None = None,
    instructions: bool = False,
) -> Survey:
    """Survey the training file as `wanted`, or, for `auto`, as the first of `kinds` that its rows fit.

    With dev.share the survey's pieces are those that are trained, and its `set_aside` hold the dev rows.

    Args:
        config: says what happens to bad rows.
        path: the training file.
        wanted: train.format.
        kinds: what the objective trains from.
        objective: its name, for messages.
        split: of a BEIR folder; None is train.
        instructions: whether rows with queries may bring an instruction.

    Raises:
        InputError: a split of what is no BEIR folder, bad rows under on_error fail, rows that fit none of `kinds`, or
            a `wanted` that is none of them.
    """
    refuse_output_inside(config.output, path, is_folder=True)
    source = TrainRows(path=path, split=split, instructions=instructions)
    refuse_split(source)
    if not is_beir(source):
        refuse_several_splits(path)
    if wanted != "auto" and wanted not in kinds:
        raise InputError(
            f"train.format is {wanted!r}, and objective {objective} trains from {', '.join(kinds)}; change one of them"
        )
    quarantine = quarantine_of(config.output)
    candidates = cast(Sequence[RecordKind], kinds if wanted == "auto" else [wanted])
    if config.on_error == "quarantine" and len(candidates) > 1:
        candidates = _likeliest_kind(source, candidates) or candidates
    reasons = []
    for kind in candidates:
        try:
            surveyed = survey_input(
                source, kind, on_error=config.on_error, quarantine=quarantine, remember=remembered
            )
        except InputError as error:
            if len(candidates) == 1:
                raise
            reasons.append(f"as {kind}: {error}")
        else:
            _name_what_is_left_out(path, kind, surveyed)
            share = config.dev.share if config.dev else None
            return surveyed if share is None else set_dev_aside(surveyed, share, config.seed)
    raise InputError(
        f"{path!r} holds no rows that objective {objective} trains from; name what they are by train.format:\n"
        + "\n".join(reasons)
    )


def refuse_split(source: NamedInput) -> None:
    """Raise InputError where a split is named of what has none."""
    if source.split is not None and not is_beir(source):
        raise InputError(
            f"{source.split_key} is {source.split!r}, and {source.path!r} is no BEIR folder, which alone has splits; "
            "remove it, or name the file of that split by its path"
        )


def _likeliest_kind(source: NamedInput, kinds: Sequence[RecordKind]) -> list[RecordKind]:
    """The kind that most rows fit, of equals the first; none where no row fits any.

    Where bad rows are put aside, every kind reads every file that holds one row of it, so the first that can be read
    may be that of two rows in a hundred. What a kind rejects here is listed nowhere: the rows are judged by the kind
    that they are.
    """
    fitting: dict[RecordKind, int] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                surveyed = survey_input(source, kind, on_error="quarantine", quarantine=folder, say=False)
            except InputError:
                continue
        if not surveyed.num_rejected:
            return [kind]
        fitting[kind] = surveyed.num_rows
    return [max(fitting, key=lambda kind: fitting[kind])] if fitting else []


def _name_what_is_left_out(path: str, kind: RecordKind, surveyed: Survey) -> None:
    say_unread(path, kind, surveyed)
    if surveyed.num_repeated:
        log(
            f"{path}: {surveyed.num_repeated:,} documents are left out, which stand twice in their row, such as a "
            "positive among its own negatives"
        )


def tables(survey: Survey) -> Iterator[pa.Table]:
    """The rows of an input, a piece at a time."""
    return (read_piece(piece) for piece in survey.pieces)


def dev_tables(
    dev: DevConfig,
    kind: RecordKind,
    set_aside: Sequence[Piece],
    split: str | None = None,
    instructions: bool = False,
) -> Iterator[pa.Table]:
    """The dev rows, a piece at a time: those of dev.path as `kind`, or the training rows that were set aside.

    `split` is that of a BEIR folder; None is dev. `instructions` as of `survey_training`.

    Raises:
        InputError: a split of what is no BEIR folder, or bad rows in dev.path.
    """
    if dev.path is None:
        return map(read_piece, set_aside)
    source = DevRows(path=dev.path, split=split, instructions=instructions)
    refuse_split(source)
    if split is None and is_beir(source):
        # Never the training split, which is what a reader of pairs would take.
        source = DevRows(path=dev.path, split="dev")
    if not is_beir(source):
        refuse_several_splits(dev.path)
    surveyed = survey_input(source, kind, remember=remembered)
    say_unread(dev.path, kind, surveyed)
    return tables(surveyed)


def refuse_single_text(survey: Survey, columns: Sequence[str]) -> None:
    """Raise InputError if all rows have the same text in one of `columns`: no row would have a negative.

    Of pairs that share their query, each document is known to be relevant to it; of those that share their document,
    that one. It reads until every column has two texts, mostly one piece.
    """
    first: dict[str, str] = {}
    open_columns = list(columns)
    for table in tables(survey):
        for name in list(open_columns):
            values = pc.unique(table[name])
            text = first.setdefault(name, values[0].as_py())
            if len(values) > 1 or values[0].as_py() != text:
                open_columns.remove(name)
        if not open_columns:
            return
    name = open_columns[0]
    raise InputError(
        f"all {survey.num_rows} training rows have the same {name}, {first[name][:60]!r}: there is nothing to tell "
        "apart, and no row has a negative; check the columns of the file, add rows with others, or give rows negatives "
        "of their own (triples, candidates)"
    )


def refuse_no_negative(survey: Survey) -> None:
    """Raise InputError if no triple, or list of candidates, has a negative.

    A row brings negatives of its own, so that rows may share their query, or their document. Only where all ask one
    query may another row judge each negative relevant to it. It reads until there are two queries, mostly one piece.
    """
    queries: set[str] = set()
    relevant: set[str] = set()
    negatives: set[str] = set()
    for table in tables(survey):
        queries.update(pc.unique(pc.utf8_trim_whitespace(table["query"])).to_pylist())
        if len(queries) > 1:
            return
        if "documents" in table.column_names:
            lists = table["documents"].to_pylist()
        else:
            lists = list(zip(table["document"].to_pylist(), table["negative"].to_pylist(), strict=True))
        for first, *others in lists:
            relevant.add(first.strip())
            negatives.update(text.strip() for text in others)
    if negatives <= relevant:
        raise InputError(
            f"all {survey.num_rows} training rows have the same query, {queries.pop()[:60]!r}, and each of their "
            "negatives is the document of another row, which is relevant to that query: no row has a negative; check "
            "the columns of the file, or add rows with other queries"
        )


def check_labels(survey: Survey, apply: Callable[[Tensor], object]) -> None:
    """Apply the objective to all labels once before training, so that a bad one fails now and not hours later.

    `apply` computes the objective for labels (B,) with a constant in place of a model's output. It raises InputError
    for a label that breaks the objective's rule. The labels of candidates are their scores. Labels that are all equal
    are refused too: no pair is to score otherwise than another.
    """
    found: set[float] = set()
    for table in tables(survey):
        if "label" in table.column_names:
            labels = table["label"].to_pylist()
        else:
            labels = [score for row in table["scores"].to_pylist() for score in row]
        if len(found) < 2:
            found.update(labels)
        try:
            apply(torch.tensor(labels, dtype=torch.float32))
        except InputError as error:
            raise InputError(f"{', '.join(survey.files[:3])}: {error}") from error
    if len(found) == 1:
        raise InputError(
            f"{', '.join(survey.files[:3])}: every label is {found.pop():g}, so that one score for all pairs is right; "
            "add pairs with other labels, or train pairs that all match by objective in_batch_negatives"
        )


def refuse_equal_scores(survey: Survey, objective: str) -> None:
    """Raise InputError if no candidate list has two scores that differ: there is no order to learn.

    It reads until a list has them, mostly one piece.
    """
    for table in tables(survey):
        if any(len(set(scores)) > 1 for scores in table["scores"].to_pylist()):
            return
    raise InputError(
        f"{', '.join(survey.files[:3])}: the scores of each row are all equal, and objective {objective} learns their "
        "order; give the documents of a query different scores"
    )


def check_first_documents(survey: Survey, objective: str) -> None:
    """Say how many candidate lists have documents that score as high as their first: these are no negatives of it.

    Raises:
        InputError: the scores of a list are all equal, so that none of its documents is the relevant one.
    """
    if "scores" not in survey.schema.names:
        return
    found = counted(survey, "lists with several best documents", lambda: _count_ties(survey))
    if found["query"] is not None:
        raise InputError(
            f"{', '.join(survey.files[:3])}: the {found['length']} documents of query {found['query'][:80]!r} have one "
            f"score, and objective {objective} takes one of them for relevant and the others for not; give the "
            "relevant one a higher score, take such rows out, or train by an objective that reads scores"
        )
    if found["tied"]:
        log(
            f"{found['tied']:,} of {survey.num_rows:,} rows have several documents with the best score: objective "
            f"{objective} takes the first for relevant, and the others of them are no negatives"
        )


def _count_ties(survey: Survey) -> dict[str, Any]:
    """`tied`: lists whose second document scores as the first. `query`, `length`: of a list of one score, if any."""
    tied = 0
    for table in tables(survey):
        scores = pc.list_flatten(table["scores"]).to_numpy()
        lengths = pc.list_value_length(table["scores"]).to_numpy()
        ends = np.cumsum(lengths)
        best, second, last = scores[ends - lengths], scores[ends - lengths + 1], scores[ends - 1]
        if len(equal := np.flatnonzero(best == last)):  # they fall along the list
            row = int(equal[0])
            return {"tied": tied, "query": table["query"][row].as_py(), "length": int(lengths[row])}
        tied += int((best == second).sum())
    return {"tied": tied, "query": None, "length": 0}


def count_documents(survey: Survey, wanted: int | None) -> int | None:
    """Most documents of a candidate list in training: `wanted`, or those of the longest list; None for other rows.

    A shorter list keeps what it has. It tells how many lists are shorter, and of how many a part is drawn.
    """
    if "documents" not in survey.schema.names:
        return None
    rows_of = dict(counted(survey, "lengths of lists", lambda: _count_lengths(survey)))
    longest = max(rows_of)
    count = longest if wanted is None else min(wanted, longest)
    if wanted is not None and longest < wanted:
        log(f"train.num_documents is {wanted}, and no row has more than {longest}: all of each row are taken")
    shorter = sum(rows for length, rows in rows_of.items() if length < count)
    longer = sum(rows for length, rows in rows_of.items() if length > count)
    if shorter:
        log(
            f"{shorter:,} of {survey.num_rows:,} rows have fewer than {count} documents (down to {min(rows_of)}); they "
            "train with those that they have"
        )
    if longer:
        log(
            f"{longer:,} of {survey.num_rows:,} rows have more than {count} documents (up to {longest}): each epoch "
            f"takes the first one and draws {count - 1} of the others; train.num_documents says how many to take"
        )
    return count


def _count_lengths(survey: Survey) -> list[tuple[int, int]]:
    """Each length of a candidate list, and how many rows have it."""
    rows_of: Counter[int] = Counter()
    for table in tables(survey):
        lengths, counts = np.unique(pc.list_value_length(table["documents"]).to_numpy(), return_counts=True)
        rows_of.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
    return list(rows_of.items())


def sample_rows(survey: Survey, num_rows: int) -> pa.Table:
    """About `num_rows` rows of an input, evenly spaced within evenly spaced pieces; the same ones every time."""
    all_pieces = len(survey.pieces)
    count = min(max(_SAMPLED_PIECES, -(-num_rows * all_pieces // survey.num_rows)), all_pieces)
    wanted = -(-num_rows // count)
    sampled = []
    for number in range(count):
        table = read_piece(survey.pieces[(2 * number + 1) * all_pieces // (2 * count)])
        kept = min(table.num_rows, wanted)
        sampled.append(table.take(pa.array(np.arange(kept) * table.num_rows // kept)))
    return pa.concat_tables(sampled)


def content_hash(files: Iterable[Location], *, with_folders: bool = False) -> str:
    """Hash over names and content of the files of an input.

    `with_folders`: over the names of the folders that they lie in, too, where these are labels.
    """
    digest = hashlib.sha256()
    for file in files:
        name = f"{file.parent.name}/{file.name}" if with_folders else file.name
        digest.update(f"{name} {known_sha256(file)}\n".encode())
    return digest.hexdigest()[:16]
