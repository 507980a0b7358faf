"""Prepares the rows of an actor by tasks on any node with a free CPU, for nodes whose GPUs outrun their own CPUs.

Reads the cells of a batch -> gives its features through Ray's object store; a task that is lost runs again elsewhere.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from mmray.bundle import Bundle
from mmray.cluster import MAX_RETRIES
from mmray.config import Config
from mmray.options import ScoreConfig
from mmray.preprocess import Features, Preprocessor
from mmray.preprocess.image import prepare_decoders
from mmray.preprocess.text import Vocabulary
from mmray.source import ImageSource

How = tuple[Config, Vocabulary | None, Sequence[str], ScoreConfig]


class ClusterFeed:
    """Called with the cells of a batch, as a `Feed` is."""

    def __init__(self, bundle: Bundle, roots: Sequence[str], options: ScoreConfig) -> None:
        self._task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(_prepare)
        # Once for the actor, not once for each task.
        how: How = (bundle.config, bundle.vocabulary, roots, options)
        self._how = ray.put(how)

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> Future[Features]:
        features: Future[Features] = self._task.remote(self._how, columns).future()
        return features


def _prepare(how: How, columns: Mapping[str, Sequence[Any]]) -> Features:
    config, vocabulary, roots, options = how
    prepare_decoders()
    source = ImageSource(roots, config.image.max_bytes, options.on_unavailable)
    return Preprocessor(config, vocabulary, source, reads=options.reads)(columns)
