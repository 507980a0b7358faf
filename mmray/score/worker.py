"""One scoring process: reads a slice, scores it, commits it. A plain callable; Ray only places it.

Reads a row per slice -> gives a row per receipt. Rows of the table itself never leave the process but into their file.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa

from mmray import __version__
from mmray.bundle import Bundle, load_bundle
from mmray.options import ScoreConfig
from mmray.predictor import Feed, OnStage, Predictor, timed
from mmray.score.carry import Carry
from mmray.score.commit import Output, Receipt
from mmray.score.ledger import Ledger
from mmray.slices import Slice, read_slice, slices_from_arrow
from mmray.source import ImageSource


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
        source = ImageSource(image_roots, bundle.config.image.max_bytes)
        feed = feed_of(bundle) if feed_of else None
        self._predictor = Predictor.on_this_worker(bundle, source, options, feed=feed, on_stage=on_stage)
        self._output, self._plan_hash = Output(output_uri), plan_hash
        self._carry, self._on_stage = carry, on_stage

    def __call__(self, rows: pa.Table) -> pa.Table:
        receipts = [self.score(piece) for piece in slices_from_arrow(rows)]
        return pa.Table.from_pylist([receipt_to_row(receipt) for receipt in receipts])

    def score(self, piece: Slice) -> Receipt:
        """Scores and commits one slice."""
        rows = timed(self._on_stage, "read", read_slice, piece)
        if self._carry is None:
            scored, carried = self._predictor.score(rows), 0
        else:
            scored, carried = self._carry.score(piece, rows, self._predictor)
        ledger = Ledger.of(scored, self._predictor.bundle.score_range, carried)
        provenance = {
            "fingerprint": self._predictor.bundle.fingerprint,
            "precision": self._predictor.precision,
            "mmray_version": __version__,
        }
        commit = partial(self._output.commit, self._plan_hash, piece)
        return timed(self._on_stage, "commit", commit, scored, ledger, provenance)


def receipt_to_row(receipt: Receipt) -> dict[str, Any]:
    """Returns a receipt as a row that Ray Data can carry."""
    ledger = json.dumps(receipt.ledger.to_dict())
    return {"slice": receipt.slice, "key": receipt.key, "size": receipt.size, "ledger": ledger}


def receipt_from_row(row: dict[str, Any]) -> Receipt:
    """Reads what `receipt_to_row` wrote."""
    return Receipt(row["slice"], row["key"], row["size"], Ledger.from_dict(json.loads(row["ledger"])))
