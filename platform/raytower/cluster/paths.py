"""What a job's config names: files and folders, variables that hold secrets. And which of them the cluster lacks.

Pure: what is uploaded and how many nodes there are comes from outside.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Use = Literal["reads", "model", "writes"]

# The last word of a key that names files or folders, by what becomes of them: one setting has one name in all commands.
# A model may be an id of a hub too.
_USES: dict[str, Use] = {
    **dict.fromkeys(("path", "paths", "corpus", "embeddings", "index", "compare", "tuned"), "reads"),
    **dict.fromkeys(("classify_tuned", "keys_file", "labels", "train", "input", "queries", "run"), "reads"),
    **dict.fromkeys(("model", "init_from", "encoder", "teacher", "reranker", "classifier"), "model"),
    **dict.fromkeys(
        ("output", "state", "suspects", "report", "plots", "log_dir", "dir", "work_dir"), "writes"
    ),
}
_ENDINGS_OF_VARIABLES = ("_env", "_variable")


@dataclass(frozen=True)
class NamedPath:
    """A file, folder or glob that a config names, by the key that names it."""

    key: str
    value: str
    use: Use

    @property
    def is_uri(self) -> bool:
        return "://" in self.value and not self.value.startswith("file://")

    @property
    def is_relative(self) -> bool:
        return not self.is_uri and not self._path.startswith(("/", "~"))

    @property
    def _path(self) -> str:
        return self.value.removeprefix("file://")

    def is_below(self, folder: str) -> bool:
        return os.path.normpath(self._path).startswith(os.path.join(os.path.normpath(folder), "")) or (
            os.path.normpath(self._path) == os.path.normpath(folder)
        )


def named_paths(values: Mapping[str, Any], changes_index: bool = False) -> list[NamedPath]:
    """The paths of a config's values, nested ones by their dotted keys.

    Args:
        values: a config as plain values.
        changes_index: whether the job writes into the index that it names.
    """
    found = []
    for key, name, value in _texts(values):
        use = _USES.get(name)
        if key == "access_log.path":
            use = None if value == "-" else "writes"
        elif name == "index" and changes_index:
            use = "writes"
        if use is not None and value:
            found.append(NamedPath(key, value, use))
    return found


def named_variables(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys that name an environment variable which must be set, each with the variable."""
    return [
        (key, value) for key, name, value in _texts(values) if name.endswith(_ENDINGS_OF_VARIABLES) and value
    ]


def _texts(values: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted key, the config's own word for it, and value of every text. Items of a list count as its."""
    if isinstance(values, str):
        yield key, name, values
    elif isinstance(values, Mapping):
        for inner, value in values.items():
            # The keys of `paths: {a label: FILE}` are no words of ours.
            own = name if name == "paths" else str(inner)
            yield from _texts(value, f"{key}.{inner}" if key else str(inner), own)
    elif isinstance(values, (list, tuple)) and name != "labels":  # names of a reranker's classes
        for number, value in enumerate(values):
            yield from _texts(value, f"{key}.{number}", name)


def lacking_paths(
    paths: Sequence[NamedPath],
    *,
    uploaded: Collection[str],
    shared: Sequence[str],
    num_nodes: int,
    exists_here: Collection[str],
) -> list[str]:
    """What is wrong with paths that the cluster's nodes do not see, a message each.

    Args:
        paths: those of the config.
        uploaded: relative paths of the files that travel with the job.
        shared: folders that are mounted on all nodes.
        num_nodes: machines that a job's processes may lie on; on one a path of its own is as good as a URI.
        exists_here: values of relative paths that are files or folders of this machine.
    """
    return [
        problem
        for path in paths
        if (problem := _lacks(path, uploaded, shared, num_nodes, path.value in exists_here)) is not None
    ]


def _lacks(
    path: NamedPath, uploaded: Collection[str], shared: Sequence[str], num_nodes: int, exists_here: bool
) -> str | None:
    if path.is_uri:
        return None
    what = f"{path.key} is {path.value!r}"
    if path.is_relative:
        if path.use == "writes":
            return (
                f"{what}, a relative path: it would lie in the uploaded copy, which Ray removes; name a URI that every "
                "node sees (s3://…, gs://…), or an absolute path of a folder that all nodes share"
            )
        if _is_uploaded(path.value, uploaded) or (path.use == "model" and not exists_here):
            return None
        return (
            f"{what}, a relative path that is not among the uploaded files (.rayignore and .gitignore leave data/ and "
            "runs/ out): name a URI that every node sees, or an absolute path of a folder that all nodes share"
        )
    if num_nodes == 1 or any(path.is_below(folder) for folder in shared):
        return None
    return (
        f"{what}, a path of one machine, and the job's processes may lie on {num_nodes}: name a URI that every node "
        f"sees (s3://…, gs://…), or say by --shared {os.path.dirname(path.value.rstrip('/')) or '/'} that this folder "
        "is mounted at the same path on all"
    )


def _is_uploaded(value: str, uploaded: Collection[str]) -> bool:
    wanted = os.path.normpath(value)
    return any(
        name == wanted or name.startswith(f"{wanted}/") or fnmatch.fnmatch(name, wanted) for name in uploaded
    )
