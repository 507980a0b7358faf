"""Memory that a process keeps for its next tensors, instead of having the kernel clear it page by page again."""

import os
import subprocess
import sys

from mmray.machine import KEEP_MEMORY

PROGRAM = """
import resource, threading, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def allocate():
    for _ in range(20):
        torch.ones(10 * 2**20)  # 40 MB: what glibc would map and unmap each time
def work():
    allocate()
    before = faults()
    allocate()
    print(faults() - before)
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_what_a_tensor_gives_back_the_next_one_gets_without_a_page_fault() -> None:
    def faults(**environment: str) -> list[int]:
        """Of the main thread, and of another."""
        command, environment = [sys.executable, "-c", PROGRAM], {**os.environ, **environment}
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        return [int(line) for line in said.splitlines()]

    for kept, given_back in zip(faults(**KEEP_MEMORY), faults(), strict=True):
        assert kept < given_back / 10
