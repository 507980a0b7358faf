"""One scoring process: reads a slice, scores it, commits it. A plain callable; Ray only places it.

Reads a row per slice -> gives a row per receipt. Rows of the table itself never leave the process but into their file.
"""

import json
from typing import Any

import pyarrow as pa

from mmray import __version__
from mmray.bundle import load_bundle
from mmray.config import ScoreConfig
from mmray.predictor import Predictor
from mmray.score.commit import Output, Receipt
from mmray.score.ledger import Ledger
from mmray.slices import Slice, read_slice, slices_from_arrow
from mmray.source import ImageSource


class SliceScorer:
    """Scores slices one after the other with one loaded model."""

    def __init__(
        self, bundle_uri: str, output_uri: str, plan_hash: str, image_roots: tuple[str, ...], options: ScoreConfig
    ) -> None:
        bundle = load_bundle(bundle_uri)
        source = ImageSource(image_roots, bundle.config.image.max_bytes)
        self._predictor = Predictor.on_this_worker(bundle, source, options)
        self._output = Output(output_uri)
        self._plan_hash = plan_hash

    def __call__(self, rows: pa.Table) -> pa.Table:
        receipts = [self.score(piece) for piece in slices_from_arrow(rows)]
        return pa.Table.from_pylist([receipt_to_row(receipt) for receipt in receipts])

    def score(self, piece: Slice) -> Receipt:
        """Scores and commits one slice."""
        scored = self._predictor.score(read_slice(piece))
        ledger = Ledger.of(scored, self._predictor.bundle.score_range)
        provenance = {
            "fingerprint": self._predictor.bundle.fingerprint,
            "precision": self._predictor.precision,
            "mmray_version": __version__,
        }
        return self._output.commit(self._plan_hash, piece, scored, ledger, provenance)


def receipt_to_row(receipt: Receipt) -> dict[str, Any]:
    """Returns a receipt as a row that Ray Data can carry."""
    ledger = json.dumps(receipt.ledger.to_dict())
    return {"slice": receipt.slice, "key": receipt.key, "size": receipt.size, "ledger": ledger}


def receipt_from_row(row: dict[str, Any]) -> Receipt:
    """Reads what `receipt_to_row` wrote."""
    return Receipt(row["slice"], row["key"], row["size"], Ledger.from_dict(json.loads(row["ledger"])))
