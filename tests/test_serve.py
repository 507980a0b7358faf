"""The endpoint on a running Ray Serve: the same scores, hostile requests, a new bundle, a replica that is killed."""

import asyncio
import base64
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from models import colour_table, score_in_process, small_bundle, with_golden
from ray import serve
from test_endpoint import encoded, spoiled

from mmray.bundle import load_bundle, save_bundle
from mmray.cluster import cluster
from mmray.config import ScoreConfig
from mmray.serve.app import NAME, ServeArgs, build_app
from mmray.serve.settings import ServeConfig

pytestmark = pytest.mark.ray

ALONE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
SETTINGS = ServeConfig(max_items=32, max_body_bytes=2**20, body_timeout_s=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=504)


@pytest.fixture(scope="module")
def bundles(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    for seed in range(2):
        save_bundle(with_golden(small_bundle(seed=seed), rows), str(folder / str(seed)))
    return [str(folder / str(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def url(bundles: list[str]) -> Iterator[str]:
    with cluster(2), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
        deploy(bundles[0])
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def deploy(bundle: str) -> None:
    serve.run(build_app(ServeArgs(bundle=bundle, settings=SETTINGS)), name=NAME, route_prefix="/")


def results(url: str, items: list[dict[str, Any]], at_once: int = 4) -> list[dict[str, Any]]:
    """Asks for items in requests of 16, several at once, and returns their results in order."""

    async def talk() -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(at_once)

        async def ask(client: httpx.AsyncClient, part: list[dict[str, Any]]) -> list[dict[str, Any]]:
            async with gate:
                response = await client.post("/v1/score", json={"items": part})
                response.raise_for_status()
                found: list[dict[str, Any]] = response.json()["results"]
                return found

        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            parts = [items[k : k + 16] for k in range(0, len(items), 16)]
            answers = await asyncio.gather(*(ask(client, part) for part in parts))
        return [result for answer in answers for result in answer]

    return asyncio.run(talk())


def scored_table(bundle: str, table: Path, roots: Path, output: Path) -> list[dict[str, Any]]:
    options = ScoreConfig(probabilities=True, image_roots=(str(roots),))
    score_in_process(bundle, str(table), str(output), options)
    found: list[dict[str, Any]] = pyarrow.dataset.dataset(str(output / "data")).to_table().to_pylist()
    return found


def differences(table: list[dict[str, Any]], answers: list[dict[str, Any]]) -> float:
    """Returns the largest difference of a score; everything else has to be equal."""
    same = ("predicted_label", "modalities_used", "status", "reason", "reason_detail")
    assert [[row[name] for name in same] for row in table] == [[result[name] for name in same] for result in answers]
    pairs = [(row["score"], r["score"]) for row, r in zip(table, answers, strict=True) if row["score"] is not None]
    return max(abs(a - b) for a, b in pairs)


def test_five_hundred_rows_get_the_scores_of_a_scored_table(
    url: str, rows: Path, bundles: list[str], tmp_path: Path
) -> None:
    table = scored_table(bundles[0], rows, rows, tmp_path / "out")
    items = [{"text": row["text"], "image": encoded(rows / row["image_path"])} for row in table]
    assert differences(table, results(url, items)) < 1e-4


def test_every_odd_image_gets_the_status_and_reason_of_a_scored_table(
    url: str, shared: Path, bundles: list[str], tmp_path: Path
) -> None:
    folder = shared / "data" / "odd_images"
    names = sorted(path.name for path in folder.iterdir() if path.stat().st_size < 500_000)
    pq.write_table(pa.table({"image_path": names, "text": names}), tmp_path / "odd.parquet")
    table = scored_table(bundles[0], tmp_path / "odd.parquet", folder, tmp_path / "out")
    items = [{"text": row["text"], "image": encoded(folder / row["image_path"])} for row in table]
    assert len(items) > 700
    answers = []
    for k in range(0, len(items), 4):  # small requests: the largest images fill a body
        answers += results(url, items[k : k + 4])
    assert differences(table, answers) < 1e-4


def test_five_thousand_requests_of_rubbish_get_no_500_and_do_not_wear_the_replica_out(url: str, rows: Path) -> None:
    generator = random.Random(0)
    image = base64.b64encode((rows / "images" / "0.jpg").read_bytes())
    whole = b'{"items": [{"text": "the red square", "image": {"base64": "' + image + b'"}}]}'
    before = replicas()

    async def talk() -> set[int]:
        codes, gate = set(), asyncio.Semaphore(16)

        async def ask(client: httpx.AsyncClient, body: bytes, kind: str) -> None:
            async with gate:
                codes.add((await client.post("/v1/score", content=body, headers={"content-type": kind})).status_code)

        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            kinds = ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain"]
            work = [(spoiled(whole, generator), generator.choices(kinds, (6, 2, 1, 1))[0]) for _ in range(5000)]
            await asyncio.gather(*(ask(client, body, kind) for body, kind in work))
        return codes

    assert asyncio.run(talk()) <= {200, 400, 413, 415, 422}
    assert replicas() == before


def test_a_new_bundle_answers_without_a_failed_request_and_a_bad_one_leaves_the_old(
    url: str, bundles: list[str], tmp_path: Path
) -> None:
    prints = [load_bundle(bundle).fingerprint for bundle in bundles]
    seen: list[str] = []

    async def talk() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            change = asyncio.create_task(asyncio.to_thread(deploy, bundles[1]))
            while len(seen) < 1000 or not change.done():
                answers = await asyncio.gather(*(client.post("/v1/score", json={"text": "red"}) for _ in range(8)))
                seen.extend(answer.raise_for_status().json()["fingerprint"] for answer in answers)
            await change

    asyncio.run(talk())
    assert set(seen) == set(prints)
    assert seen[-1] == prints[1]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bundle.json").write_text("{}")
    with pytest.raises(RuntimeError, match="failed"):
        deploy(str(broken))
    assert httpx.get(f"{url}/v1/model").json()["fingerprint"] == prints[1]
    deploy(bundles[0])
    assert httpx.get(f"{url}/readyz").json()["fingerprint"] == prints[0]


def test_killed_replicas_are_replaced(url: str) -> None:
    victims = replicas()
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        try:
            response = httpx.post(f"{url}/v1/score", json={"text": "red"}, timeout=60)
        except httpx.TransportError:
            response = None
        if response is not None and response.status_code == 200:
            break
        assert time.monotonic() < deadline, "no replica came back"
    assert replicas() - victims


def replicas() -> set[int]:
    """The processes of this test's replicas."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {int(line.split()[0]) for line in listed.splitlines() if f"ServeReplica:{NAME}" in line}


def test_the_command_answers_and_ends_when_it_is_told_to(bundles: list[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mmray.cli", "serve", bundles[0], "--port", port]
    environment = {**ALONE, "MMRAY_TOKEN": "hush"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == f"ready at http://127.0.0.1:{port}\n"
        asked = {"url": f"http://127.0.0.1:{port}/v1/score", "json": {"text": "red"}}
        assert httpx.post(**asked).status_code == 401
        assert httpx.post(**asked, headers={"Authorization": "Bearer hush"}).status_code == 200
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert "hush" not in errors
