"""Measures a bundle on a labelled table: the fused prediction beside each modality alone.

Reads a bundle and a table -> gives metrics for three views of the same model: all modalities, and each with the others
withheld. Slices are predicted by the actor pool that scoring uses; the driver keeps outputs and targets, not rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmray.bundle import BundleInfo, load_bundle, read_info
from mmray.cluster import RAY_ERRORS, cluster, cpus_for, map_slices, unwrap
from mmray.errors import ConfigError, TableError
from mmray.labels import encode_targets, is_label
from mmray.metrics import confusion_matrix, measure
from mmray.options import ScoreConfig
from mmray.predictor import Predictor, column_of
from mmray.slices import Slice, cut, open_table, read_slice, slices_from_arrow
from mmray.source import ImageSource
from mmray.store import open_store
from mmray.table import cells, require_types

FUSED = "all modalities"


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    rows: int
    """Labelled rows measured."""
    skipped: int
    """Rows without a label that the model knows, or that could not be predicted."""
    metrics: dict[str, dict[str, float | None]]
    """View (`all modalities`, `image only`, `text only`) -> metric -> value."""
    confusion: list[list[int]] | None
    """Rows by true and predicted label, for binary and multiclass."""
    image_weight: NDArray[np.float32]
    """Weight of the image on each row where the fusion has one."""
    info: BundleInfo


def evaluate_bundle(
    bundle: str, table: str, options: ScoreConfig | None = None, *, split: str | None = None
) -> Evaluation:
    """Measures a bundle on the labelled rows of a table.

    Args:
        bundle: folder or URI of a bundle.
        table: parquet file, folder or glob.
        options: columns, roots and placement, as in scoring.
        split: value of the bundle's split column that rows must have; all rows by default.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    options = options or ScoreConfig()
    info = read_info(bundle)
    slices, roots = _plan(info, table, options, split)
    options = options.model_copy(update={"placement": "local"})  # one pass over few rows
    with cluster(cpus_for(options)):
        try:
            arguments = (open_store(bundle).uri, roots, split)
            rows = list(map_slices(slices, SlicePredictor, arguments, options, "mmray evaluate"))
        except RAY_ERRORS as error:
            raise unwrap(error, "evaluation") from error
    parts = [_unpack(row) for row in sorted(rows, key=lambda row: row["slice"])]
    return _measure(info, parts, sum(row["skipped"] for row in rows), table)


class SlicePredictor:
    """Predicts the labelled rows of slices; an actor of the pool."""

    def __init__(self, bundle: str, roots: Sequence[str], split: str | None, options: ScoreConfig) -> None:
        loaded = load_bundle(bundle)
        source = ImageSource(roots, loaded.config.image.max_bytes)
        self._predictor = Predictor.on_this_worker(loaded, source, options)
        self._split = split

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._predict(piece) for piece in slices_from_arrow(rows)])

    def _predict(self, piece: Slice) -> dict[str, Any]:
        config = self._predictor.bundle.config
        table = read_slice(piece)
        if self._split is not None:
            values = table[config.table.split_column].to_pylist()
            table = table.filter(pa.array([value == self._split for value in values], pa.bool_()))
        labels, task = self._predictor.bundle.labels, config.task.kind
        known_labels = [is_label(cell, task, labels) for cell in table[config.table.label_column].to_pylist()]
        labelled = table.filter(pa.array(known_labels, pa.bool_()))
        columns = {name: cells(labelled[self._predictor.column(name)]) for name in self._predictor.modalities}
        prediction = self._predictor.predict(columns, alone=len(columns) > 1)
        known = np.asarray(np.isfinite(prediction.outputs).all(axis=1))
        values = [v for v, keep in zip(labelled[config.table.label_column].to_pylist(), known, strict=True) if keep]
        targets = encode_targets(values, task, labels, config.table.label_column)
        views = {FUSED: prediction.outputs, **{f"{n} only": view for n, view in prediction.alone.items()}}
        weight = prediction.image_weight
        return {
            "slice": piece.index,
            "skipped": table.num_rows - len(values),
            "views": [{"name": name, "outputs": outputs[known].tolist()} for name, outputs in views.items()],
            "targets": targets.tolist(),
            "image_weight": [] if weight is None else weight[known].tolist(),
        }


def _plan(info: BundleInfo, table: str, options: ScoreConfig, split: str | None) -> tuple[list[Slice], tuple[str, ...]]:
    trained = info.config.table
    columns = {name: column_of(name, options, trained) for name in trained.modalities}
    if split is not None and trained.split_column is None:
        raise ConfigError("--split needs a bundle trained with table.split_column; leave it out to measure every row")
    needed = [
        *columns.values(),
        trained.label_column,
        *([trained.split_column] if split and trained.split_column else []),
    ]
    opened = open_table(table, needed, lambda schema, where: require_types(schema, columns, where))
    return cut(opened, options.slice_rows), opened.image_roots(options.image_roots)


def _unpack(row: dict[str, Any]) -> dict[str, Any]:
    views = {view["name"]: view["outputs"] for view in row["views"]}
    return {"views": views, "targets": row["targets"], "image_weight": row["image_weight"]}


def _measure(info: BundleInfo, parts: Sequence[dict[str, Any]], skipped: int, table: str) -> Evaluation:
    task = info.config.task.kind
    targets = np.asarray([target for part in parts for target in part["targets"]])
    if not len(targets):
        raise TableError(f"no row of {table!r} has a label and a prediction; there is nothing to measure")
    outputs = {
        name: np.asarray([row for part in parts for row in part["views"][name]], np.float32)
        for name in parts[0]["views"]
    }
    # A view cannot say anything of a row whose modality is absent; it is measured on the rows it can.
    known = {name: np.isfinite(view).all(axis=1) for name, view in outputs.items()}
    metrics = {
        name: measure(task, view[known[name]], targets[known[name]])
        for name, view in outputs.items()
        if known[name].any()
    }
    return Evaluation(
        rows=len(targets),
        skipped=skipped,
        metrics=metrics,
        confusion=confusion_matrix(outputs[FUSED], targets) if task in ("binary", "multiclass") else None,
        image_weight=np.asarray([weight for part in parts for weight in part["image_weight"]], np.float32),
        info=info,
    )
