"""Several sets of training rows: surveyed one by one, and named in what is said of them. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from raytower.data.pieces import Survey
from raytower.errors import InputError
from raytower.progress import log
from raytower.training.config import ALONE, MixedTrainInput, TrainJobConfig
from raytower.training.mixing import count_batches, set_shares

ConfigT = TypeVar("ConfigT", bound=TrainJobConfig)


@dataclass(frozen=True, kw_only=True)
class MixedSurvey(Survey):
    """The survey of several sets: pieces, counts and files are those of all, the schema is the first one's."""

    sets: Mapping[str, Survey]
    """By name, in the order of the config."""

    @classmethod
    def of(cls, sets: Mapping[str, Survey]) -> MixedSurvey:
        """The survey of all `sets`; `quarantine_file` names all the files that list what was rejected."""
        surveys = list(sets.values())
        contents = [s.content for s in surveys]
        listed = list(dict.fromkeys(s.quarantine_file for s in surveys if s.quarantine_file))
        return cls(
            sets=sets,
            pieces=tuple(chain.from_iterable(s.pieces for s in surveys)),
            num_rows=sum(s.num_rows for s in surveys),
            num_rejected=sum(s.num_rejected for s in surveys),
            files=tuple(chain.from_iterable(s.files for s in surveys)),
            bytes=sum(s.bytes for s in surveys),
            schema=surveys[0].schema,
            quarantine_file=", ".join(listed) or None,
            set_aside=tuple(chain.from_iterable(s.set_aside for s in surveys)),
            content=", ".join(map(str, contents)) if None not in contents else None,
        )


def survey_sets(config: ConfigT, survey_one: Callable[[ConfigT], Survey]) -> Survey:
    """Survey the rows of `config` by `survey_one`, or each of its sets by the config of that set.

    Raises:
        InputError: as `survey_one`, naming the set; or a set with fewer rows than a batch, which is of one set.
    """
    if not config.train_sets:
        return survey_one(config)
    surveys: dict[str, Survey] = {}
    for name in config.train_sets:
        with naming_set(name):
            surveys[name] = survey_one(config.of_set(name))
            num_rows = surveys[name].num_rows
            if num_rows < config.batch_size:
                raise InputError(
                    f"{num_rows} rows are fewer than one batch of {config.batch_size}, and a batch is of one set; "
                    "lower batch_size, or join the set with another one"
                )
    return MixedSurvey.of(surveys)


def surveys_of(surveyed: Survey) -> Mapping[str, Survey]:
    """The survey of each set by name, or the one that there is under ALONE."""
    return surveyed.sets if isinstance(surveyed, MixedSurvey) else {ALONE: surveyed}


def configs_of(config: ConfigT) -> dict[str, ConfigT]:
    """The config of each set by name, or the one that there is under ALONE."""
    return {name: config.of_set(name) for name in config.train_sets} or {ALONE: config}


@contextmanager
def naming_set(name: str, key: str = "train.sets") -> Iterator[None]:
    """Name the set in the message of an InputError raised inside."""
    try:
        yield
    except InputError as error:
        if name == ALONE:
            raise
        raise InputError(f"{key}.{name}: {error}") from error


def batches_of_sets(config: TrainJobConfig, surveyed: MixedSurvey, num_batches: int) -> dict[str, int]:
    """How many batches of the run are of each set; said in a line for each.

    Raises:
        InputError: there are more sets than batches.
    """
    assert isinstance(config.train, MixedTrainInput)
    rows = {name: own.num_rows for name, own in surveyed.sets.items()}
    weights = {name: own.weight for name, own in config.train_sets.items()}
    counts = count_batches(set_shares(rows, weights, config.train.mixing), num_batches)
    for name, count in counts.items():
        passes = count * config.batch_size / rows[name]
        log(
            f"train.sets.{name}: {rows[name]:,} rows, {count:,} of {num_batches:,} batches, {passes:.3g} passes"
        )
    return counts
