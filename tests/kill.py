"""Kills what a run of `mmray score` consists of, again and again, and counts the rows that it lost, doubled or changed.

    python tests/kill.py --runs 60 --kills 5 --rows 20000 --seed 1 --json tests/soak/kills.json

Each run is the command on a cluster of a head and two nodes, or without Ray (`--without-ray`). What is killed and after
which slice, a seed decides; the command is given again where its own process ended, and must come to its end. A ledger
that is there is continued.
"""

import argparse
import json
import os
import platform
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from faults import faulty, s3_on_loopback, upload
from models import colour_table, saved_bundle, score_in_process
from processes import ALONE, COMMAND, HEAD, NODE, read, wait_for

from mmray.options import ScoreConfig
from mmray.parquet import from_parquet
from mmray.score.verify import verify_output
from mmray.store import open_store

KINDS = {
    "actor": 5,  # a process that scores
    "stuck": 2,  # the same, but it stands still in the middle of a slice, until the run itself ends it
    "node": 2,  # one of the two, with all that runs there; another takes its place
    "driver": 2,  # the command; it is given again
    "revenant": 1,  # a node whose processes stand still meanwhile, and go on when the run has long ended without them
    "twin": 1,  # a command that stands still while the same command does its work, and goes on then
    "head": 1,  # and the cluster with it; the command is given again on another
}
"""What is killed, and how often beside the others."""
KINDS_WITHOUT_RAY = {"actor": 5, "driver": 3, "twin": 1}
SLICE_ROWS, BATCH_ROWS = 200, 100
STUCK_AFTER_S = 5
LIMIT_S = 600  # for a run; one that takes longer does not end
RESUMABLE = 5  # exit code of a command that another try completes
LEFT_ALONE = 1  # with which Ray ends a process whose cluster has lost its head, without a word to anybody
HEAD_LOST = "RAY_gcs_rpc_server_reconnect_timeout_s"
HEAD_LOST_S = 10  # that a cluster waits for its head; Ray's own default is a minute
EVER_AGAIN = 10  # tries of a command


@dataclass
class Run:
    """What was done to a run, and what it gave."""

    seed: int
    rows: int
    kills: list[tuple[str, int]] = field(default_factory=list)
    """What was killed, and how many slices were there."""
    exits: list[int] = field(default_factory=list)
    """Of its commands, in the order of their ends."""
    seconds: float = 0.0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    mismatches: list[str] = field(default_factory=list)
    """What `mmray verify --level 2` says against it."""

    @property
    def passed(self) -> bool:
        return not (self.lost or self.doubled or self.changed or self.mismatches)


class Alone:
    """This machine, without a cluster."""

    kinds, flag = KINDS_WITHOUT_RAY, "--local"

    def __init__(self) -> None:
        self._token = secrets.token_hex(8)
        store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self.environment = {**ALONE, **store, "MMRAY_TEST": self._token}

    def actors(self) -> dict[int, Any]:
        """The processes that score, of commands in this environment."""
        ours = [f for f in Path("/proc").glob("[0-9]*") if self._token.encode() in read(f / "environ")]
        return {int(f.name): None for f in ours if read(f / "comm") == b"local_worker\n"}

    def stop(self) -> None:
        pass


class Nodes:
    """A head that works for nobody and two nodes, on this machine."""

    kinds, flag = KINDS, "--no-local"

    def __init__(self) -> None:
        from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default

        # Ray keeps the first token that a process has, for all its clusters.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ[HEAD_LOST] = str(HEAD_LOST_S)
        enable_token_auth_by_default()
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.TemporaryDirectory(prefix="mmray-", dir="/tmp")
        head = {"num_cpus": 0, "temp_dir": self._folder.name, **HEAD}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            self.add()

    def add(self) -> None:
        self._cluster.add_node(num_cpus=8, **NODE)

    def replace(self, node: Any) -> None:
        """Kills a node, and starts another."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.add()

    def lose_head(self) -> None:
        """Kills the head; its nodes find out."""
        self._cluster.global_state.disconnect()
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def stop(self) -> None:
        for node in [*self._cluster.worker_nodes, *filter(None, [self._cluster.head_node])]:
            self._cluster.remove_node(node, allow_graceful=False)
        self._folder.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """Of a command on this cluster."""
        given = {name: value for name, value in os.environ.items() if name.startswith(("RAY_AUTH", HEAD_LOST, "AWS_"))}
        return {**ALONE, **given, "RAY_ADDRESS": self._cluster.address}

    def actors(self, name: bytes = b"Placed") -> dict[int, Any]:
        """The processes that score, or others by their name, and the node of each."""
        nodes = {node.all_processes["raylet"][0].process.pid: node for node in self._cluster.worker_nodes}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in nodes and name in read(folder / "cmdline"):
                    found[int(folder.name)] = nodes[parent]
        return found


class Work:
    """A table, a model, and what it gives undisturbed."""

    def __init__(self, folder: Path, rows: int) -> None:
        """Takes a folder of its own."""
        self.rows, self.table = rows, write_table(folder / "rows", rows)
        self.bundle = Path(saved_bundle(folder / "bundle", colour_table(folder / "clean", rows=12)))
        options, output = ScoreConfig(slice_rows=SLICE_ROWS, batch_size=BATCH_ROWS), str(folder / "undisturbed")
        score_in_process(str(self.bundle), str(self.table), output, options)
        self.expected = dict(scored_rows(output))
        assert len(self.expected) == rows


class Loop:
    """Runs over one table."""

    def __init__(self, work: Work, root: str, nodes: Any) -> None:
        """Takes what to do, the folder or bucket of the outputs, and where the runs are."""
        self._root, self._rows, self._num_slices = root, work.rows, work.rows // SLICE_ROWS
        self._expected = work.expected
        bundle, table = str(work.bundle), str(work.table)
        if "://" in root:
            bundle, table = upload(work.bundle, root, "bundle"), upload(work.table, root, "rows")
        self._command = ["score", bundle, table, "--slice-rows", str(SLICE_ROWS), "--actors", "2"]
        self._command += ["--batch-size", str(BATCH_ROWS), "--stuck-after", str(STUCK_AFTER_S), nodes.flag]
        self.nodes = nodes

    def run(self, seed: int, num_kills: int) -> Run:
        """Scores the table once, and kills meanwhile.

        Raises:
            AssertionError: it does not end, or not as it should.
        """
        chance, started = random.Random(seed), time.monotonic()
        run, output = Run(seed, self._rows), f"{self._root}/run-{seed}"
        points = sorted(chance.sample(range(1, self._num_slices * 4 // 5), num_kills))
        kinds = chance.choices([*self.nodes.kinds], [*self.nodes.kinds.values()], k=num_kills)
        job = Job(self.nodes, [*self._command[:3], output, *self._command[3:]], output, run)
        try:
            for point, kind in zip(points, kinds, strict=True):
                if not job.reaches(point):
                    break
                run.kills.append((kind, parts_of(output)))
                getattr(job, kind)(chance)
                print(f"{time.monotonic() - started:5.0f} s: killed {run.kills[-1]}, exits {run.exits}", flush=True)
            else:
                job.end()
            print(f"{time.monotonic() - started:5.0f} s: at the end, exits {run.exits}", flush=True)
            before = open_store(output).list()
            job.wake()
            run.mismatches += verify_output(output, 2).mismatches
            if open_store(output).list("data") != {k: e for k, e in before.items() if k.startswith("data/")}:
                run.mismatches.append("a file changed after the run's end")
            self._compare(output, run)
        finally:
            job.clear()
        run.seconds = round(time.monotonic() - started, 1)
        return run

    def _compare(self, output: str, run: Run) -> None:
        found = list(scored_rows(output))
        times = Counter(row for row, _ in found)
        run.lost = len(self._expected.keys() - times.keys())
        run.doubled = times.total() - len(times)
        run.changed = sum(self._expected.get(row) != cells for row, cells in found)


class Job:
    """The commands of one run: at work, or standing still until it has ended."""

    def __init__(self, nodes: Nodes, command: list[str], output: str, run: Run) -> None:
        self._nodes, self._command, self._output, self._run = nodes, [*COMMAND, *command], output, run
        self._sleeping: list[subprocess.Popen[str]] = []
        self._left_alone: list[subprocess.Popen[str]] = []
        self._undead: list[int] = []
        self._deadline = time.monotonic() + LIMIT_S
        self._begin()

    def reaches(self, point: int) -> bool:
        """Waits until so many slices are there, and a process is at work; False where the run ended before."""
        while parts_of(self._output) < point or not self._nodes.actors():
            assert time.monotonic() < self._deadline, "it does not end"
            if self._process.poll() is not None and self._ended():
                return False
            time.sleep(0.05)
        return True

    def actor(self, chance: random.Random) -> None:
        os.kill(chance.choice(sorted(self._nodes.actors())), signal.SIGKILL)

    def stuck(self, chance: random.Random) -> None:
        store = open_store(self._output)
        while self._process.poll() is None:
            for key in store.list("_mmray/attempts"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    pid = int(store.read(key).split()[2])
                    if pid in self._undead:
                        continue
                    os.kill(pid, signal.SIGSTOP)
                    if store.stat(key):  # it is in the middle of it, and stays there
                        self._undead.append(pid)
                        return
                    os.kill(pid, signal.SIGCONT)

    def node(self, chance: random.Random) -> None:
        self._nodes.replace(self._nodes.actors()[chance.choice(sorted(self._nodes.actors()))])

    def driver(self, chance: random.Random) -> None:
        self._process.kill()
        self._run.exits.append(self._process.wait())
        self._begin()

    def revenant(self, chance: random.Random) -> None:
        actors = self._nodes.actors()
        node = actors[chance.choice(sorted(actors))]
        for pid in (pid for pid, its in actors.items() if its is node):
            os.kill(pid, signal.SIGSTOP)
            self._undead.append(pid)
        self._nodes.replace(node)

    def twin(self, chance: random.Random) -> None:
        self._process.send_signal(signal.SIGSTOP)
        self._sleeping.append(self._process)
        self._begin()

    def head(self, chance: random.Random) -> None:
        self._nodes.lose_head()
        self._left_alone += self._sleeping
        self._sleeping = []
        self._without_head(self._process)
        self._nodes.stop()
        self._nodes.start()
        self._begin()

    def end(self) -> None:
        """Waits for the end of the run, by as many tries as it takes."""
        while not self._ended():
            pass

    def wake(self) -> None:
        """Has all that stands still go on, and waits for its end."""
        for process in [*self._sleeping, *self._left_alone]:
            process.send_signal(signal.SIGCONT)
        for process in self._left_alone:
            self._without_head(process)
        for process in self._sleeping:
            self._process = process
            self.end()
        for pid in self._undead:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self._undead))

    def clear(self) -> None:
        """Leaves no process behind."""
        for process in [self._process, *self._sleeping, *self._left_alone]:
            process.kill()
            process.wait()
        for pid in self._undead:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _without_head(self, process: subprocess.Popen[str]) -> None:
        """Waits for the end of a command whose cluster has no head any more."""
        self._run.exits.append(process.wait(LIMIT_S))
        assert self._run.exits[-1] in (RESUMABLE, LEFT_ALONE), self._said()

    def _begin(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            self._command, env=self._nodes.environment, stdout=self._log, stderr=self._log, text=True
        )

    def _ended(self) -> bool:
        """Waits for a command; whether the run is complete, and not to be tried again."""
        self._run.exits.append(self._process.wait(max(self._deadline - time.monotonic(), 0)))
        if self._run.exits[-1] == RESUMABLE and len(self._run.exits) < EVER_AGAIN:
            self._begin()
            return False
        assert self._run.exits[-1] == 0, self._said()
        assert "(raylet" not in (said := self._said()), f"others say something in its place: {said}"
        return True

    def _said(self) -> str:
        self._log.seek(0)
        return f"exits {self._run.exits} after {self._run.kills}: {self._log.read()}"


def write_table(folder: Path, rows: int) -> Path:
    """Small pictures with a text, and a number that names the row."""
    generator = np.random.default_rng(0)
    images = [cv2.imencode(".jpg", generator.integers(0, 255, (12, 16, 3), np.uint8))[1].tobytes() for _ in range(50)]
    colours = ["red", "green", "blue"]
    cells = {
        "id": range(rows),
        "image_path": [images[k % 50] for k in range(rows)],
        "text": [f"the {colours[k % 3]} square, number {k}" for k in range(rows)],
    }
    folder.mkdir()
    pq.write_table(pa.table(cells), folder / "part.parquet", row_group_size=SLICE_ROWS)
    return folder


def scored_rows(output: str) -> Iterator[tuple[int, str]]:
    """Yields the number of each row of an output, and all that stands in it."""
    store = open_store(output)
    for key in store.list("data"):
        for row in from_parquet(store.read(key)).to_pylist():
            yield row["id"], repr(row)


def parts_of(output: str) -> int:
    return len(open_store(output).list("data"))


@contextmanager
def looping(work: Work, root: str, *, without_ray: bool = False) -> Iterator[Loop]:
    """A loop for the duration of a `with` block."""
    nodes = Alone() if without_ray else Nodes()
    try:
        yield Loop(work, root, nodes)
    finally:
        nodes.stop()


@contextmanager
def place_of(kind: str, folder: Path, seed: int) -> Iterator[tuple[str, Counter[tuple[str, str]]]]:
    """A folder, or a bucket of a store on loopback that fails one request in five; and its faults."""
    if kind == "local":
        yield str(folder), Counter()
        return
    with s3_on_loopback() as url, faulty(url, share=1 / 5, seed=seed) as store:
        os.environ |= {"AWS_ENDPOINT_URL": store.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        urlopen(Request(f"{url}/bucket", method="PUT")).close()
        yield "s3://bucket", store.faults


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What many runs come to."""
    totals = {key: sum(run[key] for run in runs) for key in ("rows", "lost", "doubled", "changed")}
    kills = Counter(kind for run in runs for kind, _ in run["kills"])
    mismatches = sum(len(run["mismatches"]) for run in runs)
    faults = sum(run.get("faults", 0) for run in runs)
    found = {"runs": len(runs), "kills": kills.total(), "by_kind": dict(kills), "faults": faults}
    return {**found, **totals, "mismatches": mismatches}


def machine() -> str:
    """This one, in words."""
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def main() -> None:
    """Runs the loop, and keeps the ledger after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--kills", type=int, default=5, help="in each run")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the others have those after it")
    parser.add_argument("--store", choices=["local", "s3"], default="local", help="s3: it fails one request in five")
    parser.add_argument("--without-ray", action="store_true", help="by processes of this machine")
    parser.add_argument("--json", type=Path, required=True, help="the ledger")
    given = parser.parse_args()
    ledger = json.loads(given.json.read_text()) if given.json.exists() else {"commands": [], "runs": []}
    ledger["commands"].append(" ".join(["python", *sys.argv]))
    ledger["machine"] = machine()
    ledger["versions"] = {name: version(name) for name in ("mmray", "ray", "torch", "pyarrow", "obstore")}
    with (
        tempfile.TemporaryDirectory() as folder,
        place_of(given.store, Path(folder), given.seed) as (root, faults),
        looping(Work(Path(folder), given.rows), root, without_ray=given.without_ray) as loop,
    ):
        for seed in range(given.seed, given.seed + given.runs):
            faults.clear()
            run = loop.run(seed, given.kills)
            where = {"store": given.store, "ray": not given.without_ray, "faults": faults.total()}
            ledger["runs"].append({**where, **asdict(run)})
            ledger["total"] = summary(ledger["runs"])
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(ledger, indent=1) + "\n")
            print(run, flush=True)
            if not run.passed:
                sys.exit(f"run {seed} does not hold")
    print(json.dumps(ledger["total"]))


if __name__ == "__main__":
    main()
