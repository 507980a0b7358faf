"""`mmray submit` on a cluster of its own that asks for a token: one job for each work, and its true exit code."""

import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import score_in_process
from processes import wait_for
from ray_head import Head, running_head

from mmray import __version__
from mmray.errors import ErrorBudgetError
from mmray.options import ScoreConfig
from mmray.score.verify import verify_output

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
SUBMIT = (sys.executable, "-m", "mmray.cli", "submit")


@pytest.fixture(scope="module")
def store() -> Iterator["Store"]:
    with Store() as store:
        threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True).start()
        yield store
        store.shutdown()


@pytest.fixture(scope="module")
def head(store: "Store") -> Iterator[Head]:
    with running_head(**store.env) as head:
        wait_for(head.answers)
        yield head


def jobs(head: Head, name: str) -> dict[str, Any]:
    """The jobs whose ids begin so."""
    found = {job["submission_id"] or "": job for job in head.asked("GET", "jobs/").raise_for_status().json()}
    return {job_id: job for job_id, job in found.items() if job_id.startswith(name)}


def submit(head: Head, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    with submitting(head, *arguments, **env) as process:
        output, errors = process.communicate(timeout=90)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@contextmanager
def submitting(
    head: Head, *arguments: object, command: Sequence[str] = SUBMIT, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Runs `mmray submit`, which is killed where it does not end."""
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        env={**head.env, "RAY_API_SERVER_ADDRESS": head.url, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def await_note(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    assert words in process.stderr.readline()


class Store(ThreadingHTTPServer):
    """A bucket that lets whoever reads a configuration wait until it may have it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Reading)
        self.asked, self.may_answer = dict[str, threading.Event](), dict[str, threading.Event]()
        self.env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}", "AWS_ALLOW_HTTP": "true"}
        self.env |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}


class Reading(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        store = self.server
        assert isinstance(store, Store)
        store.asked[self.path].set()
        store.may_answer[self.path].wait()
        content = b'trian = "x"'
        self.send_response(200)
        for name, value in (
            ("Content-Length", len(content)),
            ("ETag", '"1"'),
            ("Last-Modified", formatdate(usegmt=True)),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Waiting:
    """A command that waits until it is told to go on, and then exits with 2."""

    def __init__(self, store: Store) -> None:
        key = f"/waiting/{secrets.token_hex(4)}.toml"
        self._asked, self.may_answer = store.asked[key], store.may_answer[key] = threading.Event(), threading.Event()
        self.words = ["train", f"s3:/{key}"]

    def go_on(self) -> None:
        """Returns when the command has run so far that it has heard."""
        assert self._asked.wait(120)
        self.may_answer.set()

    def pid(self) -> int:
        """The process that runs it, once it does."""
        wait_for(self._pids)
        (pid,) = self._pids()
        return pid

    def _pids(self) -> list[int]:
        listed = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
        words = f"-m mmray.cli {' '.join(self.words)}"
        return [int(line.split()[0]) for line in listed.splitlines() if line.endswith(words)]


@pytest.fixture
def waiting(store: Store) -> Iterator[Waiting]:
    waiting = Waiting(store)
    yield waiting
    waiting.may_answer.set()


class Door(socketserver.ThreadingTCPServer):
    """Hands connections on to a head; shut, it lets them wait and then breaks them off."""

    daemon_threads = True

    def __init__(self, url: str) -> None:
        self.inside, self.open, self.kept_waiting = int(url.rpartition(":")[2]), threading.Event(), 0
        self.open.set()
        self.couple: threading.Barrier | None = None
        super().__init__(("127.0.0.1", 0), Visit)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Visit(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        door = self.server
        assert isinstance(door, Door)
        if not door.open.is_set():
            door.kept_waiting += 1
            door.open.wait()
            return
        head = self.request.recv(2**16)
        if door.couple and head.startswith(b"POST /api/jobs/ "):
            door.couple.wait(60)
        with socket.create_connection(("127.0.0.1", door.inside)) as inside:
            inside.sendall(head)
            threading.Thread(target=pump, args=(self.request, inside), daemon=True).start()
            pump(inside, self.request)


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def door(head: Head) -> Iterator[Door]:
    with Door(head.url) as door:
        threading.Thread(target=door.serve_forever, args=(0.05,), daemon=True).start()
        yield door
        door.open.set()
        door.shutdown()


def test_a_table_is_scored_there_its_log_comes_here_and_what_succeeded_is_not_run_again(
    head: Head, rows: Path, bundle: str, tmp_path: Path
) -> None:
    output = tmp_path / "an output"
    words = ["--id", "tonight", "--", "score", bundle, rows, output, "--actors", "1"]
    run = submit(head, *words)
    assert run.returncode == 0, run.stdout
    assert "40 rows: 40 ok" in run.stdout
    assert "job tonight is submitted" in run.stderr
    assert verify_output(str(output), 2).passed
    assert jobs(head, "tonight")["tonight"]["metadata"]["mmray_version"] == __version__
    with ThreadPoolExecutor() as pool:
        again, other = pool.map(
            lambda words: submit(head, *words), (words, ["--id", "tonight", "--", "verify", output])
        )
    assert again.returncode == 0
    assert again.stdout == ""
    assert "job tonight has succeeded before; nothing is run" in again.stderr
    assert other.returncode == 2
    assert "choose another --id" in other.stderr
    assert list(jobs(head, "tonight")) == ["tonight"]


def test_exit_codes_are_those_of_the_command(head: Head, rows: Path, bundle: str, tmp_path: Path, s3: str) -> None:
    table = pq.read_table(rows / "part-0.parquet")
    lost = {name: pa.nulls(table.num_rows, table.schema.field(name).type) for name in ("image_path", "text")}
    pq.write_table(pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **lost}), tmp_path / "lost")
    strict = ScoreConfig(precision="fp32", max_error_rate=0)
    with pytest.raises(ErrorBudgetError):
        score_in_process(bundle, str(tmp_path / "lost"), str(tmp_path / "failed"), strict)
    s3_variables = [f"--env={name}" for name in ("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION")]
    s3_variables += [f"--env={name}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    ends = {
        4: ([*s3_variables, "verify", f"{s3}/nothing"], "is not an output of mmray score"),
        6: (["--", "score", bundle, tmp_path / "lost", tmp_path / "failed", "--max-error-rate", "0"], "rows failed"),
    }
    with ThreadPoolExecutor() as pool:
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        runs = {code: pool.submit(submit, head, *words, **environment) for code, (words, _) in ends.items()}
    for code, run in ((code, run.result()) for code, run in runs.items()):
        assert ends[code][1] in run.stdout
        assert run.returncode == code
        assert re.search(rf"mmray: error: job mmray-\w+-\w{{8}} ended with exit code {code}", run.stderr), run.stderr


def test_what_failed_and_what_has_no_name_of_its_own_runs_again(head: Head) -> None:
    def twice(*words: str) -> list[int]:
        return [submit(head, *words).returncode for _ in range(2)]

    with ThreadPoolExecutor() as pool:
        named = pool.submit(twice, "--id", "failing", "--", "no-such-command")
        nameless = pool.submit(twice, "--", "--version")
    assert named.result() == [2, 2]
    assert sorted(jobs(head, "failing")) == ["failing", "failing-2"]
    assert nameless.result() == [0, 0]
    first, second = sorted(jobs(head, "mmray-version-"))
    assert second == f"{first}-2"


def test_two_at_once_are_one_job_that_both_follow_even_if_nobody_reads(
    head: Head, door: Door, waiting: Waiting
) -> None:
    words = ["--address", door.url, "--id", "both", "--", *waiting.words]
    door.couple = threading.Barrier(2)  # both have seen that there is no such job
    with submitting(head, *words) as one, submitting(head, *words) as other:
        assert one.stderr is not None
        assert other.stderr is not None
        notes = sorted([one.stderr.readline(), other.stderr.readline()])
        assert notes == ["mmray: job both is submitted\n", "mmray: job both runs already; following it\n"]
        assert other.stdout is not None
        other.stdout.close()
        waiting.go_on()
        output, _ = one.communicate(timeout=60)
        assert "did you mean 'train'" in output
        assert [one.returncode, other.wait(60)] == [2, 2]
    assert list(jobs(head, "both")) == ["both"]


def test_an_interrupted_submit_leaves_the_job_running_and_the_same_command_follows_it(
    head: Head, waiting: Waiting
) -> None:
    words = ["--", *waiting.words]
    with submitting(head, *words) as process:
        await_note(process, "is submitted")
        waiting.pid()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (job_id,) = jobs(head, "mmray-train-")
    assert f"job {job_id} runs on; the same command with --id {job_id} follows it" in errors
    assert f"RAY_API_SERVER_ADDRESS={head.url} ray job stop {job_id}" in errors
    assert "Traceback" not in errors
    with submitting(head, *words) as process:
        await_note(process, f"job {job_id} runs already; following it")
        waiting.go_on()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "did you mean 'train'" in output
    assert len(jobs(head, "mmray-train-")) == 1


def stop(head: Head, job_id: str, waiting: Waiting) -> None:
    head.asked("POST", f"jobs/{job_id}/stop").raise_for_status()


def kill(head: Head, job_id: str, waiting: Waiting) -> None:
    os.kill(waiting.pid(), signal.SIGKILL)


def kill_supervisor(head: Head, job_id: str, waiting: Waiting) -> None:
    parent = ["ps", "-o", "ppid=", "-p", str(waiting.pid())]
    os.kill(int(subprocess.run(parent, capture_output=True, text=True, check=True).stdout), signal.SIGKILL)


def test_a_job_that_was_stopped_or_died_has_no_exit_code_and_gets_one(head: Head, store: Store) -> None:
    ends: Mapping[Callable[[Head, str, Waiting], None], tuple[int, str]] = {
        stop: (130, "was stopped; the same command starts it again"),
        kill: (5, "died: Job entrypoint command failed with exit code -9"),
        kill_supervisor: (5, "died: Job supervisor actor died"),
    }

    def ended(end: Callable[[Head, str, Waiting], None]) -> tuple[int, str]:
        waiting = Waiting(store)
        with submitting(head, "--id", end.__name__, "--", *waiting.words) as process:
            waiting.pid()
            end(head, end.__name__, waiting)
            _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    with ThreadPoolExecutor() as pool:
        for (code, words), (returned, errors) in zip(ends.values(), pool.map(ended, ends), strict=True):
            assert returned == code
            assert words in errors.splitlines()[-1]


def test_a_head_that_is_away_for_a_moment_is_waited_for_and_one_that_is_lost_is_named(
    head: Head, door: Door, waiting: Waiting
) -> None:
    words = ["--address", door.url, "--id", "far", "--", *waiting.words]
    code = "import sys, mmray.cli, mmray.submit as s; s.LOST_AFTER_S, s.TIMEOUT_S = 1, 3; sys.exit(mmray.cli.main())"
    with submitting(head, *words) as patient:
        await_note(patient, "is submitted")
        with submitting(head, *words, command=[sys.executable, "-c", code, "submit"]) as impatient:
            await_note(impatient, "runs already")
            waiting.pid()
            door.open.clear()
            _, errors = impatient.communicate(timeout=60)
        assert impatient.returncode == 5
        assert "job far is out of sight" in errors
        assert "Traceback" not in errors
        wait_for(lambda: door.kept_waiting > 1)
        door.open.set()
        waiting.go_on()
        output, _ = patient.communicate(timeout=60)
    assert patient.returncode == 2
    assert output.count("Running entrypoint for job far") == output.count("did you mean 'train'") == 1


def test_mistakes_are_told_in_one_line(head: Head, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(101 * 2**20))
    nobody = {name: "" for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")}
    mistakes: list[tuple[int, str, list[str], dict[str, str]]] = [
        (2, "refuses this client", [], {"RAY_AUTH_TOKEN": "0" * 32}),
        (2, "set RAY_AUTH_MODE=token", [], {"RAY_AUTH_MODE": "disabled"}),
        (2, "no cluster to submit to; give --address", [], nobody),
        (5, "Failed to connect to Ray at address: http://127.0.0.1:9", ["--address", "http://127.0.0.1:9"], {}),
        (2, "--id takes up to 100 letters", ["--id", "a/b"], {}),
        (2, "--env NOWHERE: there is no such variable", ["--env", "NOWHERE"], {}),
        (2, "must be an existing directory", ["--working-dir", "/nowhere"], {}),
        (2, "--working-dir is too large for a cluster", ["--working-dir", str(tmp_path)], {}),
    ]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(submit, head, *flags, "--", "errors", "/nowhere", **env) for *_, flags, env in mistakes]
    for (code, message, *_), run in zip(mistakes, (run.result() for run in runs), strict=True):
        assert run.returncode == code, run.stderr
        error = run.stderr.splitlines()[-1]
        assert error.startswith("mmray: error: ")
        assert message in error
        assert "Traceback" not in run.stderr
    assert not jobs(head, "mmray-errors-")


def test_a_checkout_is_the_working_folder_and_its_code_is_what_runs(head: Head, tmp_path: Path) -> None:
    own, odd = tmp_path / "own", tmp_path / "odd"
    shutil.copytree(ROOT / "mmray", own / "mmray", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    (own / "mmray" / "__init__.py").write_text('__version__ = "of the checkout"\n')
    (odd / "mmray").mkdir(parents=True)
    (odd / "mmray" / "__init__.py").touch()
    (odd / "mmray" / "cli.py").write_text('import sys\nsys.stdout.buffer.write(b"\\xff")\nsys.exit(3)\n')
    script = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/score.py", "nowhere", "x", "y"]
    environment = {**head.env, "RAY_API_SERVER_ADDRESS": head.url}
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(submit, head, "--working-dir", folder, "--", "--version") for folder in (own, odd)]
        job = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "mmray of the checkout" in runs[0].result().stdout
    assert runs[0].result().returncode == 0
    assert "cannot be read: " in runs[1].result().stdout
    assert runs[1].result().returncode == 3, "a log that is no text changes nothing"
    assert "mmray: error: no bundle at 'nowhere'" in job.stdout
    assert job.returncode == 1, "Ray's own command has no other code"
