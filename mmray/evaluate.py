"""Measures a bundle on a labelled table: the fused prediction beside each modality alone and the mean of these.

Reads a bundle and a table -> gives metrics of several views of the same model, of groups of rows, and at other weights
of the image, all from one pass (`labelled.py`). It keeps outputs and targets (4 bytes for each label, view and weight),
not rows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmray.bundle_info import BundleInfo, read_info
from mmray.errors import ConfigError, TableError
from mmray.labelled import FUSED, predicted, unpacked
from mmray.metrics import measure
from mmray.mistakes import Mistake, worst_of
from mmray.options import COLUMNS, ScoreConfig, column_of
from mmray.score.scored import MAX_GROUPS, OTHERS
from mmray.slices import Slice, cut, open_table
from mmray.store import open_store
from mmray.table import require_types

LATE = "late average"
Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Group:
    """Rows that have something in common, and what the fused prediction is worth on them."""

    name: str
    rows: int
    """Labelled rows; those without any modality have no prediction and are in no metric."""
    metrics: Metrics
    """Empty where no row has a prediction."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    info: BundleInfo
    table: str
    split: str | None
    rows: int
    """Labelled rows measured."""
    skipped: int
    """Rows without a label that the model knows, or that could not be predicted."""
    metrics: dict[str, Metrics]
    """View -> metric -> value.

    `all modalities` is the fused prediction, `image only` and `text only` the same model with the others withheld,
    `late average` the mean of these; each on the rows that have what it needs.
    """
    groups: dict[str, list[Group]]
    """By what (`modalities used`, a column) -> groups of rows."""
    sweep: dict[float, Metrics]
    """Weight of the image in every row -> metrics; empty where the fusion has none."""
    outputs: dict[str, NDArray[np.float32]]
    """View -> [N, K], as the predictor gives them; NaN where a view cannot say anything."""
    targets: NDArray[np.generic]
    """[N] or [N, K], see `mmray.labels.encode_targets`."""
    image_weight: NDArray[np.float32]
    """Weight of the image in each row measured, where the fusion has one; else empty."""
    mistakes: list[Mistake]
    """The worst, the worst first."""


def evaluate_bundle(
    bundle: str,
    table: str,
    options: ScoreConfig | None = None,
    *,
    split: str | None = None,
    by: str | None = None,
    on_start: Callable[[int], None] = lambda rows: None,
    on_slice: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Measures a bundle on the labelled rows of a table.

    Args:
        bundle: folder or URI of a bundle.
        table: parquet file, folder or glob.
        options: columns, roots and placement, as in scoring.
        split: value of the bundle's split column that rows must have; all rows by default.
        by: column whose values group the rows, each group measured by itself.
        on_start: called with the rows of the table.
        on_slice: called with the rows of each slice as it is done.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    options = options or ScoreConfig()
    info = read_info(bundle)
    slices, roots = plan_slices(info, table, options, split, by)
    options = options.model_copy(update={"placement": "local"})  # one pass over few rows
    found, rows = list[dict[str, Any]](), {piece.index: piece.num_rows for piece in slices}
    on_start(sum(rows.values()))
    with closing(predicted(slices, (open_store(bundle).uri, roots, split, by), options)) as parts:
        for part in parts:
            found.append(part)
            on_slice(rows[part["slice"]])
    return measure_slices(info, found, table, split)


def plan_slices(
    info: BundleInfo, table: str, options: ScoreConfig, split: str | None, by: str | None
) -> tuple[list[Slice], tuple[str, ...]]:
    """Returns the slices of a table to measure, and where its images may lie.

    Raises:
        MmrayError: the table lacks a column that is needed.
    """
    trained = info.config.table
    columns = {name: column_of(name, options, trained) for name in trained.modalities}
    if split is not None and trained.split_column is None:
        raise ConfigError("--split needs a bundle trained with table.split_column; leave it out to measure every row")
    more = [trained.label_column, by, trained.split_column if split is not None else None]
    needed = [*columns.values(), *(name for name in more if name is not None)]
    remedy = f"{COLUMNS}; labels stand in the column trained on"
    opened = open_table(table, needed, lambda schema, where: require_types(schema, columns, where), remedy=remedy)
    return cut(opened, options.slice_rows), opened.image_roots(options.image_roots)


def measure_slices(info: BundleInfo, found: Sequence[Mapping[str, Any]], table: str, split: str | None) -> Evaluation:
    """Measures what `predicted` gave of all slices of a table, in any order.

    Raises:
        TableError: there is nothing to measure.
    """
    found = sorted(found, key=lambda row: int(row["slice"]))
    parts = [unpacked(row["arrays"]) for row in found]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    task, targets = info.config.task.kind, arrays["targets"]
    views = _named(arrays, "view/")
    if len(views) > 1:
        views[LATE] = _late_average([view for name, view in views.items() if name != FUSED])
    known = np.isfinite(views[FUSED]).all(axis=1)
    rows = int(known.sum())
    if not rows:
        raise TableError(f"no row of {table!r} has a label and a prediction; there is nothing to measure")
    measured = {name: _measured(task, view, targets) for name, view in views.items()}
    return Evaluation(
        info=info,
        table=table,
        split=split,
        rows=rows,
        skipped=sum(row["skipped"] for row in found) + len(targets) - rows,
        metrics={name: metrics for name, metrics in measured.items() if metrics},
        groups={by: _groups(task, names, views[FUSED], targets) for by, names in _named(arrays, "group/").items()},
        sweep={float(a): _measured(task, view, targets) for a, view in _named(arrays, "alpha/").items()},
        outputs=views,
        targets=targets,
        image_weight=arrays["image_weight"][known] if "image_weight" in arrays else np.zeros(0, np.float32),
        mistakes=worst_of(json.loads(row["mistakes"]) for row in found),
    )


def _named(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _measured(task: str, outputs: NDArray[np.float32], targets: NDArray[np.generic]) -> Metrics:
    """Returns the metrics of the rows that have outputs: no view says anything of a row whose modality is absent."""
    known = np.isfinite(outputs).all(axis=1)
    return measure(task, outputs[known], targets[known]) if known.any() else {}


def _late_average(views: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Returns the mean of the outputs [N, K] of what each row has; NaN where it has nothing."""
    stacked = np.stack(views)
    known = np.isfinite(stacked)
    total, count = np.where(known, stacked, 0).sum(axis=0), known.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _groups(
    task: str, names: NDArray[np.str_], outputs: NDArray[np.float32], targets: NDArray[np.generic]
) -> list[Group]:
    """Returns the groups of equal names, the largest first; beyond `MAX_GROUPS` one group of all others."""
    values, counts = np.unique(names, return_counts=True)
    kept = values[np.argsort(-counts, kind="stable")][:MAX_GROUPS]
    masks = {str(value): names == value for value in kept}
    if len(values) > len(kept):
        masks[OTHERS] = ~np.isin(names, kept)
    return [Group(name, int(m.sum()), _measured(task, outputs[m], targets[m])) for name, m in masks.items()]
