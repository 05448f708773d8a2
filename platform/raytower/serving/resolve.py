"""From what a config names to what is served: one `Generation`, with everything checked that can be without serving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytower.annotation.classify_settings import ClassifySettings
from raytower.annotation.deciding import read_settings
from raytower.annotation.labels import count_labels
from raytower.config import make_config
from raytower.errors import InputError
from raytower.index.hybrid import HybridFusion, check_mode, modes_of
from raytower.index.manifest import IndexManifest
from raytower.index.reader import check_fingerprint
from raytower.index.table import DocumentTable
from raytower.index.versions import open_manifest, published_version
from raytower.serving.conductor import Served
from raytower.serving.config import CollectionConfig, ServeConfig
from raytower.serving.generation import (
    MOST_LABELS,
    ComputeEntry,
    FusionEntry,
    Generation,
    HybridEntry,
    ModelEntry,
    needs_no_encoder,
)
from raytower.storage import Location, absolute_if_local

if TYPE_CHECKING:
    from raytower.models.fusion import Fusion

# A directory's files, their sizes and when they were written.
_Files = frozenset[tuple[str, int, int]]
_fingerprints: dict[Path, tuple[_Files, str]] = {}
# Settings that may be paths of this machine.
_PLACES = ("index", "encoder", "reranker", "classifier")


def resolve_all(config: ServeConfig) -> dict[str, Served]:
    """What every collection of a server serves by its config, at this moment. Raises as `generation_of`."""
    return {
        name: resolve_settings(name, collection.settings())
        for name, collection in config.served_collections().items()
    }


def resolve_settings(collection: str, settings: Mapping[str, Any], version: str | None = None) -> Served:
    """What a collection serves by its settings, the keys of `CollectionConfig`. Raises as `generation_of`."""
    config = make_config(CollectionConfig, absolute_places(settings), f"collection {collection!r}")
    return Served(generation=generation_of(collection, config, version), settings=config.settings())


def newest_version(index: str) -> str | None:
    """The index's newest version; None where there is none. Reads neither it nor a model. Raises StorageError."""
    return published_version(Location.of(index))


def absolute_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by which every process finds the same index and models, whatever its folder and its environment."""
    return {
        name: [absolute_if_local(each) for each in value]
        if name == "classify_tuned"
        else absolute_if_local(value)
        if name in _PLACES and value
        else value
        for name, value in settings.items()
    }


def generation_of(collection: str, config: CollectionConfig, version: str | None = None) -> Generation:
    """What a collection serves by its config: an index version (None: the newest) and the models beside it.

    Raises:
        InputError: no such index, version or model; the index names no encoder; a fusion weight without stored fusion,
            or for another mode than its; a mode that the index does not have.
        FormatError: another encoder made the index, or a file is damaged.
    """
    manifest = open_manifest(config.index, version)
    encoder_name = _encoder_name(config, manifest)
    # An encoder that records no fingerprint is loaded for it, but not one that may never be needed.
    late = needs_no_encoder(config.mode, config.classify_modes)
    encoder, path = _encoder_entry(encoder_name, manifest.fingerprint if late else None)
    check_fingerprint(manifest, encoder.fingerprint, encoder_name)
    check_mode(manifest, config.mode)
    reranker, fusion = _reranker(config)
    classifier = _classifier_entry(config.classifier) if config.classifier else None
    return Generation(
        collection=collection,
        index=absolute_if_local(config.index),
        index_version=manifest.version,
        manifest_sha256=manifest.sha256(),
        encoder=encoder,
        reranker=reranker,
        classifier=classifier,
        fusion=FusionEntry(**fusion.to_dict()) if fusion else None,
        modes=modes_of(manifest, config.mode),
        hybrid=HybridEntry(**asdict(HybridFusion.of(manifest, config.hybrid))),
        query_prefix=_query_prompt(encoder_name, path)
        if config.query_prefix is None
        else config.query_prefix,
        document_prefix=manifest.prefix,
        document_max_length=manifest.max_length,
        label_field=config.label_field,
        classify_modes=_classify_modes(config),
        classify_settings=_classify_settings(config, encoder, classifier),
        num_labels=_num_labels(config, manifest),
        compute=ComputeEntry(
            engine=config.engine,
            dtype=config.dtype,
            max_length=config.max_length,
            rerank_max_length=config.rerank_max_length,
        ),
    )


def _encoder_name(config: CollectionConfig, manifest: IndexManifest) -> str:
    name = config.encoder or manifest.encoder
    if not name:
        raise InputError(
            f"index {config.index!r} records no encoder; name the one it was made with as `encoder`"
        )
    return name


def _encoder_entry(name: str, unrecorded: str | None) -> tuple[ModelEntry, Path]:
    """`unrecorded` is taken for a fingerprint that the directory does not record; None loads the encoder for it."""
    from raytower.models.directory import resolve_model  # torch, which checking a config does without
    from raytower.models.encoder import Encoder, read_encoder_info
    from raytower.models.model_class import refuse_other_class

    path = resolve_model(name)
    refuse_other_class(path, "encoder")
    info = read_encoder_info(path)
    if unrecorded is not None and not info.get("fingerprint"):
        return ModelEntry(uri=absolute_if_local(name), fingerprint=unrecorded), path
    return _entry(name, path, info, lambda: Encoder.load(path).fingerprint), path


def _classifier_entry(name: str) -> ModelEntry:
    from raytower.models.directory import read_info, resolve_model
    from raytower.models.model_class import refuse_other_class
    from raytower.models.text_classifier import TextClassifier

    path = resolve_model(name)
    refuse_other_class(path, "classifier")
    return _entry(name, path, read_info(path), lambda: TextClassifier.load(path).fingerprint)


def _reranker(config: CollectionConfig) -> tuple[ModelEntry | None, Fusion | None]:
    """The reranker and the fusion of its scores, by the rule of every command."""
    if config.reranker is None:
        if config.fusion_weight is not None:
            raise InputError(
                f"fusion_weight is {config.fusion_weight}, but there is no reranker; name one, or set it to null"
            )
        return None, None
    from raytower.models.cross_encoder import CrossEncoder
    from raytower.models.directory import read_info, resolve_model
    from raytower.models.fusion import Fusion
    from raytower.models.model_class import refuse_other_class
    from raytower.retrieval.load import fusion_in, fusion_of

    path = resolve_model(config.reranker)
    refuse_other_class(path, "reranker")
    info = read_info(path)
    stored = Fusion.from_dict(info["fusion"]) if info.get("fusion") else None
    entry = _entry(config.reranker, path, info, lambda: CrossEncoder.load(path).fingerprint)
    fusion = fusion_of(config.reranker, stored, config.fusion_weight)
    fusion_in(
        config.mode, fusion, config.fusion_weight
    )  # requests in the mode that it was tuned in use it anyway
    return entry, fusion


def _entry(name: str, path: Path, info: dict[str, Any], load_fingerprint: Callable[[], str]) -> ModelEntry:
    """A model that raytower did not write records no fingerprint; it is loaded for it, once while its files stay."""
    fingerprint = info.get("fingerprint")
    if not fingerprint:
        files = _files(path)
        known = _fingerprints.get(path)
        if known is None or known[0] != files:
            known = _fingerprints[path] = (files, load_fingerprint())
        fingerprint = known[1]
    return ModelEntry(uri=absolute_if_local(name), fingerprint=str(fingerprint))


def _files(folder: Path) -> _Files:
    """Stands for what is in a folder, without reading it."""
    found = ((str(file.relative_to(folder)), file.stat()) for file in folder.rglob("*") if file.is_file())
    return frozenset((name, facts.st_size, facts.st_mtime_ns) for name, facts in found)


def _query_prompt(name: str, path: Path) -> str:
    from raytower.models.directory import read_json_object, transformer_folder
    from raytower.models.trained_prefixes import say_untold_prefix

    found = read_json_object(path / "config_sentence_transformers.json").get("prompts")
    prompts = found if isinstance(found, dict) else {}
    say_untold_prefix("query", name, transformer_folder(path), prompts)
    return str(prompts.get("query", ""))


def _classify_settings(
    config: CollectionConfig, encoder: ModelEntry, classifier: ModelEntry | None
) -> tuple[ClassifySettings, ...]:
    """Raises InputError: settings of a way that is not served, of another model, or two of one way."""
    found: dict[str, ClassifySettings] = {}
    for name in config.classify_tuned:
        settings = read_settings(name)
        mode = settings.mode
        if mode not in _classify_modes(config):
            raise InputError(
                f"classify_tuned names {name!r}, which was tuned for mode {mode}, and the collection does not classify "
                "by it; add it to classify_modes (or name a classifier), or leave the file out"
            )
        if mode in found:
            raise InputError(
                f"classify_tuned names two files that were tuned for mode {mode}; keep one of them"
            )
        model = classifier if mode == "classifier" else encoder
        assert model is not None  # or the mode is not served
        settings.check(mode, model.fingerprint, None if mode == "classifier" else config.label_field, name)
        found[mode] = settings
    return tuple(found.values())


def _num_labels(config: CollectionConfig, manifest: IndexManifest) -> int:
    if "labels" not in config.classify_modes:
        return 0
    table = DocumentTable.open(Location.of(config.index), manifest.table_version)
    columns = ["id", "text", *({config.label_field} & set(table.schema.names) - {"id", "text"})]
    return count_labels(table.scan(columns), config.label_field, MOST_LABELS)


def _classify_modes(config: CollectionConfig) -> tuple[Any, ...]:
    return (*(("classifier",) if config.classifier else ()), *config.classify_modes)
