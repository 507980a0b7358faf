"""What this machine gives the processes of a step: CPUs, memory that stays with who had it, a cluster to connect to."""

import os
import sys
import time
from pathlib import Path

from mmray.errors import ConfigError

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"  # microseconds of CPU in each period, or "max"
MEMORY = "/sys/fs/cgroup/memory"  # .max and .current: bytes, or "max"; .stat
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Environment of processes that compute on a CPU. By default glibc returns every large block to the kernel, and that
clears it page by page when the next tensor asks: up to half of a forward pass. See mallopt(3)."""


def given_address() -> str | None:
    """Returns the address of the Ray cluster to connect to, or None where a local one would start."""
    return os.environ.get("RAY_ADDRESS") or None


def cluster_at_hand() -> bool:
    """Whether there is a Ray cluster to work on without starting one: given, or connected to already."""
    return given_address() is not None or ("ray" in sys.modules and sys.modules["ray"].is_initialized())


def missing_gpus(asked: float, there: float) -> ConfigError:
    """Returns the error of GPUs that were asked for, for each process, where there are fewer."""
    return ConfigError(
        f"{asked:g} GPUs for each process were asked for, and this machine has {there:g}; leave --gpus out, or run "
        "where there are some"
    )


def local_cpus() -> int:
    """Returns the CPUs this process may use: those it is bound to, or a container's share of them."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = Path(CPU_QUOTA).read_text().split()
        return max(min(bound, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # no cgroup, or no quota in it
        return bound


def process_start(pid: int) -> int | None:
    """Returns when a process started, in ticks since the machine did (field 22 of proc_pid_stat(5)); None of none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def process_age() -> float:
    """Returns the seconds since this process started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (process_start(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")


def available_memory() -> int:
    """Returns the bytes of memory that processes may still take: the machine's, or the rest of a container's."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    try:
        limit, used = (int(Path(f"{MEMORY}.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in Path(f"{MEMORY}.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # files that were read, which make room
    except (OSError, ValueError):  # no cgroup, or no limit in it
        return free
    return max(min(free, limit - used), 0)
