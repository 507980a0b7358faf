"""Predicts the labelled rows of a table: in this process, or by the actor pool that scoring uses where it takes long.

Reads slices -> gives the outputs of several views of each, the targets, the groups of rows and the worst of them.
"""

import io
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mmray.bundle import load_bundle
from mmray.cluster import RAY_ERRORS, cluster, cpus_for, is_alone, map_slices, unwrap
from mmray.labels import encode_targets, is_label
from mmray.mistakes import worst_rows
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.score.scored import group_name
from mmray.slices import Slice, read_slice, slices_from_arrow, slices_to_arrow
from mmray.source import ImageSource
from mmray.table import cells

FUSED, USED = "all modalities", "modalities used"
FEW_ROWS = 20_000  # of which the first slice shows whether all of them would take long
PATIENCE_S = 15.0  # that a cluster and its processes take to start
ALPHAS = tuple(k / 10 for k in range(11))
Arguments = tuple[str, tuple[str, ...], str | None, str | None]
"""Of a `SlicePredictor`, before its options."""


def predicted(slices: Sequence[Slice], arguments: Arguments, options: ScoreConfig) -> Generator[dict[str, Any]]:
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


def unpacked(data: bytes) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a slice by name: `targets`, `image_weight`, and those of `view/`, `alpha/` and `group/`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)
