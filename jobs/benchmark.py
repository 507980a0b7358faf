"""Measures on this machine, in one run, what the README claims; prints the figures and writes them as JSON.

    python jobs/benchmark.py score [--rows 4000] [--photos DIR]   scoring beside a bare loop over the same predictor
    python jobs/benchmark.py demo                                 `mmray demo`, stage by stage
    python jobs/benchmark.py tick [--rows 4000] [--photos DIR]    a tenth of new rows beside all of them
    python jobs/benchmark.py store [--rows 4000] [--photos DIR]   everything in a store that takes 50 ms to answer
    python jobs/benchmark.py plan [--slices 76000]                a table of billions of rows: its start, and resuming
    python jobs/benchmark.py train [--rows 4000] [--photos DIR]   training beside a bare loop over the same steps
    python jobs/benchmark.py peers [--rows 4000] [--photos DIR]   scoring beside other systems, whole processes
    python jobs/benchmark.py scale --rows 100000 [--photos DIR]   how seconds and memory grow with the rows
    python jobs/benchmark.py gpu --rows 100000 [--photos DIR]     scoring by a GPU, and what keeps it waiting
    python jobs/benchmark.py serve [--photos DIR] [--soak 600]    the endpoint beside the same predictor

All but `demo` make their own table: JPEGs of about 500x375 cut from photographs (or from the demo's drawings), texts
of 8 to 60 words, and an untrained mobilenet_v3_small (or `--network`) + lstm. Same seed, same table.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_data import make_bundle, make_table
from benchmark_gpu import measure_gpu
from benchmark_peers import measure_peers
from benchmark_plan import measure_plan
from benchmark_process import run_mmray
from benchmark_scale import measure_scale
from benchmark_score import measure_scoring
from benchmark_serve import ROWS, measure_serving
from benchmark_store import measure_store
from benchmark_train import measure_training

WHAT = ("score", "demo", "tick", "store", "plan", "train", "peers", "scale", "gpu", "serve")
MIN_ROWS = 16  # of a tick that does next to nothing


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--rows", type=int, default=4000, help="rows of the table to score (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=76_000, help="of the plan (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: the demo's drawings)")
    parser.add_argument("--network", default="mobilenet_v3_small", help="torchvision's name (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="of scoring (default: %(default)s: bf16 where it pays)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU")
    parser.add_argument("--seconds", type=float, default=10, help="of each load on the endpoint (default: %(default)s)")
    parser.add_argument("--soak", type=float, default=0, help="seconds to watch the endpoint's memory under load")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmray-benchmark-") as name:
        figures = measure(args, Path(name))
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns the figures of one benchmark, which may fill a folder."""
    match args.what:
        case "demo":
            return measure_demo(folder)
        case "gpu":
            return measure_gpu(folder, args.rows, args.photos)
        case "scale":
            return measure_scale(folder, args.rows, args.photos, args.precision)
    rows = {"plan": MIN_ROWS, "serve": ROWS}.get(args.what, args.rows)
    table = make_table(folder / "table", rows, args.photos)
    if args.what == "train":  # which makes its own model
        return measure_training(folder, table, args.repeats)
    bundle = make_bundle(folder, args.network)
    match args.what:
        case "score":
            return measure_scoring(folder, table, bundle, args.repeats, args.processes, args.precision)
        case "peers":
            return measure_peers(folder, table, bundle, args.repeats, args.precision)
        case "tick":
            return measure_ticks(folder, table, bundle, args.processes)
        case "store":
            return measure_store(folder, bundle, args.repeats, args.processes)
        case "plan":
            return measure_plan(folder, bundle, args.slices)
    return measure_serving(bundle, table, args.seconds, args.soak)


def measure_demo(folder: Path) -> dict[str, Any]:
    """Returns the seconds of the demo's stages and its peak memory."""
    run = run_mmray("demo", "--dir", folder / "demo")
    stages = re.findall(r"(\w+) (\d+)", re.findall(r"^seconds +(.+)$", run["output"], re.MULTILINE)[0])
    report = json.loads((folder / "demo" / "report.json").read_text())
    accuracy = {view: values["accuracy"] for view, values in report["evaluation"]["metrics"].items()}
    return {
        "stage_s": {name: int(seconds) for name, seconds in stages},
        "whole_process_s": run["seconds"],
        "test_accuracy": accuracy,
        "peak_rss_mb": run["peak_rss_mb"],
    }


def measure_ticks(folder: Path, table: Path, bundle: Path, processes: int) -> dict[str, Any]:
    """Returns seconds of `mmray tick` for a whole table, for a tenth of new rows, and for nothing new.

    `start_s` is the part that does not depend on rows: imports, Ray, actors; it is that of a tick over one slice.
    """
    everything = pa.concat_tables(pq.read_table(file) for file in sorted(table.glob("*.parquet")))
    for file in table.glob("*.parquet"):
        file.unlink()

    def tick(rows: int, skip: int, root: str) -> float:
        pq.write_table(everything.slice(skip, rows), table / f"part-{skip:09d}.parquet", row_group_size=rows)
        command = ("tick", bundle, table, folder / root, "--actors", processes, "--no-local")
        return float(run_mmray(*command)["seconds"])

    start_s = tick(MIN_ROWS, 0, "start")
    (table / f"part-{0:09d}.parquet").unlink()
    rows, tenth = everything.num_rows, everything.num_rows // 10
    whole_s, new_s = tick(rows - tenth, 0, "root"), tick(tenth, rows - tenth, "root")
    again_s = float(run_mmray("tick", bundle, table, folder / "root")["seconds"])
    share = (new_s - start_s) / (whole_s - start_s)
    seconds = {"start_s": start_s, "whole_s": whole_s, "tenth_s": new_s, "nothing_new_s": again_s}
    return {"rows": rows, **seconds, "share_without_start": round(share, 3)}


if __name__ == "__main__":
    main()
