"""One scoring process: reads a slice, scores it, commits it. A plain callable; Ray only places it.

Reads a row per slice -> gives a row per receipt. Rows of the table itself never leave the process but into their file.
"""

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from mmray import __version__
from mmray.bundle import Bundle, load_bundle
from mmray.errors import EnvironmentFaultError, MmrayError
from mmray.options import ScoreConfig
from mmray.predictor import Feed, OnStage, Predictor, timed
from mmray.score.attempts import Attempts, this_process
from mmray.score.carry import Carry, Score
from mmray.score.commit import Output, Receipt, receipts_to_arrow
from mmray.score.isolate import Isolation
from mmray.score.ledger import Ledger
from mmray.score.watchdog import Watchdog
from mmray.slices import Slice, read_slice, slices_from_arrow
from mmray.source import ImageSource
from mmray.table import Reason

MANY_ROWS = 16  # that are not finite: fewer may be the fate of a small slice
Scored = tuple[pa.Table, int]
"""The rows with the columns that scoring appends, and how many of them were not scored now."""
_log = logging.getLogger(__name__)


class SliceScorer:
    """Scores slices with one loaded model; from several threads, one slice is read or committed beside another."""

    def __init__(
        self,
        bundle_uri: str,
        output_uri: str,
        plan_hash: str,
        image_roots: tuple[str, ...],
        options: ScoreConfig,
        *,
        carry: Carry | None = None,
        on_stage: OnStage = lambda stage, seconds: None,
        feed_of: Callable[[Bundle], Feed] | None = None,
    ) -> None:
        """Loads the bundle.

        Args:
            bundle_uri: folder or URI of the bundle.
            output_uri: folder or URI of the run's output.
            plan_hash: which run it is.
            image_roots: folders and URIs that images may be read from.
            options: precision, batch size, threads, device.
            carry: where to look for rows that were scored before.
            on_stage: called with `read`, `prepare`, `forward` or `commit` and the seconds that something took there.
            feed_of: makes who prepares batches; by default this process does.

        Raises:
            BundleError: the bundle is damaged, or its golden rows come out differently here.
        """
        bundle = load_bundle(bundle_uri)
        source = ImageSource(image_roots, bundle.config.image.max_bytes, options.on_unavailable)
        feed = feed_of(bundle) if feed_of else None
        self._on_stage_too, self._stages = on_stage, Stages()
        self._predictor = Predictor.on_this_worker(bundle, source, options, feed=feed, on_stage=self._on_stage)
        self._output, self._plan_hash = Output(output_uri), plan_hash
        self._attempts = Attempts(self._output.store)
        self._carry = carry
        self._isolation = Isolation(self._predictor, bundle_uri, image_roots, self._on_stage)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return receipts_to_arrow(self.score(piece) for piece in slices_from_arrow(rows))

    def score(self, piece: Slice, beside: int = 0) -> Receipt:
        """Scores and commits one slice: in this process, or apart from it where another died at it.

        One that is there already is left alone: some are handed out together, and again where their process died.

        Args:
            piece: the slice.
            beside: how many other processes are known to be at it.

        Raises:
            EnvironmentFaultError: the machine or the store failed, which no row is blamed for.
        """
        if found := self._output.found(self._plan_hash, piece):
            return found
        begun = time.perf_counter()
        with self._attempts.begin(piece, beside) as deaths:
            rows = timed(self._on_stage, "read", read_slice, piece)
            scored, carried = self._score_apart(piece, rows) if deaths else self._score_here(piece, rows)
            _refuse_nonfinite(piece, scored)
            ledger = Ledger.of(scored, self._predictor.bundle.score_range, carried)
            provenance = {
                "fingerprint": self._predictor.bundle.fingerprint,
                "precision": self._predictor.precision,
                "mmray_version": __version__,
            }
            commit = partial(self._output.commit, self._plan_hash, piece)
            receipt = timed(self._on_stage, "commit", commit, scored, ledger, provenance)
            took_s = time.perf_counter() - begun
            return replace(receipt, deaths=deaths, seconds=self._stages.take(), took_s=took_s, process=this_process())

    def _on_stage(self, stage: str, seconds: float) -> None:
        self._on_stage_too(stage, seconds)
        self._stages.add(stage, seconds)

    def _score_here(self, piece: Slice, rows: pa.Table) -> Scored:
        try:
            return self._scored(piece, rows, self._predictor.score)
        except (MmrayError, torch.AcceleratorError):
            raise
        except Exception as error:  # it cost no process, but may well be some row's
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.warning("slice %d is scored apart after %s:\n%s", piece.index, type(error).__name__, where)
            return self._score_apart(piece, rows)

    def _score_apart(self, piece: Slice, rows: pa.Table) -> Scored:
        with self._isolation as isolation:
            return self._scored(piece, rows, isolation.score)

    def _scored(self, piece: Slice, rows: pa.Table, score: Score) -> Scored:
        if self._carry is None:
            return score(rows), 0
        return self._carry.score(piece, rows, self._predictor, score)


class WatchedScorer(SliceScorer):
    """One whose process ends itself where a slice gets on no more, or its GPU has failed; a process can have one."""

    def __init__(self, *arguments: Any, on_stage: OnStage = lambda stage, seconds: None, **more: Any) -> None:
        """Takes what `SliceScorer` does; the options come last of the positional arguments."""
        self._watchdog = Watchdog(arguments[-1].stuck_after_s)
        super().__init__(*arguments, on_stage=on_stage, **more)

    def score(self, piece: Slice, beside: int = 0) -> Receipt:
        """See `SliceScorer.score`."""
        with self._watchdog.watching():
            return super().score(piece, beside)

    def _score_here(self, piece: Slice, rows: pa.Table) -> Scored:
        try:
            return super()._score_here(piece, rows)
        except torch.AcceleratorError as error:  # a GPU that failed once answers this process no more
            _log.critical("the process ends at slice %d: %s", piece.index, error)
            os._exit(1)

    def _score_apart(self, piece: Slice, rows: pa.Table) -> Scored:
        with self._watchdog.paused():  # its child is watched by itself
            return super()._score_apart(piece, rows)

    def _on_stage(self, stage: str, seconds: float) -> None:
        super()._on_stage(stage, seconds)
        self._watchdog.progress()


class Stages:
    """Seconds that a process spent in each stage, until somebody takes them along."""

    def __init__(self) -> None:
        self._seconds, self._lock = dict[str, float](), threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def take(self) -> dict[str, float]:
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return {stage: round(seconds, 4) for stage, seconds in taken.items()}


def _refuse_nonfinite(piece: Slice, scored: pa.Table) -> None:
    """Raises where most rows of a slice came out as NaN or infinity.

    Cells are pixels and words, which are finite, and golden rows came out right: a row or a kind of rows can be beyond
    what the weights were trained for, but hardly most of a slice. A memory that fails or a wrong kernel spares few.
    """
    bad = scored["reason"].to_pylist().count(Reason.NONFINITE_OUTPUT)
    good = scored.num_rows - scored["score"].null_count
    if bad >= MANY_ROWS and bad > good:
        raise EnvironmentFaultError(
            f"the model gave NaN or infinity for {bad} of {bad + good} rows of slice {piece.index} ({piece.uri}): that "
            "is the machine and not the rows; run again elsewhere"
        )
