"""Measures how the cost of scoring grows with the rows: seconds, and memory of each process."""

from pathlib import Path
from typing import Any

import numpy as np
from benchmark_data import make_bundle, make_table
from benchmark_process import run_mmray

SHARES = (0.01, 0.04, 0.2, 1.0)  # of the rows
IMAGES = 4000  # that differ


def measure_scale(folder: Path, rows: int, photos: Path | None, precision: str) -> dict[str, Any]:
    """Returns seconds and peak memory of `mmray score` for growing tables, and the line through the seconds."""
    runs = []
    for share in SHARES:
        size = round(rows * share)
        table = make_table(folder / f"table-{size}", size, photos, min(size, IMAGES))
        bundle = make_bundle(folder / f"bundle-{size}", table=table)
        run = run_mmray("score", bundle, table, folder / f"out-{size}", "--local", "--precision", precision)
        runs.append({"rows": size, "seconds": run["seconds"], "peak_rss_mb": run["peak_rss_mb"]})
    sizes, seconds = ([run[key] for run in runs] for key in ("rows", "seconds"))
    slope, start = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(seconds))
    off = max(abs(start + slope * n - s) / s for n, s in zip(sizes, seconds, strict=True))
    fit = {"start_s": round(start, 1), "ms_per_row": round(slope * 1000, 2), "largest_error": round(off, 3)}
    return {"precision": precision, "runs": runs, "fit": fit}
