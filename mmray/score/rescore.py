"""Scores random rows of an output again, and compares: whether what stands there is what the model says.

Reads a run's slices and its bundle -> gives what differs. A tolerance is that of the formats of both forward passes.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmray.bundle import load_bundle
from mmray.errors import BundleError
from mmray.model.precision import computes_bf16
from mmray.options import ScoreConfig
from mmray.predictor import TOLERANCE, Predictor
from mmray.score.commit import Output, note_of, part_key
from mmray.slices import Slice
from mmray.source import ImageSource
from mmray.table import Reason, cells

SAME = ("predicted_label", "modalities_used", "status", "reason")
LEFT_ALONE = (Reason.DECODE_CRASH, Reason.DECODE_TIMEOUT, Reason.DECODE_OOM, Reason.MODEL_CRASH, Reason.UNAVAILABLE)
Row = Mapping[str, Any]
Rows = dict[int, list[int]]
"""Slice -> some of its rows, counted from its first."""


def rescorer(bundle: str, owner: Mapping[str, Any]) -> Predictor:
    """Returns the predictor that a run was scored with, as its `run.json` says, on this machine's CPUs.

    Raises:
        BundleError: the bundle is damaged or of another model, or its golden rows come out differently here.
    """
    loaded, identity = load_bundle(bundle), owner["identity"]
    if loaded.fingerprint != identity["fingerprint"]:
        raise BundleError(
            f"the bundle at {bundle} is of another model ({loaded.fingerprint[:12]}) than the one that scored this "
            f"({identity['fingerprint'][:12]}); give that one with --bundle"
        )
    given = {name: value for name, value in identity["options"].items() if name in ScoreConfig.model_fields}
    if given.get("precision") == "bf16" and not computes_bf16("cpu"):  # of a GPU, say: then as near as bf16 is
        given["precision"] = "fp32"
    options = ScoreConfig.model_validate(given)
    return Predictor.on_this_worker(loaded, ImageSource(options.image_roots, loaded.config.image.max_bytes), options)


def sample_rows(slices: Sequence[Slice], sample: int, seed: int) -> Rows:
    """Draws rows of a table without return; one seed draws the same ones."""
    ends = list(accumulate(piece.num_rows for piece in slices))
    drawn = np.sort(np.random.default_rng(seed).choice(ends[-1], min(sample, ends[-1]), replace=False))
    found: Rows = {}
    for row, k in zip(drawn, np.searchsorted(ends, drawn, side="right"), strict=True):
        found.setdefault(int(k), []).append(int(row) - ends[k] + slices[k].num_rows)
    return found


def differences(
    target: Output, plan_hash: str, piece: Slice, rows: Sequence[int], predictor: Predictor
) -> tuple[int, list[str]]:
    """Returns how many of some rows of a slice were compared, and what is different about them.

    Those that killed a process, or had no image then, are left alone.
    """
    key = part_key(plan_hash, piece.index)
    columns = list(dict.fromkeys([*map(predictor.column, predictor.modalities), *(f.name for f in predictor.fields)]))
    with target.store.open(key) as source:
        scored = pq.read_table(source, columns=columns, use_threads=False).take(pa.array(rows))
    alive = [k for k, reason in enumerate(cells(scored["reason"])) if reason not in LEFT_ALONE]
    scored = scored.take(pa.array(alive, pa.int64()))
    again = predictor.score(scored.drop_columns([field.name for field in predictor.fields]))
    formats = {predictor.precision, note_of(scored.schema.metadata)["precision"]}
    tolerance = max(TOLERANCE[name] for name in formats)
    # Where labels are about as likely, bf16 may well prefer another.
    same = SAME if formats == {"fp32"} else SAME[1:]
    pairs = zip(alive, scored.to_pylist(), again.to_pylist(), strict=True)
    found = [(k, difference(want, got, predictor.bundle.score_range, tolerance, same)) for k, want, got in pairs]
    return len(alive), [f"{key}:{rows[k]}: {what}" for k, what in found if what]


def difference(
    want: Row, got: Row, score_range: tuple[float, float], tolerance: float, same: Sequence[str] = SAME
) -> str | None:
    """Says in what a row that was scored twice differs, if it does beyond a tolerance of its score."""
    for name in same:
        if want.get(name) != got.get(name):
            return f"{name} {want.get(name)!r}, scored again {got.get(name)!r}"
    if distance(want, got, score_range) > tolerance:
        return f"score {want['score']:.6f}, scored again {got['score']:.6f}"
    return None


def distance(want: Row, got: Row, score_range: tuple[float, float]) -> float:
    """Returns how far apart two scores are, in units of the bundle's score range; 0 where there is none."""
    if want["score"] is None or got["score"] is None:
        return 0.0
    low, high = score_range
    return float(abs(want["score"] - got["score"]) / (high - low))
