"""README.md of a trained model: what it is, how it is used, how it was trained and what was measured.

It lies in the published folder, which can be uploaded to a hub as it is. Places of files are no part of it: they say
nothing to a reader elsewhere, and may say too much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from raytower.training.config import (
    TrainClassifierConfig,
    TrainJobConfig,
    TrainRerankerConfig,
)

FILE_NAME = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_MOST_MEASUREMENTS = 20


@dataclass(frozen=True)
class _Kind:
    what: str
    task: str
    """The hub's name of what it does."""
    library: str
    tags: tuple[str, ...]
    use: str


_ENCODER = _Kind(
    "A two-tower text encoder: it maps queries and documents to vectors that are compared by cosine.",
    "sentence-similarity",
    "sentence-transformers",
    ("sentence-transformers", "feature-extraction", "raytower"),
    """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["how do I reset my password"])
documents = model.encode_document(["Passwords are reset under Account."])
print(model.similarity(queries, documents))""",
)
_RERANKER = _Kind(
    "A cross-encoder: it reads a query and a document together and scores how well they match.",
    "text-ranking",
    "sentence-transformers",
    ("sentence-transformers", "cross-encoder", "reranker", "raytower"),
    """from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
print(model.predict([("how do I reset my password", "Passwords are reset under Account.")]))""",
)
_CLASSIFIER = _Kind(
    "A text classifier: it gives a text one of its labels.",
    "text-classification",
    "transformers",
    ("text-classification", "raytower"),
    """from transformers import pipeline

classify = pipeline("text-classification", "{name}")
print(classify("how do I reset my password"))""",
)


def model_card(
    config: TrainJobConfig, figures: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> str:
    """The card of a run.

    Args:
        config: of the run.
        figures: its steps, seconds, best value and best step.
        history: dev metrics by step.
    """
    kind = _kind_of(config)
    name = PurePosixPath(config.output).name
    base = config.start if _is_hub_id(config.start) else None
    data = ModelCardData(
        library_name=kind.library,
        pipeline_tag=kind.task,
        tags=list(kind.tags),
        base_model=base.partition("@")[0] if base else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n",
        f"{kind.what}\n\n{_origin(config, base)}\n",
        f"## Use\n\n```python\n{kind.use.format(name=name)}\n```\n",
        f"## Training\n\n{_table(('setting', 'value'), _settings(config, figures))}",
    ]
    if history:
        parts.append(_measured(config, history, figures))
    return "\n".join(parts)


def _kind_of(config: TrainJobConfig) -> _Kind:
    if isinstance(config, TrainRerankerConfig):
        return _RERANKER
    return _CLASSIFIER if isinstance(config, TrainClassifierConfig) else _ENCODER


def _is_hub_id(start: str) -> bool:
    """Whether a model of a hub is meant, and not a folder such as runs/encoder, which may look like one."""
    return _HUB_ID.fullmatch(start) is not None and not start.startswith(".") and not Path(start).exists()


def _origin(config: TrainJobConfig, base: str | None) -> str:
    start = f"[{base}](https://huggingface.co/{base.partition('@')[0]})" if base else "a model directory"
    return f"Trained from {start} by `raytower`; raytower.json beside this file has all settings of the run."


def _settings(config: TrainJobConfig, figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    values = config.model_dump(mode="json")
    objective = dict(values["objective"])
    told = {
        "objective": objective.pop("name"),
        **{f"objective.{name}": value for name, value in objective.items() if value is not None},
        **_sets(values["train"]),
        **{
            name: values[name]
            for name in ("batch_size", "accumulate_batches", "epochs", "max_length", "dtype", "seed")
        },
        **{f"optimizer.{name}": value for name, value in values["optimizer"].items() if value is not None},
        **{f"lora.{name}": value for name, value in (values["lora"] or {}).items() if value is not None},
        "steps": figures["steps"],
        "seconds": figures["seconds"],
    }
    return list(told.items())


def _sets(train: Mapping[str, Any]) -> dict[str, str]:
    """How several sets of training rows are mixed, and what is learnt from each; places of files are left out."""
    sets = train.get("sets") or {}
    own = {
        f"train.sets.{name}": f"weight {given['weight']:g}"
        + (f", objective {given['objective']['name']}" if given.get("objective") else "")
        for name, given in sets.items()
    }
    return {"train.mixing": str(train["mixing"]), **own} if own else {}


def _measured(
    config: TrainJobConfig, history: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]
) -> str:
    """The last measurements, the published one among them."""
    best = figures["best_step"]
    shown = list(history[-_MOST_MEASUREMENTS:])
    shown = [row for row in history if row["step"] == best and row not in shown] + shown
    names = [name for name in history[-1] if name != "step"]
    rows = [
        (
            f"{row['step']}{' (published)' if row['step'] == best else ''}",
            *(f"{row[name]:.4f}" for name in names),
        )
        for row in shown
    ]
    return f"## Dev metrics\n\n{_table(('step', *names), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
