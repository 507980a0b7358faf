"""Memory that a process keeps for its next tensors, instead of having the kernel clear it page by page again."""

import os
import subprocess
import sys

import pytest

from mmray.machine import KEEP_MEMORY

PROGRAM = """
import resource, threading, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    before = faults()
    for _ in range(200):
        torch.ones(10 * 2**20)  # 40 MB: what glibc would map and unmap each time
    print(faults() - before)
thread = threading.Thread(target=work)
work() if {main} else (thread.start(), thread.join())
"""


@pytest.mark.parametrize("main", [True, False])
def test_what_a_tensor_gives_back_the_next_one_gets_without_a_page_fault(main: bool) -> None:
    def faults(**environment: str) -> int:
        command, environment = [sys.executable, "-c", PROGRAM.format(main=main)], {**os.environ, **environment}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert faults(**KEEP_MEMORY) < faults() / 10
