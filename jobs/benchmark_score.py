"""Measures `mmray score`, with Ray and without, beside a bare loop over its predictor; and what containment costs."""

import multiprocessing
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

from benchmark_process import run_mmray
from benchmark_steps import measure_start, measure_steps

from mmray.machine import KEEP_MEMORY


def measure_scoring(
    folder: Path, table: Path, bundle: Path, repeats: int, processes: int, precision: str
) -> dict[str, Any]:
    """Returns rates of `mmray score`, on Ray and without, and of a bare loop over its predictor, taken in turns."""
    os.environ |= {**KEEP_MEMORY, "OMP_NUM_THREADS": "1"}  # of the bare loop, as scoring processes have it
    bare, runs = [], {"--no-local": list[dict[str, Any]](), "--local": list[dict[str, Any]]()}
    for k in range(repeats):
        bare.append(bare_loop(bundle, table, processes, precision))
        for flag, its in runs.items():
            options = ("--actors", processes, "--precision", precision, flag)
            its.append(run_mmray("score", bundle, table, folder / f"out{flag}-{k}", *options))
            steady = re.findall(r"steady ([\d,]+) rows/s", its[-1]["output"])[0]
            its[-1]["steady"] = float(steady.replace(",", ""))
    figures: dict[str, Any] = {"processes": processes, "precision": precision, "bare_loop_rows_per_s": spread(bare)}
    for flag, its in runs.items():
        ratios = [run["steady"] / rate for run, rate in zip(its, bare, strict=True)]
        figures["on_ray" if flag == "--no-local" else "without_ray"] = {
            "steady_rows_per_s": spread([run["steady"] for run in its]),
            "whole_process_s": spread([run["seconds"] for run in its]),
            "steady_to_bare": round(statistics.median(ratios), 3),
            "peak_rss_mb": its[-1]["peak_rss_mb"],
        }
    again = ("score", bundle, table, folder / "out--local-0", "--precision", precision)
    figures["again_s"] = run_mmray(*again)["seconds"]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        figures["start_s"] = pool.apply(measure_start, (bundle,))
        figures["ms_per_row"] = pool.apply(measure_steps, (str(bundle), str(table), precision))
        contained = pool.apply(contained_to_bare, (str(bundle), str(table), str(folder)))
    return {**figures, "contained_to_bare_s": round(contained, 3)}


def spread(values: list[float]) -> dict[str, float]:
    """Returns the least, middle and greatest of some values."""
    named = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 1) for name, value in named.items()}


def contained_to_bare(bundle: str, table: str, folder: str) -> float:
    """Returns the seconds of slices scored as in a run, to those of the same without attempts and a watchdog."""
    from contextlib import nullcontext

    from mmray.options import ScoreConfig
    from mmray.score.plan import make_plan
    from mmray.score.worker import SliceScorer, WatchedScorer

    options = ScoreConfig()
    plan = make_plan(bundle, table, options)
    scorers, seconds = [], [0.0, 0.0]
    for k, kind in enumerate((WatchedScorer, SliceScorer)):
        scorers.append(kind(bundle, f"{folder}/contained-{k}", plan.hash, plan.image_roots, options))
    setattr(scorers[1]._attempts, "begin", lambda piece, beside: nullcontext(0))  # noqa: B010
    for turn, piece in enumerate(plan.slices):
        for k in (turn % 2, 1 - turn % 2):
            started = time.perf_counter()
            scorers[k].score(piece)
            seconds[k] += time.perf_counter() - started
    return seconds[0] / seconds[1]


def bare_loop(bundle: Path, table: Path, processes: int, precision: str) -> float:
    """Returns rows/s of processes that score the same slices with the same predictor: no Ray, nothing written."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=_score_share, args=(str(bundle), str(table), precision, k, processes, barrier, done))
        for k in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    rows = sum(done.get() for _ in workers)
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return float(rows / seconds)


def _score_share(bundle: str, table: str, precision: Any, first: int, step: int, barrier: Any, done: Any) -> None:
    from mmray.bundle import load_bundle
    from mmray.options import ScoreConfig
    from mmray.predictor import Predictor
    from mmray.slices import cut, open_table, read_slice
    from mmray.source import ImageSource

    loaded = load_bundle(bundle)
    source = ImageSource([table], loaded.config.image.max_bytes)
    predictor = Predictor.on_this_worker(loaded, source, ScoreConfig(precision=precision))
    barrier.wait()
    done.put(sum(predictor.score(read_slice(piece)).num_rows for piece in cut(open_table(table))[first::step]))
