"""Training strategies on zh_questions, each by config under Ray, at the same budget of training pairs.

    python benchmarks/training_strategies.py --work DIR [--pairs 20000] [--corpus-rows 100000] [--only NAME …]

The configs are docs/results/strategies/*.yaml; their paths are relative to the work folder, where this script puts the
samples and a link to the model, so that any of them also runs by hand: `cd DIR && raytower train-retriever --config
FILE`. Each finished strategy leaves DIR/<name>.json and is not run again; a killed job goes on where it was.
Writes docs/results/training.md from what is there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import questions as zh
import torch
import yaml
from numpy.typing import NDArray

from raytower.annotation.config import MineConfig
from raytower.annotation.mine import mine
from raytower.config import load_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode
from raytower.index.build import build_index
from raytower.index.config import IndexBuildConfig
from raytower.training.config import TrainRetrieverConfig
from raytower.training.retriever import train_retriever

CONFIGS = zh.REPOSITORY / "docs" / "results" / "strategies"
REPORT = zh.REPOSITORY / "docs" / "results" / "training.md"
KS = (1, 5, 10, 20, 50)
ORDER_K = 10
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A row of the table: the configs to run in order, and the encoder directory that they leave."""

    title: str
    configs: tuple[str, ...]
    encoder: str


# In the order in which the literature would put them, worst first.
STRATEGIES = {
    "zero_shot": Strategy(title="zero-shot", configs=(), encoder="model"),
    "simcse": Strategy(title="SimCSE alone", configs=("simcse",), encoder="runs/simcse"),
    "random_negative": Strategy(
        title="random negative", configs=("random_negative",), encoder="runs/random_negative"
    ),
    "hardest_negative": Strategy(
        title="hardest negative of the batch", configs=("hardest_negative",), encoder="runs/hardest_negative"
    ),
    "in_batch": Strategy(title="in-batch negatives", configs=("in_batch",), encoder="runs/in_batch"),
    "simcse_in_batch": Strategy(
        title="SimCSE then in-batch negatives",
        configs=("simcse", "simcse_in_batch"),
        encoder="runs/simcse_in_batch",
    ),
    "mined": Strategy(
        title="in-batch and mined negatives",
        configs=("mined_1_encode", "mined_2_index", "mined_3_mine", "mined_4_train"),
        encoder="runs/mined",
    ),
}


def run_config(name: str) -> Figures:
    """Run docs/results/strategies/<name>.yaml with the job that it is for, in the current folder."""
    path = CONFIGS / f"{name}.yaml"
    if name == "mined_1_encode":
        return encode(load_config(EncodeConfig, path))
    if name == "mined_2_index":
        return build_index(load_config(IndexBuildConfig, path))
    if name == "mined_3_mine":
        return mine(load_config(MineConfig, path))
    return train_retriever(load_config(TrainRetrieverConfig, path))


def main() -> None:
    arguments = parse()
    settings = {
        "pairs": arguments.pairs,
        "corpus_rows": arguments.corpus_rows,
        "queries": arguments.queries,
        "model": arguments.model.resolve().name,
    }
    work = arguments.work.resolve()
    data, model = arguments.data.resolve(), arguments.model.resolve()
    report = arguments.report.resolve()
    prepare(work, data, model, arguments.pairs)
    # The configs name their files relative to the work folder.
    os.chdir(work)
    dev = None
    for name in arguments.only:
        place = work / f"{name}.json"
        if zh.is_done(place, {**settings, "configs": configs_of(name)}):
            continue
        figures = {config: stage(work, config, arguments.pairs) for config in STRATEGIES[name].configs}
        dev = dev or zh.dev_sample(data, arguments.corpus_rows, arguments.queries)
        record = zh.measure(STRATEGIES[name].encoder, dev, KS)
        recorded = {**settings, "configs": configs_of(name)}
        zh.write_record(place, {"settings": recorded, "figures": figures, **record})
        print(f"{name}: recall@{ORDER_K} {record[f'recall@{ORDER_K}']:.4f}", flush=True)
    records = {
        name: zh.read_record(work / f"{name}.json")
        for name in STRATEGIES
        if zh.is_done(work / f"{name}.json", {**settings, "configs": configs_of(name)})
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    zh.write_atomically(report, write_report(records, settings))
    print(f"{len(records)} of {len(STRATEGIES)} strategies in {report}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=zh.DEFAULT_DATA)
    parser.add_argument("--model", type=Path, default=zh.DEFAULT_MODEL)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--corpus-rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, help="for a trial: only the first so many dev queries")
    parser.add_argument("--only", nargs="*", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--report", type=Path, default=REPORT)
    return parser.parse_args()


def prepare(work: Path, data: Path, model: Path, num_pairs: int) -> None:
    """The samples that the configs name, and a link to the model."""
    work.mkdir(parents=True, exist_ok=True)
    link = work / "model"
    if not link.exists():
        link.symlink_to(model)
    pairs = zh.training_pairs(data, num_pairs)
    texts = [(text,) for text in zh.training_texts(data, num_pairs)]
    pair_texts = [(text,) for text in dict.fromkeys(text for pair in pairs for text in pair)]
    for name, rows in (("pairs.tsv", pairs), ("texts.txt", texts), ("pair_texts.txt", pair_texts)):
        place = work / name
        if not place.is_file():
            zh.write_rows(place, rows)
        elif len(zh.read_lines(place)) != len(rows) or link.resolve() != model:
            raise SystemExit(
                f"{work} was made with another --pairs or --model; choose another folder or remove it"
            )


def stage(work: Path, config: str, num_pairs: int) -> Figures:
    """One config's figures; run once, also where two strategies share it."""
    place = work / "stages" / f"{config}.json"
    settings = {"pairs": num_pairs, "config": (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8")}
    if zh.is_done(place, settings):
        return dict(zh.read_record(place)["figures"])
    print(f"running {config}.yaml", flush=True)
    started = time.perf_counter()
    figures = {**run_config(config), "job_seconds": round(time.perf_counter() - started, 1)}
    zh.write_record(place, {"settings": settings, "figures": figures})
    return figures


def configs_of(name: str) -> dict[str, str]:
    return {
        config: (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8")
        for config in STRATEGIES[name].configs
    }


# --- the report ----------------------------------------------------------------------------------------------------


def write_report(records: dict[str, Figures], settings: dict[str, Any]) -> str:
    """docs/results/training.md."""
    values = {name: {k: zh.recall_values(record, k) for k in KS} for name, record in records.items()}
    first = next(iter(records.values()), {"queries": 0, "corpus_rows": 0})
    lines = [
        "# Training strategies",
        "",
        f"zh_questions with {settings['model']}, {settings['pairs']:,} training pairs for each strategy (SimCSE: as "
        f"many unlabelled texts), one epoch; recall of {first['queries']:,} dev queries against a sample of "
        f"{first['corpus_rows']:,} corpus texts that holds every relevant one, by exact search over bfloat16 vectors. "
        "Recall@k is the share of a query's relevant texts among the first k, mean over queries, with 95 % bootstrap "
        "intervals. One seed each.",
        "",
        f"    python benchmarks/training_strategies.py --work DIR --pairs {settings['pairs']} "
        f"--corpus-rows {settings['corpus_rows']}",
        "",
        f"Machine: {machine()}.",
        "",
        "| strategy | "
        + " | ".join(f"Recall@{k}" for k in KS)
        + f" | Recall@{ORDER_K} less zero-shot | jobs, s | configs |",
        "|---" * (len(KS) + 4) + "|",
    ]
    base = values.get("zero_shot", {}).get(ORDER_K)
    lines += [table_row(name, record, values[name], base) for name, record in records.items()]
    lines += ["", "## Order", "", *order(values), "", "## Settings", "", *settings_lines(records)]
    return "\n".join(lines) + "\n"


def table_row(
    name: str,
    record: Figures,
    values: dict[int, NDArray[np.float64]],
    base: NDArray[np.float64] | None,
) -> str:
    seconds = sum(figures["job_seconds"] for figures in record["figures"].values())
    links = ", ".join(f"[{config}](strategies/{config}.yaml)" for config in record["figures"])
    gain = "" if base is None or name == "zero_shot" else zh.difference_with_interval(values[ORDER_K], base)
    cells = [
        STRATEGIES[name].title,
        *(zh.with_interval(values[k]) for k in KS),
        gain,
        f"{seconds:.0f}",
        links,
    ]
    return "| " + " | ".join(cells) + " |"


def order(values: dict[str, dict[int, NDArray[np.float64]]]) -> list[str]:
    """What was expected, what was found, and which differences stand out from chance."""
    expected = list(values)
    means = {name: float(values[name][ORDER_K].mean()) for name in expected}
    found = sorted(expected, key=lambda name: means[name])
    is_expected = all(means[lower] < means[upper] for lower, upper in itertools.pairwise(expected))
    rows = []
    verdicts = []
    for lower, upper in itertools.pairwise(expected):
        difference = values[upper][ORDER_K] - values[lower][ORDER_K]
        low, high = zh.bootstrap_interval(difference)
        verdicts.append("as expected" if low > 0 else "the other way round" if high < 0 else "within chance")
        cells = [STRATEGIES[upper].title, STRATEGIES[lower].title]
        cells += [f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]", verdicts[-1]]
        rows.append("| " + " | ".join(cells) + " |")
    return [
        f"By Recall@{ORDER_K}, worst first, expected: {' < '.join(STRATEGIES[name].title for name in expected)}. "
        f"Found: {ranking(found, means)}. That is {'' if is_expected else 'not '}the order expected; of "
        f"{len(verdicts)} neighbours in the expected order {verdicts.count('as expected')} differ as expected beyond "
        f"chance, {verdicts.count('the other way round')} the other way round, and "
        f"{verdicts.count('within chance')} lie within chance.",
        "",
        f"Difference of Recall@{ORDER_K} with paired 95 % bootstrap intervals:",
        "",
        "| better, as expected | than | difference | verdict |",
        "|---|---|---|---|",
        *rows,
    ]


def ranking(names: Sequence[str], means: dict[str, float]) -> str:
    """Titles from worst to best, equal ones marked as such."""
    text = STRATEGIES[names[0]].title if names else ""
    for lower, upper in itertools.pairwise(names):
        text += f" {'=' if means[lower] == means[upper] else '<'} {STRATEGIES[upper].title}"
    return text


def settings_lines(records: dict[str, Figures]) -> list[str]:
    """What the training configs say, a line each, and what mining found."""
    lines = []
    configs: dict[str, str] = {}
    for record in records.values():
        configs |= record["settings"]["configs"]
    for name, text in configs.items():
        values = yaml.safe_load(text)
        if "objective" in values:
            start = values.get("init_from", values.get("model"))
            objective = ", ".join(
                f"{key} {value}" for key, value in values["objective"].items() if key != "name"
            )
            lines.append(
                f"- {name}: from {start}, {values['objective']['name']} ({objective}), lr {values['optimizer']['lr']}, "
                f"batch {values['batch_size']}, {values['dtype']}, {values['workers']['num']} workers"
            )
    mined = records.get("mined", {}).get("figures", {}).get("mined_3_mine")
    if mined:
        lines.append(
            f"- mining: {mined['negatives']:,} negatives for {mined['pairs']:,} pairs; "
            f"{mined['pairs_without_negatives']:,} pairs without one are not trained on"
        )
    return lines


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU used; torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
