"""What tests share that start processes and wait for them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A process of its own starts a cluster of its own: nothing of one in this process is handed down.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
ALONE |= {"RAY_USAGE_STATS_ENABLED": "0"}  # no statistics of use
COMMAND = [sys.executable, "-m", "mmray.cli"]
NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False, "dashboard_agent_listen_port": 0}
NODE |= {"include_log_monitor": False, "no_monitor": True}
"""Of a Ray cluster of several nodes on this machine, to whose logs nobody listens, and which does not grow."""
HEAD = {**NODE, "_system_config": {"prestart_worker_first_driver": False}}
"""Of its head: as `mmray.cluster` has it, no process starts before somebody needs it."""


def mmray(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours to its end."""
    command, variables = [*COMMAND, *map(str, arguments)], {**ALONE, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables)


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command of ours in a process group of its own, killed where it does not end."""
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ALONE, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """An endpoint's command, killed where it does not end."""
    command, pipe = [*COMMAND, "serve", *map(str, arguments)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**ALONE, **environment}) as process:
        try:
            yield process
        finally:
            process.kill()


def listening() -> dict[tuple[str, int], str]:
    """The addresses that somebody listens on, with the inodes of their sockets."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            address, port = fields[1].split(":")
            found[socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)] = fields[9]
    return found


def num_parts(output: Path) -> int:
    """How many slices of a run are there."""
    return len(list(output.glob("data/*.parquet")))


def pid_at_work(output: Path) -> int:
    """The id of a process in the middle of a slice of a run."""
    found: list[int] = []
    wait_for(lambda: found.extend(pids_at_work(output)) or found)
    return found[0]


def pids_at_work(output: Path) -> list[int]:
    """The ids of the processes that are in the middle of a slice of a run."""
    found = []
    for attempt in output.glob("_mmray/attempts/[!.]*"):  # a file that is being written begins with a dot
        with suppress(FileNotFoundError):
            found.append(int(attempt.read_text().split()[2]))
    return found


def check_interruptions(output: Path, command: list[object], slices: int) -> None:
    """Interrupts, stops and kills a command that scores, and sees it resume each time, and end with every row."""
    for kill, code in ((signal.SIGINT, 130), (signal.SIGTERM, 5), (signal.SIGKILL, -signal.SIGKILL)):
        before = num_parts(output)
        with started(*command) as process:
            wait_for(lambda: num_parts(output) > before or process.poll() is not None)  # noqa: B023
            if kill is signal.SIGINT:
                os.killpg(process.pid, kill)  # as a terminal does
            else:
                process.send_signal(kill)
            _, errors = process.communicate()
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        if kill is not signal.SIGKILL:
            assert "the same command continues" in errors.splitlines()[-1]
            assert not list((output / "_mmray" / "attempts").iterdir()), "what was at work was done"
        assert before < num_parts(output) < slices, "it was stopped in the middle"
        assert not (output / "_SUCCESS").exists()
    committed = num_parts(output)
    finished = mmray(*command)
    assert finished.returncode == 0, finished.stderr
    scored = int(re.findall(rf"(\d+) of {slices} slices", finished.stdout)[0])
    assert 0 < scored <= slices - committed, "processes that outlived their driver may have done some more"
    assert mmray("verify", output, "--level", "2").returncode == 0


def read(path: Path) -> bytes:
    """What a process's file says, nothing where it has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def wait_for(condition: Callable[[], object], timeout_s: float = 120) -> None:
    """Returns when a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
