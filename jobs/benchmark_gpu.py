"""Measures scoring by a GPU: how busy it is, how much it could do, and what each step of a row takes of a CPU.

Without Ray, by processes that share the GPU, each with its share of the CPUs: few, and one for each CPU.
"""

import multiprocessing
import statistics
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from benchmark_data import make_bundle, make_table
from benchmark_process import run_mmray
from benchmark_steps import measure_steps

NETWORKS = ("mobilenet_v3_small", "resnet50")  # which decoding limits, and which the GPU
IMAGES = 2000  # that differ
SLICE_ROWS = 512
PRECISION = "bf16"
BUSY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200")


def measure_gpu(folder: Path, rows: int, photos: Path | None) -> dict[str, Any]:
    """Returns rates of `mmray score` on one GPU and its CPUs, and those of each alone."""
    import torch

    from mmray.machine import local_cpus

    table, cpus = make_table(folder / "table", rows, photos, IMAGES), local_cpus()
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "cpus": cpus, "rows": rows}
    for network in NETWORKS:
        bundle = make_bundle(folder, network)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            steps = pool.apply(measure_steps, (str(bundle), str(table), PRECISION, True))
        runs = {processes: _run(folder, bundle, table, processes) for processes in (max(cpus // 4, 1), cpus)}
        figures[network] = {"ms_per_row": steps, "by_processes": runs}
    return figures


def _run(folder: Path, bundle: Path, table: Path, processes: int) -> dict[str, Any]:
    """Scores a table, and watches the GPU while slices are committed."""
    output, samples = folder / f"out-{bundle.name}-{processes}", list[tuple[float, int]]()
    with subprocess.Popen(BUSY, stdout=subprocess.PIPE, text=True) as watch:
        reader = threading.Thread(target=_read, args=(watch, samples))
        reader.start()
        options = ("--precision", PRECISION, "--slice-rows", SLICE_ROWS)
        shared = ("--local", "--gpus", 1 / processes, "--actors", processes)
        run = run_mmray("score", bundle, table, output, *options, *shared)
        watch.kill()
        reader.join()
    commits = sorted(file.stat().st_mtime for file in (output / "data").iterdir())
    steady = commits[len(commits) // 4 : -processes]  # not while processes start, nor while some have ended
    busy = [percent for at, percent in samples if steady[0] < at < steady[-1]]
    return {
        "rows_per_s": round((len(steady) - 1) * SLICE_ROWS / (steady[-1] - steady[0])),
        "gpu_busy_percent": round(statistics.mean(busy), 1),
        "whole_process_s": run["seconds"],
        "peak_rss_mb": run["peak_rss_mb"],
    }


def _read(watch: "subprocess.Popen[str]", samples: list[tuple[float, int]]) -> None:
    assert watch.stdout is not None, "it is piped"
    samples += ((time.time(), int(line)) for line in watch.stdout)
