"""The command line: one table of commands, one way to run each of them.

`raytower NAME --config FILE --section.key value --dry-run`; jobs/*.py call `run_command` with the same names.
Results go to stdout, the last line of a job being one JSON object; progress goes to stderr.
Exit codes: 0 done, 2 bad input or configuration, 1 failure, 130 ended by Ctrl-C, 143 ended by SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytower import __version__
from raytower.config import Config, dump_config, load_config, nested_configs, parse_overrides, to_json
from raytower.ending import INTERRUPTED, TERMINATED, bounded_ending
from raytower.errors import InputError, RaytowerError, find_cause


@dataclass(frozen=True)
class Command:
    """Where a command's config, job and plan live; imported only when it runs."""

    help: str
    config: str
    run: str
    plan: str | None = None
    render: str | None = None  # how a person sees the result, where that is more than the JSON line


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole way on a sample: train, encode, index, evaluate, rerank, serve",
        "raytower.demo:DemoConfig",
        "raytower.demo:run_demo",
        "raytower.demo:plan_demo",
    ),
    "train-retriever": Command(
        "train a two-tower encoder: in-batch negatives, SimCSE, distillation and others",
        "raytower.training.config:TrainRetrieverConfig",
        "raytower.training.retriever:train_retriever",
        "raytower.training.retriever:plan_train_retriever",
    ),
    "train-reranker": Command(
        "train a cross-encoder from scored pairs, triples or candidates",
        "raytower.training.config:TrainRerankerConfig",
        "raytower.training.reranker:train_reranker",
        "raytower.training.reranker:plan_train_reranker",
    ),
    "train-classifier": Command(
        "train a text classifier, the fine-tuned baseline",
        "raytower.training.config:TrainClassifierConfig",
        "raytower.training.classifier:train_classifier",
        "raytower.training.classifier:plan_train_classifier",
    ),
    "encode": Command(
        "encode a corpus into a folder of Parquet files",
        "raytower.encoding.config:EncodeConfig",
        "raytower.encoding.job:encode",
        "raytower.encoding.job:plan",
    ),
    "export": Command(
        "put an ONNX graph, float32 or int8, into a copy of an encoder directory",
        "raytower.export:ExportConfig",
        "raytower.export:export",
        "raytower.export:plan_export",
    ),
    "index build": Command(
        "build and publish a sharded index from embeddings",
        "raytower.index.config:IndexBuildConfig",
        "raytower.index.build:build_index",
        "raytower.index.build:plan_build",
    ),
    "index sync": Command(
        "make an index equal to a folder of texts, encoding only what is new or changed",
        "raytower.index.sync:IndexSyncConfig",
        "raytower.index.sync:sync_index",
        "raytower.index.sync:plan_sync",
    ),
    "index add": Command(
        "add documents; --upsert true replaces those with the same id",
        "raytower.index.change:IndexAddConfig",
        "raytower.index.change:add_to_index",
        "raytower.index.change:plan_add",
    ),
    "index delete": Command(
        "delete documents by id or by filter",
        "raytower.index.change:IndexDeleteConfig",
        "raytower.index.change:delete_from_index",
        "raytower.index.change:plan_delete",
    ),
    "index set": Command(
        "change columns of documents, by id or by filter, without encoding anything",
        "raytower.index.change:IndexSetConfig",
        "raytower.index.change:set_in_index",
        "raytower.index.change:plan_set",
    ),
    "index compact": Command(
        "build shards over all documents anew",
        "raytower.index.compact:IndexCompactConfig",
        "raytower.index.compact:compact_index",
        "raytower.index.compact:plan_compact",
    ),
    "index convert": Command(
        "make an index of format 2 one of format 3 (--index URI [--remove_old true])",
        "raytower.index.convert:IndexConvertConfig",
        "raytower.index.convert:convert_index",
        "raytower.index.convert:plan_convert",
    ),
    "index gc": Command(
        "remove old versions and shards that none needs (--keep N)",
        "raytower.index.collect:IndexGcConfig",
        "raytower.index.collect:collect_garbage",
        "raytower.index.collect:plan_gc",
    ),
    "index list": Command(
        "list the versions of an index",
        "raytower.index.manage:IndexListConfig",
        "raytower.index.manage:index_list",
    ),
    "index verify": Command(
        "read an index again and prove its checksums, counts and ids",
        "raytower.index.manage:IndexVerifyConfig",
        "raytower.index.manage:index_verify",
    ),
    "index rollback": Command(
        "publish a version that equals an earlier one (--to VERSION)",
        "raytower.index.manage:IndexRollbackConfig",
        "raytower.index.manage:index_rollback",
    ),
    "search": Command(
        "ask an index a question (--index URI --query TEXT [--k N] [--json])",
        "raytower.evaluation.search:SearchConfig",
        "raytower.evaluation.search:search",
        "raytower.evaluation.search:plan_search",
        "raytower.evaluation.search:render_search",
    ),
    "mine": Command(
        "mine hard negatives for training pairs from an index",
        "raytower.evaluation.mine:MineConfig",
        "raytower.evaluation.mine:mine",
        "raytower.evaluation.mine:plan_mine",
    ),
    "evaluate": Command(
        "measure recall, MRR and nDCG of an index, with or without a reranker",
        "raytower.evaluation.evaluate:EvaluateConfig",
        "raytower.evaluation.evaluate:evaluate",
        "raytower.evaluation.evaluate:plan_evaluate",
    ),
    "classify": Command(
        "label texts by nearest labels, by votes of labelled texts, or by a trained classifier",
        "raytower.evaluation.classify:ClassifyConfig",
        "raytower.evaluation.classify:classify",
        "raytower.evaluation.classify:plan_classify",
    ),
    "similarity": Command(
        "score a file of text pairs",
        "raytower.evaluation.similarity:SimilarityConfig",
        "raytower.evaluation.similarity:similarity",
        "raytower.evaluation.similarity:plan_similarity",
    ),
    "serve": Command(
        "serve an index over HTTP",
        "raytower.serving.config:ServeConfig",
        "raytower.serving.deploy:serve",
        "raytower.serving.deploy:plan_serve",
    ),
    "pipeline": Command(
        "run several jobs one after the other from one file; a finished step is skipped",
        "raytower.pipeline:PipelineConfig",
        "raytower.pipeline:run_pipeline",
        "raytower.pipeline:plan_pipeline",
    ),
}


@dataclass(frozen=True)
class _Arguments:
    config_path: str | None
    overrides: dict[str, Any]
    dry_run: bool
    as_json: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `raytower`; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"raytower {__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name == "index" and rest and not rest[0].startswith("-"):
        name, rest = f"index {rest[0]}", rest[1:]
    if name not in COMMANDS:
        print(f"raytower: no command {name!r}; `raytower --help` lists them", file=sys.stderr)
        return 2
    return run_command(name, rest)


def run_command(name: str, arguments: Sequence[str] | None = None, default_config: Path | None = None) -> int:
    """Run one command with its arguments (default: the process's) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS[name]
    if "-h" in given or "--help" in given:
        print(_command_help(name, command))
        return 0
    try:
        with bounded_ending():
            return _execute(command, _parse(_decode(given), default_config))
    except (KeyboardInterrupt, SystemExit) as end:
        # While it starts, Ray answers SIGTERM by SystemExit(15); while it trains, Ctrl-C by SystemExit(0).
        if isinstance(end, SystemExit) and end.code in (TERMINATED, signal.SIGTERM):
            print("raytower: ended by SIGTERM", file=sys.stderr)
            return TERMINATED
        print("raytower: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _explain(error)


def _execute(command: Command, arguments: _Arguments) -> int:
    config = load_config(find_reference(command.config), arguments.config_path, arguments.overrides)
    if arguments.dry_run:
        plan = find_reference(command.plan)(config) if command.plan else {}
        _show(dump_config(config).rstrip("\n"))
        _show_json({"plan": plan})
        return 0
    result = find_reference(command.run)(config)
    if command.render and not arguments.as_json:
        _show(find_reference(command.render)(result))
    else:
        _show_json(result)
    return 0


def _show_json(value: Any) -> None:
    """One line of JSON, with escapes for what the terminal's encoding (GBK, ASCII) does not have."""
    text = to_json(value)
    _show(text if _holds(text) else json.dumps(json.loads(text)))


def _show(text: str) -> None:
    """Print `text`; characters that the terminal's encoding does not have are shown by their codes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text if _holds(text) else text.encode(encoding, errors="backslashreplace").decode(encoding))


def _holds(text: str) -> bool:
    """Whether standard output can carry `text`."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _explain(error: Exception) -> int:
    """Say what went wrong: one message for the user's mistakes, the traceback for ours."""
    cause = find_cause(error)
    if isinstance(cause, InputError):
        print(f"raytower: {cause}", file=sys.stderr)
        return 2
    if isinstance(cause, RaytowerError):
        print(f"raytower: {cause}", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    return 1


def _decode(given: list[str]) -> list[str]:
    """The arguments as UTF-8, whatever the locale; Python keeps bytes that it cannot decode as lone surrogates."""
    decoded = []
    for argument in given:
        raw = argument.encode("utf-8", "surrogateescape")
        try:
            decoded.append(raw.decode("utf-8"))
        except UnicodeError:
            raise InputError(
                f"the argument {raw.decode('utf-8', errors='backslashreplace')} is not valid UTF-8; "
                "set the terminal to "
                "UTF-8, rename a file whose name is in another encoding (GBK, say), or give a text in a --config file"
            ) from None
    return decoded


def _parse(given: list[str], default_config: Path | None) -> _Arguments:
    config_path = str(default_config) if default_config else None
    rest: list[str] = []
    dry_run = as_json = False
    position = 0
    while position < len(given):
        argument = given[position]
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--json":
            as_json = True
        elif argument == "--config" or argument.startswith("--config="):
            _, equals, value = argument.partition("=")
            if not equals:
                position += 1
                if position >= len(given):
                    raise InputError("--config has no value; write --config FILE.yaml")
                value = given[position]
            config_path = value
        elif argument in ("--full", "--keep-serving") and _is_switch(given, position):
            rest.append(f"{argument}=true")
        else:
            rest.append(argument)
            if argument.startswith("--") and "=" not in argument and position + 1 < len(given):
                position += 1
                rest.append(given[position])
        position += 1
    return _Arguments(config_path, parse_overrides(rest), dry_run, as_json)


def _is_switch(given: list[str], position: int) -> bool:
    """Whether `--flag` stands alone rather than with true or false behind it."""
    return position + 1 >= len(given) or given[position + 1] not in ("true", "false")


def find_reference(reference: str) -> Any:
    """The object that `module:name` names, imported now."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  raytower {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"raytower {__version__}: semantic retrieval on Ray",
            "",
            *lines,
            "",
            "Every command takes --config FILE.yaml, overrides --section.key VALUE, --dry-run and --help.",
        ]
    )


def _command_help(name: str, command: Command) -> str:
    config_class: type[Config] = find_reference(command.config)
    lines = [f"raytower {name}: {command.help}", "", "Keys (--key VALUE, or in the file of --config):"]
    lines += [f"  {line}" for line in _describe_keys(config_class)]
    return "\n".join(lines)


def _describe_keys(config_class: type[Config], prefix: str = "") -> list[str]:
    lines = []
    for key, field in config_class.model_fields.items():
        nested = nested_configs(field.annotation)
        default = field.get_default(call_default_factory=True, validated_data={})
        if len(nested) > 1:
            lines += _describe_choice(nested, default, f"{prefix}{key}.")
        elif nested:
            if not field.is_required() and default is None:
                lines.append(f"{prefix}{key}  (default null, or the keys below)")
            lines += _describe_keys(nested[0], f"{prefix}{key}.")
        elif field.is_required():
            lines.append(f"{prefix}{key}  (required)")
        else:
            lines.append(f"{prefix}{key}  (default {to_json(default)})")
    return lines


def _describe_choice(choices: Sequence[type[Config]], default: Any, prefix: str) -> list[str]:
    """The keys of a part whose `name` chooses what it is."""
    lines = [f"{prefix}name  (default {to_json(getattr(default, 'name', None))}), one of"]
    for choice in choices:
        keys = [line.removeprefix(prefix) for line in _describe_keys(choice, prefix)]
        name = choice.model_fields["name"].default
        others = ", ".join(key for key in keys if not key.startswith("name "))
        lines.append(f"    {name}: {others}" if others else f"    {name}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
