"""Measures the endpoint beside the predictor it calls, in one run; prints the figures as JSON.

    python jobs/benchmark_serve.py [--photos DIR] [--seconds 10]

The same photographs and texts go to the predictor directly, in a process and thread of its own as a replica has, and
then over HTTP to `mmray serve` on loopback: one at a time, from many clients at once, and at four times the rate that
it can answer. Clients and server share the machine's CPUs.
"""

import argparse
import base64
import http.client
import json
import multiprocessing
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from benchmark import make_bundle, make_table

ROWS = 512  # of the table; an eighth of it is asked for
ITEMS = 16  # of a large request
Body = tuple[bytes, int]
"""A request and the number of its items."""


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: the demo's drawings)")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmray-benchmark-") as name:
        folder = Path(name)
        table = make_table(folder / "table", ROWS, args.photos)
        bundle = make_bundle(folder)
        rows = pq.read_table(sorted(table.glob("*.parquet"))[0]).to_pylist()
        bare = predictor_alone(bundle, table, rows, args.seconds)
        with endpoint(bundle) as port:
            print(
                json.dumps({"predictor": bare, "endpoint": over_http(port, table, rows, bare, args.seconds)}, indent=1)
            )


def predictor_alone(bundle: Path, table: Path, rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Returns milliseconds for one item and items/s in batches, of the predictor in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_predict, (str(bundle), str(table), rows, seconds))


def _predict(bundle: str, table: str, rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    from mmray.bundle import load_bundle
    from mmray.config import ScoreConfig
    from mmray.predictor import Predictor
    from mmray.source import ImageSource

    loaded = load_bundle(bundle)
    predictor = Predictor.on_this_worker(loaded, ImageSource((), loaded.config.image.max_bytes), ScoreConfig())
    images = [Path(table, row["image_path"]).read_bytes() for row in rows]
    texts = [row["text"] for row in rows]

    def run(first: int, items: int) -> None:
        picked = [(first + k) % len(rows) for k in range(items)]
        predictor.predict({"image": [images[k] for k in picked], "text": [texts[k] for k in picked]})

    single = timed(lambda k: run(k, 1), seconds / 2)
    batches = timed(lambda k: run(k * ITEMS, ITEMS), seconds / 2)
    return {
        "single_ms_median": round(1000 * statistics.median(single), 2),
        f"items_per_s_by_{ITEMS}": round(ITEMS * len(batches) / sum(batches), 1),
    }


def timed(call: Callable[[int], object], seconds: float) -> list[float]:
    """Calls again and again for some seconds, after two calls to warm up; returns the seconds of each call."""
    call(0), call(1)
    taken: list[float] = []
    while sum(taken) < seconds:
        started = time.perf_counter()
        call(len(taken))
        taken.append(time.perf_counter() - started)
    return taken


@contextmanager
def endpoint(bundle: Path) -> Iterator[int]:
    """Runs `mmray serve` and yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "mmray.cli", "serve", str(bundle), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if "ready" not in process.stdout.readline():
            raise SystemExit("the endpoint did not start")
        yield port
        process.terminate()


def over_http(
    port: int, table: Path, rows: list[dict[str, Any]], bare: dict[str, float], seconds: float
) -> dict[str, Any]:
    """Returns latencies and rates of the endpoint, and their ratios to the predictor's."""
    one = [body(table, [row]) for row in rows]
    many = [body(table, rows[k : k + ITEMS]) for k in range(0, len(rows), ITEMS)]
    client = Client(port)
    alone = timed(lambda k: client.ask(one[k % len(one)]), seconds)
    single_ms = 1000 * statistics.median(alone)
    large, small = closed_loop(port, many, 4, seconds), closed_loop(port, one, 16, seconds)
    pushed = open_loop(port, many, 4 * large["items_per_s"] / ITEMS, seconds)
    started = time.perf_counter()
    while client.ask(one[0]) != 200:
        time.sleep(0.05)
    return {
        "single_ms_median": round(single_ms, 2),
        "added_ms_median": round(single_ms - bare["single_ms_median"], 2),
        f"items_per_s_by_{ITEMS}": large["items_per_s"],
        f"ratio_by_{ITEMS}": round(large["items_per_s"] / bare[f"items_per_s_by_{ITEMS}"], 3),
        "requests_per_s_single_16_clients": small["items_per_s"],
        "four_times_overload": {**pushed, "goodput_ratio": round(pushed["items_per_s"] / large["items_per_s"], 3)},
        "recovery_s": round(time.perf_counter() - started, 2),
    }


def body(table: Path, rows: list[dict[str, Any]]) -> Body:
    """Returns a request for some rows."""
    images = [base64.b64encode((table / row["image_path"]).read_bytes()).decode() for row in rows]
    items = [{"text": row["text"], "image": {"base64": image}} for row, image in zip(rows, images, strict=True)]
    return json.dumps({"items": items}).encode(), len(items)


class Client:
    """One connection that stays open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, request: Body) -> int:
        """Sends a request and returns the status of its answer."""
        try:
            self._connection.request("POST", "/v1/score", request[0], {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            response.read()
            return response.status
        except (http.client.HTTPException, OSError):  # refused while it was being sent
            self._connection.close()
            return 0


def closed_loop(port: int, bodies: list[Body], clients: int, seconds: float) -> dict[str, float]:
    """Returns items/s where each client sends its next request as it has its answer."""
    ends, done = time.perf_counter() + seconds, Counter[str]()

    def work(seed: int) -> None:
        client, choice = Client(port), random.Random(seed)
        while time.perf_counter() < ends:
            request = choice.choice(bodies)
            if client.ask(request) == 200:
                done["items"] += request[1]

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return {"items_per_s": round(done["items"] / seconds, 1)}


def open_loop(port: int, bodies: list[Body], rate: float, seconds: float) -> dict[str, Any]:
    """Sends requests at a rate, whatever becomes of them; returns their statuses, accepted p99 and goodput."""
    statuses, accepted, refused = Counter[int](), list[float](), list[float]()

    def work(request: Body) -> None:
        started = time.perf_counter()
        status = Client(port).ask(request)
        statuses[status] += 1
        (accepted if status == 200 else refused).append(time.perf_counter() - started)

    threads, started = [], time.perf_counter()
    for k in range(int(rate * seconds)):
        time.sleep(max(started + k / rate - time.perf_counter(), 0))
        threads.append(threading.Thread(target=work, args=(bodies[k % len(bodies)],)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    return {
        "offered_per_s": round(rate, 1),
        "statuses": dict(statuses),
        "items_per_s": round(statuses[200] * bodies[0][1] / took, 1),
        "accepted_p99_s": round(percentile(accepted, 0.99), 3),
        "refused_p99_s": round(percentile(refused, 0.99), 3),
    }


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which a share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


if __name__ == "__main__":
    main()
