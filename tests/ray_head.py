"""A Ray cluster that runs on its own, as one on other machines would: what is deployed and submitted goes there."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from processes import ALONE

from mmray.serve.haproxy import free_port

BIN = Path(sys.executable).parent


class Head:
    """The head of a cluster with a dashboard, that asks for a token.

    Args:
        num_cpus: of the head itself.
        env: variables of the cluster's processes, which jobs inherit.
    """

    def __init__(self, num_cpus: int = 3, **env: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(16)
        self._folder = Path(tempfile.mkdtemp(prefix="mmray-", dir="/tmp"))  # short, for the paths of its sockets
        # `python` is the one that runs this.
        self.env = {**ALONE, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.env |= {"RAY_prestart_worker_first_driver": "0"}  # no process before somebody needs it
        self.env |= {"RAY_DASHBOARD_ADDRESS": self.url, "PATH": f"{BIN}:{self.env['PATH']}", **env}
        self._port = free_port()
        command = ["--head", f"--num-cpus={num_cpus}", f"--port={self._port}", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={self.url.rpartition(':')[2]}", f"--temp-dir={self._folder}"]
        self._processes = [self._start(*command)]

    def add_node(self, num_cpus: int) -> None:
        """Starts another node, which may not have joined yet."""
        self._processes.append(self._start(f"--address=127.0.0.1:{self._port}", f"--num-cpus={num_cpus}"))

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        # A port of its own: the agent takes jobs, and waits for the default one while another cluster has it.
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", *words]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, start_new_session=True)

    @property
    def logs(self) -> Path:
        return self._folder / "session_latest" / "logs"

    def asked(self, method: str, path: str, json: object = None) -> httpx.Response:
        """What its dashboard says, with the token."""
        token = {"Authorization": f"Bearer {self.token}"}
        return httpx.request(method, f"{self.url}/api/{path}", headers=token, json=json)

    def answers(self) -> bool:
        """Whether its dashboard does."""
        self.check()
        with suppress(httpx.TransportError):
            return self.asked("GET", "version").is_success
        return False

    def check(self) -> None:
        assert all(process.poll() is None for process in self._processes), "the cluster did not start"

    def stop(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGKILL)  # being polite takes Ray half a minute; its workers follow
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def running_head(num_cpus: int = 3, **env: str) -> Iterator[Head]:
    """Starts a cluster; yields its head at once, which may not answer yet."""
    head = Head(num_cpus, **env)
    try:
        yield head
    finally:
        head.stop()
