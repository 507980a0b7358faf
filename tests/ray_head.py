"""A Ray cluster that runs on its own, as one on other machines would: what is deployed and submitted goes there."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import ALONE

from mmray.serve.haproxy import free_port

BIN = Path(sys.executable).parent


class Head:
    """The head of a cluster with a dashboard, that asks for a token."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(16)
        self._folder = Path(tempfile.mkdtemp(prefix="mmray-", dir="/tmp"))  # short, for the paths of its sockets
        # `python` is the one that runs this.
        self.env = {**ALONE, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}
        self.env |= {"RAY_DASHBOARD_ADDRESS": self.url, "PATH": f"{BIN}:{self.env['PATH']}"}
        command = ["start", "--head", "--block", "--num-cpus=3", f"--port={free_port()}", "--node-ip-address=127.0.0.1"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}"]
        # A port of its own, too: the agent takes jobs, and waits for the default one while another cluster has it.
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={self._folder}"]
        self.process = subprocess.Popen(
            [str(BIN / "ray"), *command], env=self.env, stdout=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def logs(self) -> Path:
        return self._folder / "session_latest" / "logs"

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # being polite takes Ray half a minute; its workers follow
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def running_head() -> Iterator[Head]:
    """Starts a cluster; yields its head at once, which may not answer yet."""
    head = Head()
    try:
        yield head
    finally:
        head.stop()
