"""Ray Train as a step of ours runs it: what it says, how it is interrupted, and what it leaves out."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray.train.torch
from ray.experimental import internal_kv
from ray.util.queue import Empty, Queue

OnEpoch = Callable[[dict[str, Any]], None]
"""Called with the history's entry of each epoch as it ends."""


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's, but for who cleans up after a controller that dies, where there is no dashboard.

    That one asks the dashboard for news, and where it gets none, is waited for in vain at the end for 12 seconds.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # its first version has none
        # The address beside it, "dashboard", is there even of a dashboard that answers nobody.
        has_dashboard = bool(internal_kv._internal_kv_get("webui:url", namespace="dashboard"))
        return [c for c in callbacks if has_dashboard or type(c).__name__ != "PlacementGroupCleanerCallback"]


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


@contextmanager
def progress_queue(on_epoch: OnEpoch) -> Iterator[Queue]:
    """Yields a queue whose entries are handed to `on_epoch` as they come."""
    entries, stop = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def drain() -> None:
        while not stop.is_set() or not entries.empty():
            try:
                on_epoch(entries.get(timeout=0.5))
            except Empty:
                continue

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield entries
    finally:
        stop.set()
        thread.join(timeout=10)
        entries.shutdown()
