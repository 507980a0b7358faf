"""Scoring on a cluster of three nodes: as one process does, by whom and where, what is measured, a lost node."""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet
import pytest
import ray
from models import score_in_process, with_other_scores
from processes import ALONE, HEAD, NODE, read, wait_for
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster

from mmray.cluster import cluster
from mmray.errors import BundleError, ConfigError
from mmray.options import ScoreConfig
from mmray.placement import place
from mmray.schedule.lease import lease
from mmray.schedule.meters import beat
from mmray.score.commit import Receipt
from mmray.score.foreman import Foreman
from mmray.score.job import score_table
from mmray.score.verify import verify_output
from mmray.slices import Slice, slices_to_arrow
from mmray.store import open_store

pytestmark = pytest.mark.ray
ROWS = 240


class Nodes:
    """A cluster on this machine, and what its nodes say."""

    def __init__(self, folder: str) -> None:
        system = {**HEAD["_system_config"], "metrics_report_interval_ms": 500}
        head = {"num_cpus": 2, "temp_dir": folder, **HEAD, "_system_config": system}
        self.cluster, self._folder = Cluster(initialize_head=True, head_node_args=head), folder
        self.labelled = self.cluster.add_node(num_cpus=2, labels={"purpose": "scoring"}, **NODE)
        self.cluster.add_node(num_cpus=2, labels={"purpose": "other"}, **NODE)

    def events(self, run: str) -> list[dict[str, Any]]:
        """What the processes of a run have logged."""
        logs = {log.resolve() for log in Path(self._folder).glob("session_*/logs/worker-*.err")}
        lines = [line for log in logs for line in log.read_text().splitlines() if line.startswith('{"event"')]
        return [event for event in map(json.loads, set(lines)) if event["run"] == run]

    def metrics(self) -> str:
        """What Prometheus would read from all nodes."""
        ports = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
        return "\n".join(page_of(f"http://127.0.0.1:{port}/metrics") for port in ports)

    def measured(self, pattern: str) -> float:
        """The sum of the samples that a pattern matches."""
        return sum(float(value) for value in re.findall(rf"^{pattern} ([\d.e+]+)$", self.metrics(), re.MULTILINE))


def page_of(url: str) -> str:
    try:
        with urllib.request.urlopen(url) as page:
            return str(page.read().decode())
    except OSError:  # a node's exporter is up a while after the node
        return ""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="mmray-", dir="/tmp") as folder:
        # As a local cluster of this process has it: Ray keeps the first token that a process has, for all its clusters.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        enable_token_auth_by_default()
        nodes = Nodes(folder)
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        with cluster():
            yield nodes
        nodes.cluster.shutdown()


def run_of(output: Path) -> str:
    return str(json.loads((output / "_mmray" / "run.json").read_text())["plan_hash"][:8])


def scored(output: Path) -> list[dict[str, Any]]:
    table = pyarrow.dataset.dataset(str(output / "data")).to_table()
    found: list[dict[str, Any]] = table.sort_by("id").to_pylist()
    return found


def test_scoring_on_a_cluster_gives_what_one_process_gives_and_prometheus_reads_it(
    nodes: Nodes, rows: Path, bundle: str, tmp_path: Path
) -> None:
    table = pyarrow.parquet.read_table(sorted(rows.glob("*.parquet")))
    images = ["nowhere.jpg"] * 10 + table["image_path"].to_pylist()[10:]
    pyarrow.parquet.write_table(table.set_column(1, "image_path", [images]), tmp_path / "rows.parquet")
    options = ScoreConfig(image_roots=(str(rows),), precision="fp32", slice_rows=30, num_actors=2)
    seen: list[int] = []
    stages = set[str]()
    environments: list[bytes] = []

    def look(receipt: Receipt) -> None:
        stages.update(receipt.seconds)
        seen.append(receipt.ledger.rows)
        actors = [pid for pid in Path("/proc").glob("[0-9]*") if b"Placed" in read(pid / "cmdline")]
        environments.extend(read(actor / "environ") for actor in actors)

    result = score_table(bundle, str(tmp_path / "rows.parquet"), str(tmp_path / "out"), options, on_slice=look)
    assert any(b"MALLOC_ARENA_MAX=1" in environment for environment in environments), "see test_allocator.py"
    assert result.scored_slices == result.num_slices == len(seen) == 8
    assert sum(seen) == result.ledger.rows == 240
    assert stages == {"read", "prepare", "forward", "commit"}
    assert verify_output(str(tmp_path / "out"), 2).passed
    score_in_process(bundle, str(tmp_path / "rows.parquet"), str(tmp_path / "alone"), options)
    tables = [
        pyarrow.dataset.dataset(str(tmp_path / name / "data")).to_table().sort_by("id") for name in ("out", "alone")
    ]
    assert tables[0].equals(tables[1])
    run = rf'[^}}]*run="{run_of(tmp_path / "out")}"[^}}]*'
    wait_for(lambda: nodes.measured(rf'ray_mmray_slices_total\{{{run}state="committed"[^}}]*\}}') == 8)
    assert nodes.measured(rf'ray_mmray_rows_total\{{{run}status="ok"[^}}]*\}}') == 230
    assert nodes.measured(rf'ray_mmray_rows_total\{{[^}}]*reason="MISSING"{run}status="degraded"[^}}]*\}}') == 10
    for stage in stages:
        assert nodes.measured(rf'ray_mmray_stage_seconds_count\{{{run}stage="{stage}"[^}}]*\}}') >= 8
    wait_for(lambda: nodes.measured(rf'ray_mmray_run_slices\{{{run}state="done"[^}}]*\}}') == 8)
    with lease(open_store(str(tmp_path / "root")), 0.4, beat):
        wait_for(lambda: nodes.measured(r"ray_mmray_lease_beat_timestamp_seconds\{[^}]*\}"))
    assert nodes.measured(rf"ray_mmray_slices_in_flight\{{{run}\}}") == 0


def test_a_bundle_that_this_machine_cannot_reproduce_stops_the_run_with_its_own_words(
    nodes: Nodes, rows: Path, bundle: str, tmp_path: Path
) -> None:
    other = with_other_scores(bundle, tmp_path / "other")
    with pytest.raises(BundleError, match="golden rows come out"):
        score_table(other, str(rows), str(tmp_path / "out"))


def test_rows_prepared_by_tasks_of_other_nodes_get_the_scores_of_one_process(
    nodes: Nodes, rows: Path, bundle: str, tmp_path: Path
) -> None:
    options = ScoreConfig(
        placement="cluster", num_actors=2, min_actors=1, slice_rows=20, node_labels={"purpose": "scoring"}
    )
    result = score_table(bundle, str(rows), str(tmp_path / "out"), options)
    assert result.ledger.statuses == {"ok": ROWS}
    assert verify_output(str(tmp_path / "out"), 2).passed
    score_in_process(bundle, str(rows), str(tmp_path / "alone"))
    for got, want in zip(scored(tmp_path / "out"), scored(tmp_path / "alone"), strict=True):
        assert got.pop("score") == pytest.approx(want.pop("score"), abs=1e-6)
        assert got.pop("image_weight") == pytest.approx(want.pop("image_weight"), abs=1e-6)
        assert got == want
    events = nodes.events(run_of(tmp_path / "out"))
    ready = [event for event in events if event["event"] == "ready"]
    assert {event["node"] for event in ready} == {nodes.labelled.node_id}
    committed = [event["slice"] for event in events if event["event"] == "slice committed" and event["created"]]
    assert sorted(committed) == list(range(result.num_slices))
    wait_for(lambda: nodes.measured(r'ray_tasks\{[^}]*Name="_prepare"[^}]*State="FINISHED"[^}]*\}') >= ROWS / 32)


def test_a_process_whose_receipt_does_not_arrive_is_replaced_and_one_whose_does_is_not(nodes: Nodes) -> None:
    class Process:  # here, so that it travels
        def pid(self) -> int:
            return os.getpid()

    slices = [Slice(k, "a.parquet", "1", 0, 1) for k in range(2)]
    actors = [ray.remote(Process).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote() for _ in slices]
    silent, heard = ray.get([actor.pid.remote() for actor in actors])
    foreman = Foreman(slices_to_arrow(slices), floor_s=1.0)
    for piece, actor in zip(slices, actors, strict=True):
        foreman.begin(f"attempt {piece.index}", piece, actor)
        foreman.end(f"attempt {piece.index}", committed=True)
    foreman.received(1)
    wait_for(lambda: not Path(f"/proc/{silent}").exists())
    assert ray.get([actor.pid.remote() for actor in actors])[1] == heard
    again = ray.get(actors[0].pid.remote())
    assert again != silent
    assert list(foreman._stuck()) == [], "once is enough"


# In short, test_kill.py kills a node, in whose place another comes.
@pytest.mark.long
def test_a_node_that_is_lost_for_good_costs_only_time(nodes: Nodes, rows: Path, bundle: str, tmp_path: Path) -> None:
    output, labels = tmp_path / "out", {"purpose": "other"}
    doomed, lost = nodes.cluster.add_node(num_cpus=1, labels=labels, **NODE), list[int]()

    def lose(receipt: Any) -> None:
        ready = {event["node"] for event in nodes.events(run_of(output)) if event["event"] == "ready"}
        if doomed.node_id in ready and not lost:
            nodes.cluster.remove_node(doomed, allow_graceful=False)
            lost.append(len(list((output / "data").iterdir())))

    # Three processes fit there only with one of them on the node that goes.
    options = ScoreConfig(slice_rows=1, num_actors=3, node_labels=labels)
    result = score_table(bundle, str(rows / "part-0.parquet"), str(output), options, on_slice=lose)
    assert lost, "a process was at work there"
    assert lost[0] < ROWS // 2, "and slices were left"
    assert result.ledger.statuses == {"ok": ROWS // 2}
    assert verify_output(str(output), 2).passed


def test_pools_that_could_not_work_are_refused_and_others_settled(nodes: Nodes) -> None:
    with pytest.raises(ConfigError, match="6 processes hold every CPU of 6"):
        place(ScoreConfig(placement="cluster", num_actors=6), 100)
    alone = place(ScoreConfig(), 100)
    assert (alone.min_actors, alone.max_actors, alone.options.placement) == (5, 5, "local")
    few = place(ScoreConfig(min_actors=2), 3)
    assert (few.min_actors, few.max_actors) == (2, 3), "no more than there are slices"


def test_gpus_that_outrun_their_own_cpus_are_fed_by_the_others(nodes: Nodes) -> None:
    gpus = nodes.cluster.add_node(num_cpus=4, num_gpus=2, **NODE)
    try:
        fed = place(ScoreConfig(gpus_per_actor=0.5), 100)
        assert (fed.max_actors, fed.num_cpus, fed.options.placement) == (4, 0, "cluster")
        own = place(ScoreConfig(gpus_per_actor=1, placement="local"), 100)
        small = place(ScoreConfig(gpus_per_actor=0.1, placement="local"), 100)
        assert small.max_actors == 9, "no more than leave Ray Data a CPU, whatever the GPUs could hold"
        assert (own.max_actors, own.num_cpus, own.options.decode_threads) == (2, 1, 1)
    finally:
        nodes.cluster.remove_node(gpus)


INTERRUPTED = """
import threading, time
import ray, ray.data
from mmray.cluster import READER, cluster

def readers():
    return [thread for thread in threading.enumerate() if thread.name == READER]

class Slow:
    def __call__(self, rows):
        time.sleep(0.2)
        return rows

end, left = ray.shutdown, []
ray.shutdown = lambda: (left.extend(readers()), end())
try:
    with cluster():
        rows = ray.data.range(32, override_num_blocks=32)
        rows = rows.map_batches(Slow, batch_size=1, compute=ray.data.ActorPoolStrategy(size=2))
        for row in rows.iter_rows():
            assert readers(), "Ray Data reads ahead in threads of another name; see mmray.cluster.READER"
            raise KeyboardInterrupt
except KeyboardInterrupt:
    assert not left, left
"""


def test_nothing_reads_on_when_an_interrupted_step_leaves_its_cluster(nodes: Nodes) -> None:
    # It would end the process, with exit code 1 and without a word.
    there = {name: value for name, value in os.environ.items() if name.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, env={**ALONE, **there})
    assert run.returncode == 0, run.stderr
