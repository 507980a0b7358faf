"""Measures a bundle on a labelled table: the fused prediction beside each modality alone and the mean of these.

Reads a bundle and a table -> gives metrics of several views of the same model, of groups of rows, and at other weights
of the image, all from one pass. Slices are predicted by the actor pool that scoring uses, few rows by this process; it
keeps outputs and targets (4 bytes for each label, view and weight), not rows.
"""

import io
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mmray.bundle import load_bundle
from mmray.bundle_info import BundleInfo, read_info
from mmray.cluster import RAY_ERRORS, cluster, cpus_for, is_alone, map_slices, unwrap
from mmray.errors import ConfigError, TableError
from mmray.labels import encode_targets, is_label
from mmray.metrics import measure
from mmray.mistakes import Mistake, worst_of, worst_rows
from mmray.options import COLUMNS, ScoreConfig, column_of
from mmray.predictor import Predictor
from mmray.score.scored import MAX_GROUPS, OTHERS, group_name
from mmray.slices import Slice, cut, open_table, read_slice, slices_from_arrow, slices_to_arrow
from mmray.source import ImageSource
from mmray.store import open_store
from mmray.table import cells, require_types

FUSED, LATE = "all modalities", "late average"
FEW_ROWS = 20_000  # of which the first slice shows whether all of them would take long
PATIENCE_S = 15.0  # that a cluster and its processes take to start
ALPHAS = tuple(k / 10 for k in range(11))
USED = "modalities used"
Metrics = Mapping[str, float | None]
Arguments = tuple[str, tuple[str, ...], str | None, str | None]
"""Of a `SlicePredictor`, before its options."""


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
    with closing(_predicted(slices, (open_store(bundle).uri, roots, split, by), options)) as parts:
        for part in parts:
            found.append(part)
            on_slice(rows[part["slice"]])
    return measure_slices(info, found, table, split)


def _predicted(slices: Sequence[Slice], arguments: Arguments, options: ScoreConfig) -> Generator[dict[str, Any]]:
    """Yields what `SlicePredictor` finds in slices: here, as long as that is sooner than others would begin."""
    done = 0
    if _begins_here(sum(piece.num_rows for piece in slices), options):
        for part in _here(slices, arguments, options):
            yield part
            done += 1
    if done < len(slices):
        yield from _on_ray(slices[done:], arguments, options)


def _begins_here(rows: int, options: ScoreConfig) -> bool:
    if options.local is not None:
        return options.local
    many = options.needs_cluster or options.num_actors or options.gpus_per_actor
    return not many and rows <= FEW_ROWS and is_alone()


def _here(slices: Sequence[Slice], arguments: Arguments, options: ScoreConfig) -> Iterator[dict[str, Any]]:
    """Yields what is found in the first slices, or in all of them; a row that kills ends this process."""
    threads = torch.get_num_threads()
    try:
        predictor, started = SlicePredictor(*arguments, options), time.perf_counter()
        for k, piece in enumerate(slices):
            seconds_left = (time.perf_counter() - started) / max(k, 1) * (len(slices) - k)
            if k and seconds_left > PATIENCE_S and not options.local:
                return
            yield predictor(slices_to_arrow([piece])).to_pylist()[0]
    finally:
        torch.set_num_threads(threads)


def _on_ray(slices: Sequence[Slice], arguments: Arguments, options: ScoreConfig) -> Generator[dict[str, Any]]:
    with cluster(cpus_for(options)):
        try:
            yield from map_slices(slices, SlicePredictor, arguments, options, "mmray evaluate")
        except RAY_ERRORS as error:
            raise unwrap(error, "evaluation") from error


class SlicePredictor:
    """Predicts the labelled rows of slices; an actor of the pool."""

    def __init__(
        self, bundle: str, roots: Sequence[str], split: str | None, by: str | None, options: ScoreConfig
    ) -> None:
        loaded = load_bundle(bundle)
        source = ImageSource(roots, loaded.config.image.max_bytes)
        self._predictor = Predictor.on_this_worker(loaded, source, options)
        self._split, self._by = split, by

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._predict(piece) for piece in slices_from_arrow(rows)])

    def _predict(self, piece: Slice) -> dict[str, Any]:
        bundle, predictor = self._predictor.bundle, self._predictor
        task, trained = bundle.config.task.kind, bundle.config.table
        table, places, skipped = self._labelled(piece)
        columns = {name: cells(table[predictor.column(name)]) for name in predictor.modalities}
        prediction = predictor.predict(columns, alone=len(columns) > 1, alphas=ALPHAS)
        targets = encode_targets(table[trained.label_column].to_pylist(), task, bundle.labels, trained.label_column)
        (used,) = prediction.columns(["modalities_used"], task, bundle.labels)
        arrays = {
            "targets": targets,
            f"view/{FUSED}": prediction.outputs,
            **{f"view/{name} only": view for name, view in prediction.alone.items()},
            **{f"alpha/{alpha}": view for alpha, view in prediction.at_alpha.items()},
            f"group/{USED}": np.asarray([name or "none" for name in used], np.str_),
        }
        if self._by is not None:
            arrays[f"group/{self._by}"] = np.asarray([group_name(cell) for cell in cells(table[self._by])], np.str_)
        if prediction.image_weight is not None:
            arrays["image_weight"] = prediction.image_weight
        names = [f"{piece.uri.rpartition('/')[2]}:{piece.first_row + place}" for place in places]
        mistakes = worst_rows(predictor, names, columns, prediction.outputs, targets)
        return {
            "slice": piece.index,
            "skipped": skipped,
            "arrays": _packed(arrays),
            "mistakes": json.dumps(mistakes),
        }

    def _labelled(self, piece: Slice) -> tuple[pa.Table, NDArray[np.int64], int]:
        """Returns the rows of a slice to measure, where they lie in it, and how many have no label to measure by."""
        bundle, trained = self._predictor.bundle, self._predictor.bundle.config.table
        wanted = [self._predictor.column(name) for name in self._predictor.modalities]
        more = [trained.label_column, self._by, trained.split_column if self._split is not None else None]
        table = read_slice(piece, [*dict.fromkeys([*wanted, *(name for name in more if name is not None)])])
        asked = np.ones(table.num_rows, bool)
        if self._split is not None:
            asked = np.asarray([value == self._split for value in table[trained.split_column].to_pylist()], bool)
        values = table[trained.label_column].to_pylist()
        known = np.asarray([is_label(value, bundle.config.task.kind, bundle.labels) for value in values], bool)
        places = np.flatnonzero(asked & known)
        return table.take(places), places, int((asked & ~known).sum())


def _packed(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _unpacked(data: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


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
    """Measures what `SlicePredictor` found in all slices of a table, in any order.

    Raises:
        TableError: there is nothing to measure.
    """
    found = sorted(found, key=lambda row: int(row["slice"]))
    parts = [_unpacked(row["arrays"]) for row in found]
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
