"""What rows look like to a model: how many lack something, how many words are unknown, which scores they get.

Reads some rows of a table -> gives a profile. A bundle carries that of the rows it was trained on: what others are
beside it says how far they have drifted.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
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

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON."""
        return asdict(self)

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


def profile_of(bundle: Bundle, table: Table, image_roots: tuple[str, ...]) -> Profile:
    """Returns the profile of some rows of a table, with the columns trained on."""
    source = ImageSource(image_roots, bundle.config.image.max_bytes)
    predictor = Predictor(bundle, source, ScoreConfig())
    return look_at(predictor, cells_of(predictor, read(spread_out(cut(table))))).profile


def read(pieces: Sequence[Slice]) -> pa.Table:
    """Reads slices as one table."""
    return pa.concat_tables([read_slice(piece) for piece in pieces], promote_options="permissive")


def cells_of(predictor: Predictor, rows: pa.Table) -> dict[str, list[Any]]:
    """Returns the cells of each modality."""
    return {name: cells(rows[predictor.column(name)]) for name in predictor.modalities}


def look_at(predictor: Predictor, columns: Mapping[str, Sequence[Any]]) -> Look:
    """Scores rows, of which `columns` has the cells of each modality, one batch after another."""
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
    """Returns about so many rows of a table, in pieces that lie evenly over it; all of one that has no more."""
    ends = list(accumulate(piece.num_rows for piece in slices))
    if ends[-1] <= rows:
        return list(slices)
    starts = (ends[-1] * (2 * k + 1) // (2 * PIECES) for k in range(PIECES))
    return [_from(slices, ends, start, -(-rows // PIECES)) for start in starts]


def _from(slices: Sequence[Slice], ends: Sequence[int], start: int, rows: int) -> Slice:
    k = int(np.searchsorted(ends, start, side="right"))
    rows = min(rows, slices[k].num_rows)
    skipped = min(start - ends[k] + slices[k].num_rows, slices[k].num_rows - rows)
    return replace(slices[k], first_row=slices[k].first_row + skipped, num_rows=rows)
