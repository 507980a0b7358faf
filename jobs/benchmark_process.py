"""Runs a command of mmray in a process of its own, and watches it and its children: seconds and peak memory."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CHILDREN_EVERY_S = 0.1
ROLES = {
    "ray::MapWorker": "actor",
    "ray::RayTrainWorker": "training worker",
    "local_worker": "scoring process",
}


def run_mmray(*arguments: object) -> dict[str, Any]:
    """Runs a command in a process of its own; returns its seconds, its output, and peak memory by role."""
    started, peaks = time.perf_counter(), dict[int, tuple[str, float]]()
    command = [sys.executable, "-m", "mmray.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watcher = threading.Thread(target=_watch, args=(process, peaks), daemon=True)
        watcher.start()
        output = process.communicate()[0]
        watcher.join()
    seconds = round(time.perf_counter() - started, 1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    roles: dict[str, float] = {}
    for role, peak in peaks.values():
        roles[role] = max(roles.get(role, 0), round(peak))
    return {"seconds": seconds, "output": output, "peak_rss_mb": roles}


def _watch(process: subprocess.Popen[str], peaks: dict[int, tuple[str, float]]) -> None:
    """Keeps each process's highest resident size (`VmHWM`), while the command runs."""
    while process.poll() is None:
        for pid in _family(process.pid):
            name, peak = _look(pid)
            role = ROLES.get(name, "")
            role = "driver" if pid == process.pid else role
            if role and peak:
                peaks[pid] = role, max(peak, peaks.get(pid, ("", 0.0))[1])
        time.sleep(CHILDREN_EVERY_S)


def _family(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _look(pid: int) -> tuple[str, float]:
    """Returns a process's name (of a Ray actor, its class; of a fork, its module) and highest resident size in MB."""
    try:
        command, name = (Path(f"/proc/{pid}/{file}").read_text() for file in ("cmdline", "comm"))
        actor = re.match(r"ray::\w+", command)
        return actor[0] if actor else name.strip(), peak_mb(pid)
    except OSError:
        return "", 0.0


def peak_mb(pid: int) -> float:
    """Returns a process's highest resident size, 0 where it has ended and is waited for."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
