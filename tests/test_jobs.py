"""What is deployed, as it is used: on three nodes, with a bucket, by the API of the cluster's job server."""

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from faults import upload
from manifests import found
from models import colour_table, saved_bundle
from processes import wait_for
from ray_head import Head, running_head
from render import render

from mmray.parquet import from_parquet
from mmray.schedule.published import read_published
from mmray.score.verify import verify_output
from mmray.store import open_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
ROWS = 60
TRAINING = """
[table]
train = "{rows}"
[image]
size = 32
[model]
image_encoder = {{ kind = "torchvision", name = "mobilenet_v3_small" }}
text_encoder = {{ kind = "bag" }}
fusion = {{ kind = "attention" }}
[train]
epochs = 1
batch_size = 33  # no multiple of the workers
"""
OFTEN = ["--slice-rows", "1", "--lease-s", "3"]  # many slices, so that there is a middle of a run


class Cluster:
    """Three nodes, and the jobs that are submitted to them."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def nodes(self) -> int:
        """How many are up."""
        if not self.head.answers():
            return 0
        nodes = self.head.asked("GET", "v0/nodes").json()["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def submit(self, entrypoint: str) -> str:
        """Returns the id of a job that may not have started yet."""
        job = {"entrypoint": entrypoint, "submission_id": f"job-{secrets.token_hex(4)}"}
        return str(self.head.asked("POST", "jobs/", job).raise_for_status().json()["submission_id"])

    def end(self, job_id: str) -> tuple[str, str]:
        """Waits for the end of a job; returns its status and its log."""
        wait_for(lambda: self._job(job_id)["status"] not in ("PENDING", "RUNNING"), timeout_s=300)
        return self._job(job_id)["status"], self._job(job_id, "/logs")["logs"]

    def _job(self, job_id: str, of: str = "") -> dict[str, str]:
        found: dict[str, str] = self.head.asked("GET", f"jobs/{job_id}{of}").raise_for_status().json()
        return found

    def run(self, entrypoint: str) -> str:
        """Returns the log of a job that succeeds."""
        status, log = self.end(self.submit(entrypoint))
        assert status == "SUCCEEDED", log
        return log

    @contextmanager
    def night(self, command: list[str], job: str) -> Iterator[subprocess.Popen[str]]:
        """Runs the command of a CronJob's pod."""
        words = [word.replace("$(JOB)", job).replace("http://mmray-head-svc:8265", self.head.url) for word in command]
        with subprocess.Popen(words, env=self.head.env, stdout=subprocess.PIPE, text=True) as pod:
            try:
                yield pod
            finally:
                pod.kill()


@pytest.fixture
def cluster(s3: str) -> Iterator[Cluster]:
    store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with running_head(num_cpus=0, **store) as head:
        cluster = Cluster(head)
        wait_for(head.answers)
        for num_nodes in (2, 3):  # one after another: a node has half a minute to start, whatever else does
            head.add_node(num_cpus=2)
            wait_for(lambda: cluster.nodes() == num_nodes)  # noqa: B023
        yield cluster


class Deployment:
    """What deploy/render.py prints for a bucket."""

    def __init__(self, bucket: str) -> None:
        self.bundle, self.published = f"{bucket}/runs/first/bundle", f"{bucket}/published"
        self.table, self.output = f"{bucket}/rows", f"{bucket}/scored"
        self._values = {"train_config": f"{bucket}/train.toml", "train_storage": f"{bucket}/runs"}
        self._values |= {"table": self.table, "output": self.output, "published": self.published}
        self._cluster = {"worker_cpus": 3, "train_workers": 1, "max_workers": 1}  # two processes for each job

    def entrypoint(self, kind: str) -> str:
        """Of a RayJob or a RayCronJob."""
        return str(self._of(kind, "entrypoint"))

    def command(self, bundle: str) -> list[str]:
        """Of a CronJob's pod."""
        return [str(word) for word in self._of("cronjob", "command", bundle)]

    def _of(self, kind: str, key: str, bundle: str | None = None) -> object:
        (manifest,) = render(kind, bundle=bundle or self.bundle, **self._values, **self._cluster)
        (value,) = found(manifest, key)
        return value


def pid_of(entrypoint: str) -> int:
    """The process that runs the command of a job."""
    listed = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in listed.splitlines() if "python" in line and line.endswith(f"/{entrypoint}"))
    return int(line.split()[0])


def test_three_nodes_train_score_and_publish_every_night_whatever_happens_to_a_tick(
    cluster: Cluster, s3: str, tmp_path: Path
) -> None:
    rows, deployment = colour_table(tmp_path / "rows", rows=ROWS), Deployment(s3)
    upload(rows, s3, "rows")
    store = open_store(s3)
    store.create("train.toml", TRAINING.format(rows=deployment.table).encode())

    assert deployment.bundle in cluster.run(deployment.entrypoint("rayjob-train"))
    assert f"{ROWS} rows: {ROWS} ok" in cluster.run(deployment.entrypoint("rayjob-score"))
    assert verify_output(deployment.output, 2).passed

    tick = " ".join([deployment.entrypoint("raycronjob"), *OFTEN])
    killed = cluster.submit(tick)
    wait_for(lambda: sum("/data/part-" in key for key in store.list("published/runs")) >= 3)
    os.kill(pid_of(tick), signal.SIGKILL)
    status, log = cluster.end(killed)
    assert status == "FAILED", log
    assert not list(store.list("published/published"))

    following = cluster.submit(tick)
    with cluster.night([*deployment.command(deployment.bundle), *OFTEN], "mmray-tick-1") as overlapping:
        said, _ = overlapping.communicate(timeout=300)
    status, log = cluster.end(following)
    assert (status, overlapping.returncode) == ("SUCCEEDED", 0), log
    assert sorted("another tick is at work" in words for words in (said, log)) == [False, True], said + log
    assert f"published number 1: {ROWS} rows, {ROWS} scored now" in said + log
    first = read_published(deployment.published)
    assert len({key.split("/")[2] for key in store.list("published/runs")}) == 1, "the run that was begun"

    saved_bundle(tmp_path / "second", rows, seed=1)
    with cluster.night(deployment.command(upload(tmp_path / "second", s3, "second")), "mmray-tick-2") as pod:
        said, _ = pod.communicate(timeout=300)
    assert pod.returncode == 0, said
    assert f"published number 2: {ROWS} rows, {ROWS} scored now" in said
    second = read_published(deployment.published)

    ids = [row for k in range(2) for row in pq.read_table(rows / f"part-{k}.parquet")["id"].to_pylist()]
    for published in (first, second):
        (run,) = published.runs
        assert verify_output(f"{deployment.published}/{run}", 2).passed
        parts = [from_parquet(open_store(deployment.published).read(part.key)) for part in published.parts]
        assert [row for part in parts for row in part["id"].to_pylist()] == ids
    assert first.identity != second.identity
