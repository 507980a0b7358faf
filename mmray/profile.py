"""What rows look like to a model: how many lack something, how many words are unknown, which scores they get.

Reads some rows of a table -> gives a profile. A bundle carries that of the table it was trained on: what others are
beside it says how far they have drifted.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mmray.bundle import Bundle
from mmray.histogram import histogram_of
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.preprocess.text import PADDING, UNKNOWN
from mmray.slices import Slice, Table, cut, read_slice
from mmray.source import ImageSource
from mmray.table import cells

SAMPLE_ROWS, PIECES = 256, 8


@dataclass(frozen=True)
class Profile:
    """Counts over some rows."""

    rows: int
    absent: dict[str, int]
    """Modality -> rows without it."""
    tokens: int
    unknown: int
    """Tokens that are not in the vocabulary."""
    histogram: tuple[int, ...]
    """Scored rows by score, in equal bins over the bundle's score range; what lies outside counts at the ends."""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Profile":
        """Reads what `to_dict` wrote."""
        return cls(**{**raw, "histogram": tuple(raw["histogram"])})

    @classmethod
    def total(cls, profiles: Sequence["Profile"]) -> "Profile":
        """Adds the profiles of rows that were looked at apart; at least one."""
        return cls(
            rows=sum(one.rows for one in profiles),
            absent={name: sum(one.absent[name] for one in profiles) for name in profiles[0].absent},
            tokens=sum(one.tokens for one in profiles),
            unknown=sum(one.unknown for one in profiles),
            histogram=tuple(map(sum, zip(*(one.histogram for one in profiles), strict=True))),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON."""
        return asdict(self)

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are not in the vocabulary."""
        return self.unknown / max(self.tokens, 1)


@dataclass(frozen=True)
class Look:
    """What a model made of some rows."""

    profile: Profile
    scores: pa.Table
    """The columns that scoring appends."""
    prepare_s: float
    predict_s: float

    @classmethod
    def total(cls, looks: Sequence["Look"]) -> "Look":
        """Joins looks at rows, in order; at least one."""
        return cls(
            Profile.total([look.profile for look in looks]),
            pa.concat_tables([look.scores for look in looks]),
            sum(look.prepare_s for look in looks),
            sum(look.predict_s for look in looks),
        )


def profile_of(bundle: Bundle, table: Table, image_roots: tuple[str, ...]) -> Profile:
    """Returns the profile of some rows of a table, with the columns trained on."""
    source = ImageSource(image_roots, bundle.config.image.max_bytes)
    predictor = Predictor(bundle, source, ScoreConfig())
    names = [predictor.column(name) for name in predictor.modalities]
    looks = (look_at(predictor, cells_of(predictor, read_slice(p, names))) for p in spread_out(cut(table)))
    return Look.total(list(looks)).profile


def cells_of(predictor: Predictor, rows: pa.Table) -> dict[str, list[Any]]:
    """Returns the cells of each modality."""
    return {name: cells(rows[predictor.column(name)]) for name in predictor.modalities}


def look_at(predictor: Predictor, columns: Mapping[str, Sequence[Any]]) -> Look:
    """Scores rows, of which `columns` has the cells of each modality, one batch after another."""
    rows, size = len(next(iter(columns.values()))), predictor.options.rows_per_batch
    batches = ({name: column[k : k + size] for name, column in columns.items()} for k in range(0, rows, size))
    return Look.total([_look_at_batch(predictor, batch) for batch in batches])


def _look_at_batch(predictor: Predictor, columns: Mapping[str, Sequence[Any]]) -> Look:
    started = time.perf_counter()
    features = predictor.prepare(columns)
    prepared = time.perf_counter()
    prediction = predictor.predict_features(features)
    predicted = time.perf_counter()
    ids, scores = features.arrays.get("token_ids", np.zeros((0, 0), np.int32)), predictor.scores(prediction)
    profile = Profile(
        rows=features.num_rows,
        absent={name: int((~mask).sum()) for name, mask in features.present.items()},
        tokens=int((ids != PADDING).sum()),
        unknown=int((ids == UNKNOWN).sum()),
        histogram=histogram_of(scores["score"].drop_null().to_numpy(), predictor.bundle.score_range),
    )
    return Look(profile, scores, prepared - started, predicted - prepared)


def spread_out(slices: Sequence[Slice], rows: int = SAMPLE_ROWS) -> list[Slice]:
    """Returns so many rows of a table, or up to seven less, in windows that lie evenly over it; at most all."""
    ends = list(accumulate(piece.num_rows for piece in slices))
    if ends[-1] <= rows:
        return list(slices)
    count = min(PIECES, rows)
    bounds = [ends[-1] * k // count for k in range(count + 1)]
    width = rows // count  # no wider than the distance of two bounds: no row comes twice
    starts = [(low + high - width) // 2 for low, high in pairwise(bounds)]
    return [piece for start in starts for piece in _within(slices, ends, start, start + width)]


def _within(slices: Sequence[Slice], ends: Sequence[int], start: int, stop: int) -> Iterator[Slice]:
    k = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        first, last = start - (ends[k] - slices[k].num_rows), min(stop, ends[k])
        yield replace(slices[k], first_row=slices[k].first_row + first, num_rows=last - start)
        start, k = last, k + 1
