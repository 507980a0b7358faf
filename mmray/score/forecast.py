"""Says before a run what it would do: how many rows fail and why, how long it takes, how much memory, what limits it.

Reads every footer and some rows, which go through the real preprocessing and the real model -> gives a forecast. It
writes nothing.
"""

import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmray.bundle import load_bundle
from mmray.errors import ConfigError
from mmray.histogram import stability_index
from mmray.machine import available_memory
from mmray.options import CALLS_PER_PROCESS, ScoreConfig
from mmray.predictor import Predictor
from mmray.profile import SAMPLE_ROWS, Profile, cells_of, look_at, read, spread_out
from mmray.score.hints import hints
from mmray.score.local import places, scores_here
from mmray.score.plan import Plan, make_plan
from mmray.slices import Slice
from mmray.source import ImageSource, bytes_or_path

START_S = {True: 1.5, False: 10.0}  # without Ray and with it, beside imports and the loading of the model
MILLION = 1_000_000


@dataclass(frozen=True)
class Forecast:
    """What a run would do, by some of its rows."""

    rows: int
    slices: int
    columns: dict[str, str]
    """Modality -> column."""
    image_kinds: dict[str, int]
    """What image cells hold -> rows of the sample."""
    sample: Profile
    trained_on: Profile | None
    reasons: dict[str, int]
    """`status/REASON` -> rows of the sample that are not ok."""
    examples: dict[str, str]
    """`status/REASON` -> FILE:ROW of the first such row: detail."""
    duplicates: int
    """Rows of the sample whose cells are those of an earlier one."""
    prepare_ms: float
    predict_ms: float
    """Per row, on one CPU core or GPU of this machine."""
    processes: int
    without_ray: bool
    process_bytes: int
    """Memory of one process, at most."""
    memory: int
    """What this machine has to spare, in bytes."""
    seconds: float
    hints: list[str]
    """What to do where most rows lack something."""

    @property
    def drift(self) -> float | None:
        """Population stability index of the scores beside those of rows trained on; None where these are unknown."""
        return stability_index(self.trained_on.histogram, self.sample.histogram) if self.trained_on else None

    @property
    def limit(self) -> str:
        """What takes most of a row's time."""
        return "reading and decoding" if self.prepare_ms > self.predict_ms else "the model"


def forecast(bundle_uri: str, table_uri: str, options: ScoreConfig, sample: int = SAMPLE_ROWS) -> Forecast:
    """Forecasts the scoring of a table by this machine.

    Raises:
        ConfigError: it does not hold so many processes; says what they need.
        MmrayError: what would stop the run.
    """
    plan, started = make_plan(bundle_uri, table_uri, options), time.perf_counter()
    bundle = load_bundle(bundle_uri)
    source = ImageSource(plan.image_roots, bundle.config.image.max_bytes, options.on_unavailable)
    predictor = Predictor.on_this_worker(bundle, source, options)
    load_s, inputs = time.perf_counter() - started, bundle.metrics.get("inputs")
    seen = _look(predictor, spread_out(plan.slices, sample))
    processes = min(len(places(options)), len(plan.slices))
    without_ray = scores_here(plan.slices, options)
    start_s = START_S[without_ray] + load_s
    found = Forecast(
        rows=plan.num_rows,
        slices=len(plan.slices),
        columns={name: predictor.column(name) for name in predictor.modalities},
        image_kinds=dict(Counter(map(_kind, seen.columns.get("image", ()))).most_common()),
        sample=seen.profile,
        trained_on=Profile.from_dict(inputs) if inputs else None,
        reasons=seen.reasons,
        examples=seen.examples,
        duplicates=seen.rows.num_rows - len(set(zip(*seen.columns.values(), strict=True))),
        prepare_ms=seen.prepare_ms,
        predict_ms=seen.predict_ms,
        processes=processes,
        without_ray=without_ray,
        process_bytes=_process_bytes(plan, seen.rows),
        memory=available_memory(),
        seconds=start_s + plan.num_rows * _ms_per_row(seen, processes, options.gpus_per_actor) / 1000,
        hints=hints(seen.rows.num_rows, seen.reasons, plan.image_roots),
    )
    _refuse_what_does_not_fit(found)
    return found


@dataclass(frozen=True)
class _Seen:
    """Some rows of a table, and what the model made of them."""

    rows: pa.Table
    columns: dict[str, list[Any]]
    profile: Profile
    reasons: dict[str, int]
    examples: dict[str, str]
    prepare_ms: float
    predict_ms: float


def _look(predictor: Predictor, pieces: Sequence[Slice]) -> _Seen:
    rows = read(pieces)
    columns, size = cells_of(predictor, rows), predictor.options.rows_per_batch
    batches = ({name: cells[k : k + size] for name, cells in columns.items()} for k in range(0, rows.num_rows, size))
    looks = [look_at(predictor, batch) for batch in batches]
    scores = pa.concat_tables([look.scores for look in looks]).to_pylist()
    columns["image"] = [bytes_or_path(cell) for cell in columns.get("image", ())]  # which can be compared
    return _Seen(
        rows=rows,
        columns={name: cells for name, cells in columns.items() if cells},
        profile=Profile.total([look.profile for look in looks]),
        reasons=dict(Counter(filter(None, map(_reason, scores))).most_common()),
        examples=_examples(scores, pieces),
        prepare_ms=1000 * sum(look.prepare_s for look in looks) / rows.num_rows,
        predict_ms=1000 * sum(look.predict_s for look in looks) / rows.num_rows,
    )


def _ms_per_row(seen: _Seen, processes: int, gpus_per_actor: float) -> float:
    """Returns the time of a row where processes work beside one another: a GPU computes while CPUs prepare."""
    if gpus_per_actor:
        return max(seen.prepare_ms / processes, seen.predict_ms / (processes * gpus_per_actor))
    return (seen.prepare_ms + seen.predict_ms) / processes


def _refuse_what_does_not_fit(found: Forecast) -> None:
    need = found.processes * found.process_bytes
    if need > found.memory:
        fit = found.memory // found.process_bytes
        then = f"give --actors {fit}" if fit else "take a larger machine, or smaller --slice-rows"
        raise ConfigError(
            f"{found.processes} processes of {found.process_bytes / 2**20:,.0f} MiB need {need / 2**20:,.0f} MiB, and "
            f"this machine has {found.memory / 2**20:,.0f} MiB to spare; {then}"
        )


def _process_bytes(plan: Plan, rows: pa.Table) -> int:
    """Returns the memory of a process: what this one took for the sample, and the slices that it is at besides."""
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = max(piece.num_rows for piece in plan.slices)
    return int(own + CALLS_PER_PROCESS * largest * rows.nbytes / rows.num_rows)


def _reason(row: dict[str, Any]) -> str | None:
    return f"{row['status']}/{row['reason']}" if row["reason"] else None


def _examples(scores: Sequence[dict[str, Any]], pieces: Sequence[Slice]) -> dict[str, str]:
    """Returns the first row of each reason, by its place in the input."""
    names = (f"{piece.uri}:{piece.first_row + k}" for piece in pieces for k in range(piece.num_rows))
    found: dict[str, str] = {}
    for name, row in zip(names, scores, strict=True):
        if reason := _reason(row):
            found.setdefault(reason, f"{name}: {row['reason_detail']}")
    return found


def _kind(cell: Any) -> str:
    if cell is None:
        return "nothing"
    if isinstance(cell, bytes):
        return "bytes"
    scheme, separator, _ = str(cell).partition("://")
    if separator:
        return f"{scheme}:// URI"
    return "absolute path" if str(cell).startswith("/") else "relative path"
