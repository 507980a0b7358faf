"""Scores items as they arrive: each read and decoded on its own, the model run over those that are ready."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mmray.bundle import Bundle, load_bundle
from mmray.predictor import Predictor
from mmray.preprocess import Features
from mmray.serve.batcher import Batcher
from mmray.serve.schema import Item, Result
from mmray.serve.settings import ServeConfig
from mmray.source import ImageSource


class ItemScorer:
    """One bundle, ready to answer. A slow image keeps nobody waiting who has a quick one."""

    def __init__(
        self,
        bundle_uri: str,
        settings: ServeConfig,
        on_batch: Callable[[Sequence[Result], float], None] = lambda results, seconds: None,
    ) -> None:
        """Loads the bundle and rescores its golden rows.

        Args:
            bundle_uri: folder or URI of the bundle.
            settings: its threads, batches and image roots.
            on_batch: called after each forward pass with its results and seconds.

        Raises:
            BundleError: the bundle is damaged or comes out differently here.
        """
        bundle = load_bundle(bundle_uri)
        source = ImageSource(settings.image_roots, bundle.config.image.max_bytes)
        self.bundle_uri = bundle_uri
        self._predictor = Predictor.on_this_worker(bundle, source, settings.score_config())
        self._decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
        # Without a reference back to this object: as the last request of a replaced bundle ends, its memory is free.
        # Serve freezes the garbage collector, which would never find a cycle.
        run = partial(_predict, self._predictor, on_batch)
        self._batcher: Batcher[Features, Result] = Batcher(run, settings.batch_size)

    @property
    def bundle(self) -> Bundle:
        """The bundle that answers."""
        return self._predictor.bundle

    @property
    def running_s(self) -> float:
        """For how many seconds the model has been at its current batch."""
        return self._batcher.running_s

    async def score(self, items: Sequence[Item]) -> list[Result]:
        """Scores items, in order."""
        return list(await asyncio.gather(*map(self._score, items)))

    async def _score(self, item: Item) -> Result:
        loop = asyncio.get_running_loop()
        features = await loop.run_in_executor(self._decoders, self._prepare, item)
        result = await self._batcher.submit(features)
        result.warnings = item.ignored(self._predictor.modalities) + self._cut(item)
        return result

    def _prepare(self, item: Item) -> Features:
        return self._predictor.prepare(item.cells(self._predictor.modalities))

    def _cut(self, item: Item) -> list[str]:
        return item.cut(self.bundle.config.text) if "text" in self._predictor.modalities else []


def _predict(
    predictor: Predictor, on_batch: Callable[[Sequence[Result], float], None], features: Sequence[Features]
) -> list[Result]:
    started = time.perf_counter()
    prediction = predictor.predict_features(Features.concatenate(features))
    results = [Result.of(row, predictor.bundle.labels) for row in predictor.scores(prediction).to_pylist()]
    on_batch(results, time.perf_counter() - started)
    return results
