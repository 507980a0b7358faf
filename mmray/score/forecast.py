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
from mmray.machine import available_memory, local_cpus
from mmray.options import CALLS_PER_PROCESS, ScoreConfig
from mmray.predictor import Predictor
from mmray.profile import SAMPLE_ROWS, Profile, cells_of, look_at, read, spread_out
from mmray.score.local import scores_here
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
    load_s = time.perf_counter() - started
    pieces = spread_out(plan.slices, sample)
    rows = read(pieces)
    columns = cells_of(predictor, rows)
    looks = [look_at(predictor, part) for part in _batches(columns, options.rows_per_batch)]
    scores, count = pa.concat_tables([look.scores for look in looks]), rows.num_rows
    prepare_s, predict_s = (sum(getattr(look, step) for look in looks) for step in ("prepare_s", "predict_s"))
    processes = min(options.num_actors or local_cpus(), len(plan.slices))
    process_bytes = _process_bytes(plan, rows)
    without_ray = scores_here(plan.slices, options)
    inputs = bundle.metrics.get("inputs")
    images = [bytes_or_path(cell) for cell in columns.get("image", ())]
    found = Forecast(
        rows=plan.num_rows,
        slices=len(plan.slices),
        columns={name: predictor.column(name) for name in predictor.modalities},
        image_kinds=dict(Counter(map(_kind, images)).most_common()),
        sample=Profile.total([look.profile for look in looks]),
        trained_on=Profile.from_dict(inputs) if inputs else None,
        reasons=dict(Counter(filter(None, map(_reason, scores.to_pylist()))).most_common()),
        examples=_examples(scores, pieces),
        duplicates=count - len(set(zip(*{**columns, **({"image": images} if images else {})}.values(), strict=True))),
        prepare_ms=1000 * prepare_s / count,
        predict_ms=1000 * predict_s / count,
        processes=processes,
        without_ray=without_ray,
        process_bytes=process_bytes,
        memory=available_memory(),
        seconds=START_S[without_ray] + load_s + plan.num_rows * (prepare_s + predict_s) / count / processes,
    )
    _refuse_what_does_not_fit(found)
    return found


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


def _batches(columns: dict[str, list[Any]], size: int) -> list[dict[str, list[Any]]]:
    rows = len(next(iter(columns.values())))
    return [{name: cells[k : k + size] for name, cells in columns.items()} for k in range(0, rows, size)]


def _reason(row: dict[str, Any]) -> str | None:
    return f"{row['status']}/{row['reason']}" if row["reason"] else None


def _examples(scores: pa.Table, pieces: Sequence[Slice]) -> dict[str, str]:
    """Returns the first row of each reason, by its place in the input."""
    names = (f"{piece.uri}:{piece.first_row + k}" for piece in pieces for k in range(piece.num_rows))
    found: dict[str, str] = {}
    for name, row in zip(names, scores.to_pylist(), strict=True):
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
