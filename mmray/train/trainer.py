"""Ray Train as a step of ours runs it: what it says, how it is interrupted, and what it leaves out."""

import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray.train.torch
from ray.experimental import internal_kv

from mmray.cluster import is_alone
from mmray.errors import EnvironmentFaultError
from mmray.machine import given_address

OnStart = Callable[[int, int], None]
"""Called with the number of epochs, of which fewer may be trained where it stops early, and how many are done."""
OnEpoch = Callable[[dict[str, Any]], None]
"""Called with the history's entry of each epoch as it ends."""
NAMESPACE, WATCHER = "mmray", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
LISTEN_S = 0.25
_log = logging.getLogger(__name__)


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's, without the actors that have nothing to do: each is a process that loads Ray Data.

    Where there is no dashboard, nobody cleans up after a controller that dies: who would asks the dashboard for news,
    and where it gets none, is waited for in vain at the end for 12 seconds. Where there are no datasets nobody manages
    them.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # its first version has none
        # The address beside it, "dashboard", is there even of a dashboard that answers nobody.
        has_dashboard = internal_kv._internal_kv_get("webui:url", namespace="dashboard")
        idle = {"PlacementGroupCleanerCallback": not has_dashboard, "DatasetsCallback": not self.datasets}
        return [callback for callback in callbacks if not idle.get(type(callback).__name__)]


@contextmanager
def ctrl_c_is_an_interruption() -> Iterator[None]:
    """Makes Ctrl-C mean what it means elsewhere: Ray Train's own handler ends the process as if all were well."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class News:
    """What workers tell the driver, in the cluster's own key-value store: a queue would be a process more."""

    def __init__(self) -> None:
        self._prefix = f"{secrets.token_hex(8)}/"

    def tell(self, entry: Mapping[str, Any]) -> None:
        """Tells the driver something, from anywhere on the cluster."""
        key = f"{self._prefix}{time.time_ns():020d}"
        internal_kv._internal_kv_put(key, json.dumps(entry), namespace=NAMESPACE)

    def heard(self) -> list[dict[str, Any]]:
        """Returns what was told since the last time, the earliest first."""
        keys = sorted(internal_kv._internal_kv_list(self._prefix, namespace=NAMESPACE))
        entries = [json.loads(internal_kv._internal_kv_get(key, namespace=NAMESPACE)) for key in keys]
        for key in keys:
            internal_kv._internal_kv_del(key, namespace=NAMESPACE)
        return entries


def shown(on_epoch: OnEpoch) -> OnEpoch:
    """Returns what calls `on_epoch`, and trains on where it fails: there may be nobody to show an epoch to."""

    def show(entry: dict[str, Any]) -> None:
        try:
            on_epoch(entry)
        except EnvironmentFaultError:  # SIGTERM, in the main thread
            raise
        except Exception as error:
            _log.warning("an epoch could not be shown: %r", error)

    return show


@contextmanager
def news(on_epoch: OnEpoch) -> Iterator[News]:
    """Yields news of which each entry is handed to `on_epoch` as it comes."""
    told, stop, show = News(), threading.Event(), shown(on_epoch)

    def listen() -> None:
        ended = False
        while not ended:
            ended = stop.wait(LISTEN_S)  # and once more after that
            for entry in told.heard():
                show(entry)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(listen)
        try:
            yield told
        finally:
            stop.set()


@contextmanager
def as_needed() -> Iterator[None]:
    """Has Ray Train look out for nodes that are about to go only where there are others than this machine."""
    given = os.environ.get(WATCHER)
    if given is None and given_address() is None and is_alone():
        os.environ[WATCHER] = "0"
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(WATCHER, None)
