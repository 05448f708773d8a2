"""What a config means at this moment, as a generation: which index version, which weights, which fusion."""

from __future__ import annotations

from raytower.errors import InputError
from raytower.index.reader import check_fingerprint
from raytower.index.versions import open_manifest
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.directory import resolve_model
from raytower.models.encoder import Encoder, read_encoder_info
from raytower.retrieval.load import fusion_of
from raytower.serving.calls import DEFAULT_COLLECTION
from raytower.serving.config import ServeConfig
from raytower.serving.generation import ComputeEntry, Generation, ModelEntry
from raytower.serving.opening import fusion_entry, manifest_sha256


def generation_of(config: ServeConfig, version: str | None = None) -> Generation:
    """The generation of an index version; None is the published one.

    Raises:
        InputError: no such index or model. FormatError: another encoder made the index.
    """
    manifest = open_manifest(config.index, version)
    name = encoder_for(config, manifest.encoder)
    encoder = ModelEntry(uri=name, fingerprint=encoder_fingerprint(name))
    check_fingerprint(manifest, encoder.fingerprint, name)
    reranker = fusion = None
    if config.reranker:
        model = CrossEncoder.load(config.reranker)
        reranker = ModelEntry(uri=config.reranker, fingerprint=model.fingerprint)
        fusion = fusion_of(config.reranker, model.fusion, config.fusion_weight)
    prompts = Encoder.load(name).prompts if config.query_prefix is None else {}
    return Generation(
        collection=DEFAULT_COLLECTION,
        index=config.index,
        index_version=manifest.version,
        manifest_sha256=manifest_sha256(manifest),
        encoder=encoder,
        reranker=reranker,
        fusion=fusion_entry(fusion),
        query_prefix=prompts.get("query", "") if config.query_prefix is None else config.query_prefix,
        document_prefix=manifest.prefix,
        compute=ComputeEntry(
            dtype=config.dtype, max_length=config.max_length, rerank_max_length=config.rerank_max_length
        ),
    )


def encoder_fingerprint(name: str) -> str:
    """The fingerprint of an encoder's weights: as its directory records it, else computed."""
    return str(read_encoder_info(resolve_model(name)).get("fingerprint") or Encoder.load(name).fingerprint)


def encoder_for(config: ServeConfig, recorded: str | None) -> str:
    """The encoder to load: the config's, else the one that the index records.

    Raises:
        InputError: neither names one.
    """
    name = config.encoder or recorded
    if not name:
        raise InputError(
            f"index {config.index!r} records no encoder; name the one it was made with as `encoder`"
        )
    return name
