"""Measures on this machine, in one run, what the README claims; prints the figures and writes them as JSON.

    python jobs/benchmark.py score [--rows 4000] [--photos DIR]   scoring beside a bare loop over the same predictor
    python jobs/benchmark.py demo                                 `mmray demo`, stage by stage
    python jobs/benchmark.py tick [--rows 4000] [--photos DIR]    a tenth of new rows beside all of them
    python jobs/benchmark.py store [--rows 4000] [--photos DIR]   everything in a store that takes 50 ms to answer
    python jobs/benchmark.py plan [--slices 76000]                a table of billions of rows: its start, and resuming
    python jobs/benchmark.py train [--rows 4000] [--photos DIR]   training beside a bare loop over the same steps
    python jobs/benchmark.py serve [--photos DIR] [--soak 600]    the endpoint beside the same predictor

All but `demo` make their own table: JPEGs of about 500x375 cut from photographs (or from the demo's drawings), texts
of 8 to 60 words, and an untrained mobilenet_v3_small + lstm. Same seed, same table.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_plan import measure_plan
from benchmark_process import run_mmray
from benchmark_serve import ROWS, measure_serving
from benchmark_store import measure_store
from benchmark_train import measure_training

SIZES = ((500, 375), (375, 500), (640, 480), (500, 333))  # width, height
NUM_FILES = 8
MIN_ROWS = 16  # of a tick that does next to nothing


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["score", "demo", "tick", "store", "plan", "train", "serve"])
    parser.add_argument("--rows", type=int, default=4000, help="rows of the table to score (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=76_000, help="of the plan (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: the demo's drawings)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU")
    parser.add_argument("--seconds", type=float, default=10, help="of each load on the endpoint (default: %(default)s)")
    parser.add_argument("--soak", type=float, default=0, help="seconds to watch the endpoint's memory under load")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmray-benchmark-") as name:
        folder = Path(name)
        if args.what == "demo":
            figures = measure_demo(folder)
        elif args.what == "score":
            figures = measure_scoring(args, folder)
        elif args.what == "tick":
            figures = measure_ticks(args, folder)
        elif args.what == "store":
            make_table(folder / "table", args.rows, args.photos)
            make_bundle(folder)
            figures = measure_store(folder, args.repeats, args.processes)
        elif args.what == "plan":
            make_table(folder / "table", MIN_ROWS, args.photos)
            figures = measure_plan(folder, make_bundle(folder), args.slices)
        elif args.what == "train":
            figures = measure_training(folder, make_table(folder / "table", args.rows, args.photos), args.repeats)
        else:
            table = make_table(folder / "table", ROWS, args.photos)
            figures = measure_serving(make_bundle(folder), table, args.seconds, args.soak)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


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


def measure_scoring(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns rates of `mmray score`, on Ray and without, and of a bare loop over its predictor, taken in turns."""
    table, bundle = make_table(folder / "table", args.rows, args.photos), make_bundle(folder)
    figures: dict[str, Any] = {"rows": args.rows, "processes": args.processes}
    bare, runs = [], {"--no-local": list[dict[str, Any]](), "--local": list[dict[str, Any]]()}
    for k in range(args.repeats):
        bare.append(bare_loop(bundle, table, args.processes))
        for flag, its in runs.items():
            its.append(run_mmray("score", bundle, table, folder / f"out{flag}-{k}", "--actors", args.processes, flag))
            steady = re.findall(r"steady ([\d,]+) rows/s", its[-1]["output"])[0]
            its[-1]["steady"] = float(steady.replace(",", ""))
    figures["bare_loop_rows_per_s"] = spread(bare)
    for flag, its in runs.items():
        ratios = [run["steady"] / rate for run, rate in zip(its, bare, strict=True)]
        figures["on_ray" if flag == "--no-local" else "without_ray"] = {
            "steady_rows_per_s": spread([run["steady"] for run in its]),
            "whole_process_s": spread([run["seconds"] for run in its]),
            "steady_to_bare": round(statistics.median(ratios), 3),
            "peak_rss_mb": its[-1]["peak_rss_mb"],
        }
    figures["again_s"] = run_mmray("score", bundle, table, folder / "out--local-0")["seconds"]
    return figures


def measure_ticks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns seconds of `mmray tick` for a whole table, for a tenth of new rows, and for nothing new.

    `start_s` is the part that does not depend on rows: imports, Ray, actors; it is that of a tick over one slice.
    """
    table, bundle = make_table(folder / "table", args.rows, args.photos), make_bundle(folder)
    everything = pa.concat_tables(pq.read_table(file) for file in sorted(table.glob("*.parquet")))
    for file in table.glob("*.parquet"):
        file.unlink()

    def tick(rows: int, skip: int, root: str) -> float:
        pq.write_table(everything.slice(skip, rows), table / f"part-{skip:09d}.parquet", row_group_size=rows)
        command = ("tick", bundle, table, folder / root, "--actors", args.processes, "--no-local")
        return float(run_mmray(*command)["seconds"])

    start_s = tick(MIN_ROWS, 0, "start")
    (table / f"part-{0:09d}.parquet").unlink()
    tenth = args.rows // 10
    whole_s, new_s = tick(args.rows - tenth, 0, "root"), tick(tenth, args.rows - tenth, "root")
    again_s = float(run_mmray("tick", bundle, table, folder / "root")["seconds"])
    share = (new_s - start_s) / (whole_s - start_s)
    seconds = {"start_s": start_s, "whole_s": whole_s, "tenth_s": new_s, "nothing_new_s": again_s}
    return {"rows": args.rows, **seconds, "share_without_start": round(share, 3)}


def spread(values: list[float]) -> dict[str, float]:
    """Returns the least, middle and greatest of some values."""
    named = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 1) for name, value in named.items()}


def make_table(folder: Path, rows: int, photos: Path | None) -> Path:
    """Writes JPEGs and a table of (id, image_path, text, label) in several files."""
    (folder / "images").mkdir(parents=True)
    generator, records = np.random.default_rng(0), []
    originals, words = list(pictures(photos)), Path(__file__).read_text().split()
    for k in range(rows):
        image, (width, height) = originals[k % len(originals)], SIZES[k % len(SIZES)]
        top, left = (int(generator.integers(0, side * 4 // 10)) for side in image.shape[:2])
        part = image[top : top + image.shape[0] * 6 // 10, left : left + image.shape[1] * 6 // 10]
        sized = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "images" / f"{k:06d}.jpg"), sized, [cv2.IMWRITE_JPEG_QUALITY, 85])
        text = " ".join(generator.choice(words, generator.integers(8, 60)))
        records.append({"id": k, "image_path": f"images/{k:06d}.jpg", "text": text, "label": f"kind {k % 4}"})
    for k in range(NUM_FILES):
        pq.write_table(pa.Table.from_pylist(records[k::NUM_FILES]), folder / f"part-{k}.parquet")
    return folder


def pictures(photos: Path | None) -> Iterator[cv2.typing.MatLike]:
    """Yields the photographs of a folder, or some of the demo's drawings."""
    if photos is not None:
        found = (cv2.imread(str(path)) for path in sorted(photos.iterdir()))
        yield from (image for image in found if image is not None and min(image.shape[:2]) > 300)
        return
    from importlib.resources import as_file, files

    with as_file(files("mmray.demo") / "clipart.parquet") as path:
        for data in pq.read_table(path, columns=["image"])["image"].to_pylist()[:200]:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            assert image is not None, "the demo holds whole JPEGs"
            yield cv2.resize(image, (800, 600), interpolation=cv2.INTER_CUBIC)


def make_bundle(folder: Path) -> Path:
    """Writes an untrained mobilenet_v3_small + lstm with golden rows of the table beside it."""
    import torch

    from mmray.bundle import Bundle, save_bundle
    from mmray.config_file import parse_config
    from mmray.model import FusionModel
    from mmray.preprocess.text import Vocabulary
    from mmray.slices import open_table
    from mmray.train.golden import golden_rows

    model = {
        "image_encoder": {"kind": "torchvision"},
        "text_encoder": {"kind": "lstm", "hidden_dim": 64, "pooling": "mean"},
    }
    config = parse_config(
        {
            "table": {"train": "table"},
            "image": {"size": 224},
            "text": {"ngram_buckets": 0},
            "task": {"kind": "binary"},
            "model": model,
        },
        "benchmark",
    )
    torch.manual_seed(0)
    words = tuple(sorted(set(Path(__file__).read_text().lower().split())))
    weights = FusionModel(config, num_labels=2, words=words).state_dict()
    bundle = Bundle(config=config, labels=("no", "yes"), vocabulary=Vocabulary(words), weights=weights)
    table = folder / "table"
    save_bundle(golden_rows(bundle, open_table(str(table)), (str(table),)), str(folder / "bundle"))
    return folder / "bundle"


def bare_loop(bundle: Path, table: Path, processes: int) -> float:
    """Returns rows/s of processes that score the same slices with the same predictor: no Ray, nothing written."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=_score_share, args=(str(bundle), str(table), k, processes, barrier, done))
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


def _score_share(bundle: str, table: str, first: int, step: int, barrier: Any, done: Any) -> None:
    from mmray.bundle import load_bundle
    from mmray.options import ScoreConfig
    from mmray.predictor import Predictor
    from mmray.slices import cut, open_table, read_slice
    from mmray.source import ImageSource

    loaded = load_bundle(bundle)
    source = ImageSource([table], loaded.config.image.max_bytes)
    predictor = Predictor.on_this_worker(loaded, source, ScoreConfig())
    barrier.wait()
    done.put(sum(predictor.score(read_slice(piece)).num_rows for piece in cut(open_table(table))[first::step]))


if __name__ == "__main__":
    main()
