"""The endpoint on a running Ray Serve: the same scores, hostile requests, a new bundle, a replica that is killed."""

import asyncio
import base64
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from models import colour_table, saved_bundle, score_in_process
from processes import listening, mmray, serving, wait_for
from ray import serve
from test_endpoint import encoded, spoiled

from mmray.bundle import load_bundle
from mmray.options import ScoreConfig
from mmray.serve.app import NAME, application, endpoint
from mmray.serve.haproxy import free_port, haproxy
from mmray.serve.settings import ServeConfig

pytestmark = pytest.mark.ray

SETTINGS = ServeConfig(max_items=32, max_body_bytes=2**20, header_timeout_s=2, body_timeout_s=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=504)


@pytest.fixture(scope="module")
def bundles(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    return [saved_bundle(folder / str(seed), rows, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def url(bundles: list[str]) -> Iterator[str]:
    with endpoint(bundles[0], SETTINGS.model_copy(update={"port": free_port()})) as url:
        yield url


def deploy(bundle: str) -> None:
    serve.run(application(bundle, SETTINGS), name=NAME, route_prefix="/")


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


def test_headers_that_drip_are_cut_off_and_a_body_that_drips_too(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    for sent, code in ((head, "408 Request Time-out"), (head + b"\r\n{", "BODY_TIMEOUT")):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(sent)
            answer = b""
            while code.encode() not in answer:
                more = connection.recv(4096)
                assert more, answer
                answer += more
        assert answer.startswith(b"HTTP/1.1 408"), sent


def test_headers_of_any_bytes_get_no_500_and_none_that_serve_would_obey(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    odd = [
        b"X-Request-Id: \xff\xfe",
        b"X-Request-Id: a b",
        b"X-Request-Timeout-Seconds: 0.000001",
        b"X-Session-Id: \xff",
    ]
    odd += [b"serve_multiplexed_model_id: \xff", b"X-Request-Disconnect-Disabled: 1", b"Cookie: \xff", b"X" * 20_000]
    odd += [b"Content-Type: multipart/form-data; boundary=x; charset=undefined", b"Content-Type: \xff", b"Expect: \xff"]
    body = b'{"text": "red"}'
    for header in odd:
        kind = b"" if header.startswith(b"Content-Type") else b"Content-Type: application/json\r\n"
        head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\n" + kind + b"Content-Length: %d\r\n" % len(body) + header
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head + b"\r\n\r\n" + body)
            status = int(connection.recv(4096).split()[1])
        assert status in ({400, 415} if kind == b"" or header[:2] == b"XX" else {200, 417}), header


def test_nothing_but_the_endpoint_is_open_to_the_network(url: str) -> None:
    """Ray's own configuration of HAProxy shows its statistics to anyone."""
    sockets = {os.readlink(link) for pid in pids("haproxy") for link in Path(f"/proc/{pid}/fd").iterdir()}
    ours = {address for address, inode in listening().items() if f"socket:[{inode}]" in sockets}
    assert ours == {("127.0.0.1", int(url.rpartition(":")[2]))}
    assert {host for host, port in listening() if 30_000 <= port < 31_000} <= {"127.0.0.1"}, "the replicas"


def test_a_new_version_takes_over_without_a_failed_request(url: str, bundles: list[str]) -> None:
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


def test_a_replica_killed_under_load_is_replaced_and_nobody_gets_worse_than_a_503(url: str) -> None:
    victims, codes = replicas(), Counter[int]()

    async def talk() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            deadline = time.monotonic() + 60
            while codes[200] < 200 or not replicas() - victims:
                assert time.monotonic() < deadline, codes
                asked = (client.post("/v1/score", json={"text": "red"}) for _ in range(8))
                for answer in await asyncio.gather(*asked, return_exceptions=True):
                    if isinstance(answer, httpx.TransportError):  # it was with the replica as that was killed
                        codes[0] += 1
                        continue
                    assert not isinstance(answer, BaseException)
                    codes[answer.status_code] += 1
                    assert answer.status_code == 200 or "Retry-After" in answer.headers
                if sum(codes.values()) == 40:
                    for victim in victims:
                        os.kill(victim, signal.SIGKILL)

    asyncio.run(talk())
    assert set(codes) <= {0, 200, 503}
    assert codes[0] <= 8, "no more than were being worked on"


def replicas() -> set[int]:
    """The processes of this test's replicas."""
    return pids(f"ServeReplica:{NAME}")


def pids(words: str) -> set[int]:
    """The processes below this one whose command line has these words."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    found = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
    family = {os.getpid()}
    while more := {int(pid) for pid, parent, _ in found if int(parent) in family} - family:
        family |= more
    return {int(pid) for pid, _, command in found if int(pid) in family and words in command}


PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def test_haproxy_ends_with_what_started_it(tmp_path: Path) -> None:
    """As where the command is killed, and no part of Ray is left to end it."""
    address = "127.0.0.1", free_port()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        f"defaults\n    mode http\n    timeout client 9s\nfrontend x\n    bind {address[0]}:{address[1]}\n"
    )
    with haproxy(ServeConfig(port=free_port())) as folder:
        command = [sys.executable, "-c", PARENT, f"{folder}/haproxy", "-db", "-f", str(config)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
            try:
                wait_for(lambda: address in listening() or parent.poll() is not None)
                assert address in listening()
            finally:
                parent.kill()
        wait_for(lambda: address not in listening())


@pytest.mark.long
def test_a_command_that_is_killed_leaves_nobody_on_its_port(bundles: list[str]) -> None:
    address = "127.0.0.1", free_port()
    with serving(bundles[0], "--port", address[1]) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("ready")
        assert address in listening()
        run.kill()
        wait_for(lambda: address not in listening())


def test_the_command_answers_over_https_counts_and_ends_when_it_is_told_to(
    bundles: list[str], certificate: tuple[str, str]
) -> None:
    url = f"https://127.0.0.1:{free_port()}"
    command = [bundles[0], "--port", url.rpartition(":")[2], "--tls-cert", certificate[0], "--tls-key", certificate[1]]
    trust = ssl.create_default_context(cafile=certificate[0])
    with serving(*command, MMRAY_TOKEN="hush", RAY_metrics_report_interval_ms="500") as run:
        assert run.stdout is not None
        ready = run.stdout.readline()
        assert ready.startswith(f"ready at {url}; metrics for Prometheus at http://")
        with httpx.Client(base_url=url, verify=trust) as client:
            for part in ("/", "/page.css", "/page.js"):  # which test_page.py tries
                assert client.get(part).raise_for_status().content
            assert client.post("/v1/score", json={"text": "red"}).status_code == 401
            client.headers["Authorization"] = "Bearer hush"
            assert client.post("/v1/score", json={"items": [{"text": "red"}] * 3}).status_code == 200
        await_metric(ready.split()[-1], r'ray_mmray_items_total\{.*reason="IMAGE_NULL".*status="degraded".*\} 3\.0')
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))):  # silent: it keeps nobody waiting
            assert httpx.get(f"{url}/healthz", verify=trust).status_code == 200
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert "hush" not in errors


def await_metric(url: str, pattern: str) -> None:
    """Waits until a line of the metrics is this."""
    deadline = time.monotonic() + 60
    while not re.search(f"^{pattern}$", text := httpx.get(url).text, re.MULTILINE):
        assert time.monotonic() < deadline, [line for line in text.splitlines() if "mmray" in line]
        time.sleep(0.2)


@pytest.mark.long
def test_parity_of_every_path_is_shown_by_one_command(bundles: list[str], rows: Path) -> None:
    run = mmray("parity", bundles[0], rows, "--rows", 100)
    assert run.returncode == 0, run.stderr
    paths = [line.partition("  ")[0] for line in run.stdout.splitlines()]
    assert [path.split()[0] for path in paths] == ["mmray", "mmray", "mmray", "HTTP,"]
    found = [float(line.split("difference ")[1].split()[0]) for line in run.stdout.splitlines()]
    assert max(found) < 1e-4
