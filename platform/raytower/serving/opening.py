"""Opens a generation's parts in this process. Imports torch and FAISS, no Ray."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from raytower.errors import FormatError
from raytower.index.hybrid import HybridFusion
from raytower.index.manifest import IndexManifest
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.models.fusion import Fusion
from raytower.serving.calls import ServedModel
from raytower.serving.generation import Generation, needs_no_encoder
from raytower.serving.late_encoder import LateEncoder
from raytower.serving.models import ModelPool, model_name, trained_dimensions
from raytower.serving.parts import PairModel, Parts, RecallStage, TextModel
from raytower.serving.recall import LocalRecall


class LocalParts:
    """Opens generations with everything in this process. Models are shared between them."""

    def __init__(self, models: ModelPool, recall_threads: int = 4) -> None:
        self._models = models
        self._threads = ThreadPoolExecutor(recall_threads, thread_name_prefix="raytower-recall")

    def __call__(self, generation: Generation) -> Parts:
        """Raises InputError: no such index or model. FormatError: another encoder made the index, or damage."""
        manifest = checked_manifest(generation)
        return self.of_stages(
            generation, manifest, lambda: self.recall(generation), lambda: self.scorer(generation)
        )

    def recall(self, generation: Generation) -> LocalRecall:
        """A generation's index, all shards in this process."""
        return LocalRecall(Index.open(generation.index, generation.index_version), self._threads)

    def scorer(self, generation: Generation) -> PairModel | None:
        """A generation's reranker in this process; None where it has none."""
        return self._models.scorer(generation)

    def of_stages(
        self,
        generation: Generation,
        manifest: IndexManifest,
        recall: Callable[[], RecallStage],
        scorer: Callable[[], PairModel | None],
    ) -> Parts:
        """The parts of a generation whose index and reranker are opened by these, wherever they lie.

        Raises:
            FormatError: the encoder's vectors have another length than the index's.
        """
        # Then a request that asks for vectors loads it.
        late = needs_no_encoder(generation.modes[0], generation.classify_modes)
        encoder: TextModel
        if late:
            unloaded = ServedModel(
                name=model_name(generation.encoder.uri),
                max_length=None,
                dim=manifest.dim,
                dimensions=trained_dimensions(generation.encoder.uri),
            )
            encoder = LateEncoder(lambda: self._encoder(generation, manifest), unloaded)
        else:
            encoder = self._encoder(generation, manifest)
        return Parts(
            generation=generation,
            recall=recall(),
            encoder=encoder,
            scorer=scorer(),
            classifier=self._models.classifier(generation),
            fusion=Fusion(**generation.fusion.model_dump()) if generation.fusion else None,
            hybrid=HybridFusion(**generation.hybrid.model_dump()),
            kind=manifest.kind,
            metric=manifest.metric,
            measured_recall=manifest.recall,
            loads_late=late,
        )

    def _encoder(self, generation: Generation, manifest: IndexManifest) -> TextModel:
        encoder = self._models.encoder(generation)
        if encoder.served.dim != manifest.dim:
            raise FormatError(
                f"encoder {generation.encoder.uri!r} gives vectors of {encoder.served.dim}, the index holds "
                f"{manifest.dim}"
            )
        return encoder


def checked_manifest(generation: Generation) -> IndexManifest:
    """The manifest of a generation's index version. Raises FormatError where it is not the one that was meant."""
    manifest = open_manifest(generation.index, generation.index_version)
    if manifest.sha256() != generation.manifest_sha256:
        raise FormatError(
            f"version {generation.index_version} of index {generation.index} is not the one that generation "
            f"{generation.id} names: it was built anew meanwhile; reload the server"
        )
    return manifest
