"""Some scored rows as a person would want to see them: picture, text, and what the model said.

Reads an output and its bundle -> gives rows from the lowest score to the highest.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.mistakes import picture, shortened
from mmray.predictor import Predictor
from mmray.score.rescore import LEFT_ALONE, rescorer
from mmray.score.scored import batches, files_of, some_of
from mmray.table import cells

MAX_LOOKED_AT = 4096  # rows of a batch whose scores are looked at


class Sample(TypedDict):
    """One scored row."""

    row: str
    """File and number of the row in it, from 0."""
    result: str
    score: float
    text: str | None
    thumbnail: str | None
    """The picture as the model sees it: a data URI."""


def sample_scored(output: str, bundle: str, owner: Mapping[str, Any], number: int) -> list[Sample]:
    """Returns some rows that have a score, spread over the scores there are.

    Args:
        output: scored folder.
        bundle: where its bundle is.
        owner: its `run.json`.
        number: of rows, at most.

    Raises:
        BundleError: the bundle is damaged or of another model.
    """
    predictor = rescorer(bundle, owner)
    chosen = _spread(output, number)
    modal = [predictor.column(name) for name in predictor.modalities]
    results = [name for name in ("predicted_label", "score") if name in {field.name for field in predictor.fields}]
    found: dict[tuple[str, int], Sample] = {}
    for batch in batches(output, sorted({key for key, _ in chosen}), [*modal, *results]):
        end = batch.first_row + batch.rows.num_rows
        mine = [row for key, row in chosen if key == batch.key and batch.first_row <= row < end]
        rows = batch.rows.take(pa.array([row - batch.first_row for row in mine], pa.int64()))
        for row, sample in zip(mine, _samples(predictor, rows), strict=True):
            found[batch.key, row] = {**sample, "row": f"{batch.key}:{row}"}
    return [found[name] for name in chosen]


def _spread(output: str, number: int) -> list[tuple[str, int]]:
    """Returns file and row of scored rows, from the lowest score to the highest."""
    names: list[tuple[str, int]] = []
    scores: list[float] = []
    for batch in batches(output, some_of(files_of(output)), ["score", "reason"]):
        values = batch.rows["score"].to_numpy()
        killed = pc.is_in(batch.rows["reason"], pa.array(LEFT_ALONE, pa.string())).to_numpy()
        looked_at = np.flatnonzero(np.isfinite(values) & ~killed)
        step = max(len(looked_at) // MAX_LOOKED_AT, 1)
        names += [(batch.key, batch.first_row + int(k)) for k in looked_at[::step]]
        scores += values[looked_at[::step]].tolist()
    order = np.argsort(scores, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).astype(int))
    return [names[order[k]] for k in places]


def _samples(predictor: Predictor, rows: pa.Table) -> list[Sample]:
    columns = {name: cells(rows[predictor.column(name)]) for name in predictor.modalities}
    features = predictor.prepare(columns)
    return [
        {
            "row": "",
            "result": _named(row.get("predicted_label", "value")),
            "score": row["score"],
            "text": shortened(columns["text"][k]) if "text" in columns else None,
            "thumbnail": picture(features, k),
        }
        for k, row in enumerate(rows.drop_columns(list({*map(predictor.column, columns)})).to_pylist())
    ]


def _named(label: Any) -> str:
    return (", ".join(label) or "none") if isinstance(label, list) else str(label)
