"""Measures the plan of a table of billions of rows: how soon its first slice is scored, and what the driver holds.

The rows are real, and all null: a file of as many row groups as is usual has some ten kilobytes. What is there already
when a run resumes is written here, with the footers that a run would give it.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_process import peak_mb

from mmray.options import ScoreConfig
from mmray.score.commit import METADATA_KEY, Output, part_key
from mmray.score.ledger import Ledger
from mmray.score.plan import Plan, describe, make_plan
from mmray.slices import MAX_SLICE_ROWS, MIN_SLICE_ROWS

GROUPS = 100  # a file
POLL_S = 0.02


def measure_plan(folder: Path, bundle: Path, slices: int) -> dict[str, Any]:
    """Returns seconds and peak memory of a run's start, of its resumption, and of a finished run."""
    rows, output = _make_rows(folder / "many", slices), folder / "scored"
    plan = make_plan(str(bundle), str(rows), ScoreConfig())
    first = output / part_key(plan.hash, 0)
    command = ["score", str(bundle), str(rows), str(output), "--actors", "1", "--no-local"]
    figures: dict[str, Any] = {"slices": len(plan.slices), "rows": plan.num_rows}
    figures["start"] = _run(command, first.exists, stop=True)
    shutil.rmtree(output)
    _commit(plan, output, str(bundle), str(rows))
    figures["resume"] = _run(command, first.exists)
    figures["finished"] = _run(command)
    return figures


def _make_rows(folder: Path, slices: int) -> Path:
    """Writes a table of so many slices, the first of which is small."""
    folder.mkdir()
    table = pa.table({name: pa.nulls(MAX_SLICE_ROWS) for name in ("id", "image_path", "text")})
    pq.write_table(table.slice(0, MIN_SLICE_ROWS), folder / "part-000000.parquet")
    for k in range(1, slices, GROUPS):
        groups, file = min(GROUPS, slices - k), folder / f"part-{k:06d}.parquet"
        if k > 1 and groups == GROUPS:
            shutil.copyfile(folder / "part-000001.parquet", file)
            continue
        with pq.ParquetWriter(file, table.schema) as writer:
            for _ in range(groups):
                writer.write_table(table, row_group_size=MAX_SLICE_ROWS)
    return folder


def _commit(plan: Plan, output: Path, bundle: str, table: str) -> None:
    """Writes what all slices but the first would have left."""
    Output(str(output)).claim(plan, describe(plan, bundle, table))
    (output / "data").mkdir()
    for piece in plan.slices[1:]:
        status = {"failed": piece.num_rows}
        ledger = Ledger(piece.num_rows, status, {"failed/IMAGE_NULL": piece.num_rows}, {"": piece.num_rows})
        note = {"plan_hash": plan.hash, "slice": piece.index, "ledger": ledger.to_dict(), "precision": "fp32"}
        scored = pa.table({"score": pa.nulls(piece.num_rows)})
        scored = scored.replace_schema_metadata({METADATA_KEY: json.dumps(note).encode()})
        pq.write_table(scored, output / part_key(plan.hash, piece.index))


def _run(command: list[str], there: Callable[[], bool] = lambda: True, *, stop: bool = False) -> dict[str, float]:
    """Runs a command; returns the seconds until something is there and until its end, and its own peak memory."""
    started, figures, peak = time.perf_counter(), dict[str, float](), 0.0
    with subprocess.Popen([sys.executable, "-m", "mmray.cli", *command], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = peak_mb(process.pid) or peak
            if "first_slice_s" not in figures and there():
                figures["first_slice_s"] = round(time.perf_counter() - started, 1)
                if stop:
                    process.send_signal(signal.SIGTERM)
            time.sleep(POLL_S)
    figures |= {"whole_process_s": round(time.perf_counter() - started, 1), "driver_peak_rss_mb": round(peak)}
    if process.returncode != (5 if stop else 0):
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return figures
