"""What Ray places: a slice scorer that counts, logs, and has its rows prepared where the placement says.

Its log lines are JSON, one a slice, in the log of its Ray worker: `event`, `run`, `slice` and what goes with them.
"""

import json
import logging
import secrets
import sys
import threading
import time
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from mmray.options import ScoreConfig
from mmray.score.carry import Carry
from mmray.score.commit import Receipt, receipts_to_arrow
from mmray.score.feed import ClusterFeed
from mmray.score.meters import ActorMeters
from mmray.score.worker import Scored, WatchedScorer
from mmray.slices import SPARE, Slice, slices_from_arrow
from mmray.table import Status

LATE_EVERY_S = 0.5
_log = logging.getLogger(__name__)


class ScoringActor(WatchedScorer):
    """A scorer among others on a cluster."""

    def __init__(
        self,
        bundle_uri: str,
        output_uri: str,
        plan_hash: str,
        image_roots: tuple[str, ...],
        carry: Carry | None,
        foreman: Any,
        options: ScoreConfig,
    ) -> None:
        self._run, self._foreman = plan_hash[:8], foreman
        self._meters = ActorMeters(self._run)
        _log_to_stderr()
        self._me = ray.get_runtime_context().current_actor
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._meters.restarted()
            foreman.forget.remote(self._me)
        feed_of = partial(ClusterFeed, roots=image_roots, options=options) if options.placement == "cluster" else None
        arguments = (bundle_uri, output_uri, plan_hash, image_roots, options)
        self._here = threading.local()
        super().__init__(*arguments, carry=carry, on_stage=self._meters.stage, feed_of=feed_of)
        node = ray.get_runtime_context().get_node_id()
        self._event("ready", node=node, fingerprint=self._predictor.bundle.fingerprint)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Scores slices, those that the foreman lets begin."""
        slices = slices_from_arrow(rows)
        work = self._late() if slices == [SPARE] else [(piece, 0) for piece in slices]
        receipts = [self._score_noted(piece, beside) for piece, beside in work]
        return receipts_to_arrow(receipt for receipt in receipts if receipt is not None)

    def _late(self) -> list[tuple[Slice, int]]:
        """Returns a slice that takes too long, and how many others are at it; none, when all are done."""
        while found := ray.get(self._foreman.late.remote(self._me)):
            if found is not True:
                self._event("slice doubled", slice=found[0].index)
                return [found]
            time.sleep(LATE_EVERY_S)
        return []

    def _score_noted(self, piece: Slice, beside: int) -> Receipt | None:
        attempt, receipt = secrets.token_hex(8), None
        if not ray.get(self._foreman.begin.remote(attempt, piece, self._me)):
            return None
        self._here.attempt = attempt
        try:
            receipt = self.score(piece, beside)
        finally:
            self._foreman.end.remote(attempt, receipt is not None)
        return receipt

    def score(self, piece: Slice, beside: int = 0) -> Receipt:
        """Scores, commits, counts and logs one slice."""
        started = time.perf_counter()
        with self._meters.slice():
            try:
                receipt = super().score(piece, beside)
            except Exception as error:
                self._event("slice failed", slice=piece.index, uri=piece.uri, error=str(error))
                raise
        self._meters.committed(receipt)
        counts = {status.value: receipt.ledger.count(status) for status in Status}
        seconds = round(time.perf_counter() - started, 3)
        self._event("slice committed", slice=piece.index, created=receipt.created, seconds=seconds, **counts)
        return receipt

    def _score_apart(self, piece: Slice, rows: pa.Table) -> Scored:
        self._event("slice apart", slice=piece.index)
        self._foreman.apart.remote(self._here.attempt)
        return super()._score_apart(piece, rows)

    def _event(self, event: str, **fields: Any) -> None:
        _log.info(json.dumps({"event": event, "run": self._run, "time": round(time.time(), 3), **fields}))


def _log_to_stderr() -> None:
    if not _log.handlers:
        _log.addHandler(logging.StreamHandler(sys.stderr))
        _log.setLevel(logging.INFO)
        _log.propagate = False
