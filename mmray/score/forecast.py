"""Says before a run what it would do: how many rows fail and why, how long it takes, how much memory, what limits it.

Reads every footer and some rows, which go through the real preprocessing and the real model -> gives a forecast. It
writes nothing. Unlike a run, it does not outlive a row that kills the process that reads it.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmray.bundle import load_bundle
from mmray.errors import ConfigError
from mmray.histogram import stability_index
from mmray.machine import available_memory, given_address, local_cpus, process_age
from mmray.options import CALLS_PER_PROCESS, ScoreConfig
from mmray.predictor import Predictor
from mmray.profile import SAMPLE_ROWS, Look, Profile, cells_of, look_at, spread_out
from mmray.score.hints import hints
from mmray.score.ledger import Ledger
from mmray.score.local import places, scores_here, settled
from mmray.score.plan import make_plan
from mmray.slices import Slice, read_slice
from mmray.source import ImageSource, bytes_or_path
from mmray.store import REMOTE_SCHEMES

IMPORTS_S, RAY_S = 2.0, 9.0  # of a process that scores, and what Ray takes beside
IMPORTS_BYTES = 350 * 2**20  # of a process that has loaded no model yet
SCHEMES = (*REMOTE_SCHEMES, "file", "http", "https")


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
    """Of a row, in one process alone: on its CPUs, and on one CPU or GPU."""
    processes: int
    without_ray: bool
    limit: str
    """What takes most of the time."""
    core_hours: float
    gpu_hours: float
    """Of a million rows."""
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


@dataclass(frozen=True)
class _Cost:
    """What a run takes."""

    seconds: float
    limit: str
    core_hours: float
    gpu_hours: float


def forecast(
    bundle_uri: str, table_uri: str, options: ScoreConfig, sample: int = SAMPLE_ROWS, *, fresh: bool = False
) -> Forecast:
    """Forecasts the scoring of a table by this machine.

    Args:
        bundle_uri: folder or URI of a bundle.
        table_uri: parquet file, folder or glob.
        options: how it would be scored.
        sample: rows looked at.
        fresh: whether this process was started for this: then it has just taken as long as one that scores will.

    Raises:
        ConfigError: it does not hold so many processes; says what they need. Of a cluster that is given nobody knows.
        MmrayError: what would stop the run.
    """
    plan, started, own = make_plan(bundle_uri, table_uri, options), time.perf_counter(), _memory()
    processes = min(len(places(options)), len(plan.slices))
    options, without_ray = settled(options, processes), scores_here(plan.slices, options)
    bundle = load_bundle(bundle_uri)
    source = ImageSource(plan.image_roots, bundle.config.image.max_bytes, options.on_unavailable)
    predictor, inputs = Predictor.on_this_worker(bundle, source, options), bundle.metrics.get("inputs")
    loading_s = process_age() if fresh else IMPORTS_S + time.perf_counter() - started
    start_s = loading_s + (0.0 if without_ray else RAY_S)
    pieces = spread_out(plan.slices, sample)
    look, columns, bytes_each = _look(predictor, pieces)
    scores, rows = look.scores.to_pylist(), look.profile.rows
    reasons = dict(Ledger.of(look.scores, bundle.score_range).reasons_by_count())
    prepare_ms, predict_ms = 1000 * look.prepare_s / rows, 1000 * look.predict_s / rows
    cost = _cost(prepare_ms, predict_ms, processes, options)
    found = Forecast(
        rows=plan.num_rows,
        slices=len(plan.slices),
        columns={name: predictor.column(name) for name in predictor.modalities},
        image_kinds=dict(Counter(map(_kind, columns.get("image", ()))).most_common()),
        sample=look.profile,
        trained_on=Profile.from_dict(inputs) if inputs else None,
        reasons=reasons,
        examples=_examples(scores, pieces),
        duplicates=rows - len(set(zip(*(map(_comparable, cells) for cells in columns.values()), strict=True))),
        prepare_ms=prepare_ms,
        predict_ms=predict_ms,
        processes=processes,
        without_ray=without_ray,
        limit=cost.limit,
        core_hours=cost.core_hours,
        gpu_hours=cost.gpu_hours,
        process_bytes=int(_growth(own) + CALLS_PER_PROCESS * max(p.num_rows for p in plan.slices) * bytes_each),
        memory=available_memory(),
        seconds=start_s + plan.num_rows * cost.seconds,
        hints=hints(rows, reasons, plan.image_roots),
    )
    _refuse_what_does_not_fit(found)
    return found


def _refuse_what_does_not_fit(found: Forecast) -> None:
    need = found.processes * found.process_bytes
    if given_address() is None and need > found.memory:
        fit = found.memory // found.process_bytes
        then = f"give --actors {fit}" if fit else "take a larger machine, or smaller --slice-rows"
        raise ConfigError(
            f"{found.processes} processes of {found.process_bytes / 2**20:,.0f} MiB need {need / 2**20:,.0f} MiB, and "
            f"this machine has {found.memory / 2**20:,.0f} MiB to spare; {then}"
        )


def _look(predictor: Predictor, pieces: Sequence[Slice]) -> tuple[Look, dict[str, list[Any]], float]:
    """Returns what the model makes of the rows, their cells, and the bytes of a row with all its columns."""
    looks, columns, size = list[Look](), dict[str, list[Any]](), 0
    for piece in pieces:
        rows = read_slice(piece)
        cells, size = cells_of(predictor, rows), size + rows.nbytes
        if not looks:  # the first batch finds caches cold
            look_at(predictor, {name: column[: predictor.options.rows_per_batch] for name, column in cells.items()})
        looks.append(look_at(predictor, cells))
        for name, column in cells.items():
            columns.setdefault(name, []).extend(column)
    look = Look.total(looks)
    return look, columns, size / look.profile.rows


def _cost(prepare_ms: float, predict_ms: float, processes: int, options: ScoreConfig) -> _Cost:
    """Returns the seconds of a row where processes work beside one another, and what a million takes."""
    gpus, cpus = options.gpus_per_actor, min(processes, local_cpus())
    threads = options.decode_threads or 1
    if gpus:  # which computes while CPUs prepare
        prepare_s, predict_s = prepare_ms / processes / 1000, predict_ms / (processes * min(gpus, 1)) / 1000
        seconds, core_ms, gpu_ms = max(prepare_s, predict_s), prepare_ms * threads, predict_ms
    else:
        prepare_s, predict_s = prepare_ms / cpus / 1000, predict_ms / cpus / 1000
        seconds, core_ms, gpu_ms = prepare_s + predict_s, prepare_ms + predict_ms, 0.0
    limit = "reading and decoding" if prepare_s > predict_s else "the model"
    return _Cost(seconds, limit, core_ms / 3.6, gpu_ms / 3.6)


def _memory() -> tuple[int, int]:
    """Returns the bytes that this process has, and the most that it ever had; see proc_pid_status(5)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return resident, peak


def _growth(before: tuple[int, int]) -> int:
    """Returns the memory of a process that has loaded the model and scored, by what this one has more since then."""
    resident, peak = _memory()
    return IMPORTS_BYTES + (peak if peak > before[1] else resident) - before[0]


def _examples(scores: Sequence[dict[str, Any]], pieces: Sequence[Slice]) -> dict[str, str]:
    """Returns the first row of each reason, by its place in the input."""
    found: dict[str, str] = {}
    names = (f"{piece.uri}:{piece.first_row + k}" for piece in pieces for k in range(piece.num_rows))
    for name, row in zip(names, scores, strict=True):
        if row["reason"]:
            found.setdefault(f"{row['status']}/{row['reason']}", f"{name}: {row['reason_detail']}")
    return found


def _comparable(cell: Any) -> Any:
    cell = bytes_or_path(cell)
    return cell if isinstance(cell, str | bytes) or cell is None else repr(cell)


def _kind(cell: Any) -> str:
    cell = bytes_or_path(cell)
    if cell is None:
        return "nothing"
    if not isinstance(cell, str):
        return "bytes" if isinstance(cell, bytes) else "other"
    scheme, separator, _ = cell.partition("://")
    if separator:
        return f"{scheme.lower()}:// URI" if scheme.lower() in SCHEMES else "other"
    return "absolute path" if cell.startswith("/") else "relative path"
