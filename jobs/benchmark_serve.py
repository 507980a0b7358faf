"""What `jobs/benchmark.py serve` measures: the endpoint beside the predictor it calls and a Serve without a model.

The same photographs and texts go to the predictor directly, in a process of its own as a replica has, and then over
HTTP to `mmray serve` on loopback: one at a time, from many clients at once, and at four times the rate that it can
answer. Clients and server share the machine's CPUs.
"""

import asyncio
import base64
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import uvloop  # of ray[serve]; a client costs half as much with it, on the CPUs that it shares with the server

from mmray.serve.haproxy import free_port

ROWS = 512  # of the table; an eighth of it is asked for
ITEMS = 16  # of a large request
OVERLOAD = 4  # times the rate that was answered
SAMPLE_EVERY_S = 5.0
HEAD = "POST /v1/score HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
Body = tuple[bytes, int]
"""A request and the number of its items."""


def measure_serving(bundle: Path, table: Path, seconds: float, soak_s: float) -> dict[str, Any]:
    """Returns latencies and rates of the endpoint, and their ratios to the predictor's and to a Serve without a model.

    Args:
        bundle: what answers.
        table: photographs and texts to ask with.
        seconds: of each measurement.
        soak_s: seconds of load for which memory is watched afterwards.
    """
    rows = pq.read_table(sorted(table.glob("*.parquet"))[0]).to_pylist()
    one = [body(table, [row]) for row in rows]
    many = [body(table, rows[k : k + ITEMS]) for k in range(0, len(rows), ITEMS)]
    bare = in_a_process(_predict, str(bundle), str(table), rows, seconds)
    with no_model() as port:
        idle = uvloop.run(closed_loop(port, one, 16, seconds))
    with endpoint(bundle) as port:
        figures = uvloop.run(over_http(port, one, many, bare, idle["per_s"], seconds))
        if soak_s:
            figures["soak"] = uvloop.run(soak(port, one, soak_s))
    return {"predictor": bare, "serve_without_a_model_per_s": idle["per_s"], "endpoint": figures}


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _predict(bundle: str, table: str, rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Returns milliseconds for one item and items/s in batches."""
    from mmray.bundle import load_bundle
    from mmray.options import ScoreConfig
    from mmray.predictor import Predictor
    from mmray.source import ImageSource

    loaded = load_bundle(bundle)
    predictor = Predictor.on_this_worker(loaded, ImageSource((), loaded.config.image.max_bytes), ScoreConfig())
    images = [Path(table, row["image_path"]).read_bytes() for row in rows]
    texts = [row["text"] for row in rows]

    def timed(items: int) -> list[float]:
        taken: list[float] = []
        while sum(taken) < seconds / 2:
            picked = [(len(taken) * items + k) % len(rows) for k in range(items)]
            started = time.perf_counter()
            predictor.predict({"image": [images[k] for k in picked], "text": [texts[k] for k in picked]})
            taken.append(time.perf_counter() - started)
        return taken

    timed(1)  # to warm up
    single, batches = timed(1), timed(ITEMS)
    return {
        "single_ms_median": round(1000 * statistics.median(single), 2),
        f"items_per_s_by_{ITEMS}": round(ITEMS * len(batches) / sum(batches), 1),
    }


@contextmanager
def endpoint(bundle: Path) -> Iterator[int]:
    """Runs `mmray serve` and yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "mmray.cli", "serve", str(bundle), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if "ready" not in process.stdout.readline():
            raise SystemExit("the endpoint did not start")
        try:
            yield port
        finally:
            process.terminate()


@contextmanager
def no_model() -> Iterator[int]:
    """Runs Ray Serve, as it is by default, with an application that reads the body and answers; yields its port."""
    port, context = free_port(), multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_serve_nothing, args=(port, ready, done), daemon=True)
    process.start()
    if not ready.wait(60):
        raise SystemExit("Serve without a model did not start")
    try:
        yield port
    finally:
        done.set()
        process.join()


def _serve_nothing(port: int, ready: Any, done: Any) -> None:
    from fastapi import FastAPI
    from ray import serve

    from mmray.cluster import cluster

    api = FastAPI()

    @api.post("/v1/score")
    async def score(body: dict[str, Any]) -> int:
        return len(body)

    class Nothing:
        pass

    with cluster(1):
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        deployment = serve.deployment(max_ongoing_requests=64)(serve.ingress(api)(Nothing))
        serve.run(deployment.bind(), route_prefix="/")
        ready.set()
        done.wait()
        serve.delete("default")


def body(table: Path, rows: list[dict[str, Any]]) -> Body:
    """Returns a request for some rows, headers and all."""
    images = [base64.b64encode((table / row["image_path"]).read_bytes()).decode() for row in rows]
    items = [{"text": row["text"], "image": {"base64": image}} for row, image in zip(rows, images, strict=True)]
    content = json.dumps({"items": items}).encode()
    return HEAD.format(len(content)).encode() + content, len(items)


async def over_http(
    port: int, one: list[Body], many: list[Body], bare: dict[str, float], idle_per_s: float, seconds: float
) -> dict[str, Any]:
    """Returns latencies and rates, and their ratios to the predictor's and to a Serve without a model."""
    await closed_loop(port, one, 1, 1)  # to warm up
    alone = await closed_loop(port, one, 1, seconds)
    large, small = await closed_loop(port, many, 4, seconds), await closed_loop(port, one, 16, seconds)
    pushed = await open_loop(port, one, OVERLOAD * small["per_s"], seconds)
    started = time.perf_counter()
    while (await ask(port, one[0])) != 200:
        await asyncio.sleep(0.05)
    recovery_s = round(time.perf_counter() - started, 2)
    return {
        "single_ms_median": alone["ms_median"],
        "added_ms_median": round(alone["ms_median"] - bare["single_ms_median"], 2),
        f"items_per_s_by_{ITEMS}": large["items_per_s"],
        f"ratio_by_{ITEMS}": round(large["items_per_s"] / bare[f"items_per_s_by_{ITEMS}"], 3),
        "single_items_16_clients_per_s": small["per_s"],
        "ratio_to_serve_without_a_model": round(small["per_s"] / idle_per_s, 3),
        "overload": {**pushed, "goodput_ratio": round(pushed["answered_per_s"] / small["per_s"], 3)},
        "recovery_s": recovery_s,
    }


async def closed_loop(port: int, bodies: Sequence[Body], clients: int, seconds: float) -> dict[str, float]:
    """Returns rates and median latency where each client sends its next request as it has its answer."""
    ends, taken, items = time.perf_counter() + seconds, list[float](), 0

    async def client(seed: int) -> None:
        nonlocal items
        choice = random.Random(seed)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.perf_counter()) < ends:
            request = choice.choice(bodies)
            if await exchange(reader, writer, request) == 200:
                taken.append(time.perf_counter() - started)
                items += request[1]
        writer.close()

    await asyncio.gather(*(client(seed) for seed in range(clients)))
    return {
        "per_s": round(len(taken) / seconds, 1),
        "items_per_s": round(items / seconds, 1),
        "ms_median": round(1000 * statistics.median(taken), 2),
    }


async def open_loop(port: int, bodies: Sequence[Body], rate: float, seconds: float) -> dict[str, Any]:
    """Sends requests at a rate, whatever becomes of them; returns their statuses, accepted p99 and goodput."""
    statuses, accepted, refused = Counter[int](), list[float](), list[float]()

    async def send(request: Body) -> None:
        begun = time.perf_counter()
        status = await ask(port, request)
        statuses[status] += 1
        (accepted if status == 200 else refused).append(time.perf_counter() - begun)

    tasks, started = [], time.perf_counter()
    for k in range(int(rate * seconds)):
        await asyncio.sleep(max(started + k / rate - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(send(bodies[k % len(bodies)])))
    await asyncio.gather(*tasks)
    took = time.perf_counter() - started
    return {
        "offered_per_s": round(len(tasks) / took, 1),
        "statuses": dict(statuses),
        "answered_per_s": round(statuses[200] / took, 1),
        "accepted_p99_s": round(percentile(accepted, 0.99), 3),
        "refused_p99_s": round(percentile(refused, 0.99), 3),
    }


async def ask(port: int, request: Body) -> int:
    """Returns the status of the answer to a request on a connection of its own; 0 without an answer."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await exchange(reader, writer, request)
        finally:
            writer.close()
    except (OSError, EOFError):
        return 0


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Body) -> int:
    """Sends a request, reads its answer to the end, and returns the answer's status."""
    writer.write(request[0])
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
    await reader.readexactly(int(length[1]) if length else 0)
    return int(head.split()[1])


async def soak(port: int, bodies: Sequence[Body], seconds: float) -> dict[str, Any]:
    """Returns the replica's memory in MB at the first quarter and at the end of a long load."""
    load = asyncio.create_task(closed_loop(port, bodies, 8, seconds))
    samples: list[float] = []
    while not load.done():
        await asyncio.wait([load], timeout=SAMPLE_EVERY_S)
        samples.append(resident_mb("ray::ServeReplica"))
    quarter, last = samples[len(samples) // 4], statistics.median(samples[-5:])
    return {**await load, "seconds": seconds, "quarter_mb": quarter, "end_mb": last, "ratio": round(last / quarter, 3)}


def resident_mb(name: str) -> float:
    """Returns the resident size in MB of the processes whose name begins so."""
    listed = subprocess.run(["ps", "-eo", "rss,args"], capture_output=True, text=True, check=True).stdout
    found = [line.split(maxsplit=1) for line in listed.splitlines()[1:]]
    return round(sum(int(size) for size, command in found if command.startswith(name)) / 1024, 1)


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which a share of the values lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0
