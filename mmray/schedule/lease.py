"""A lease on a folder: one holder at a time, among machines whose clocks need not agree.

    lease/<epoch>/<beat>       created by the holder, one beat after another; the newest counts
    lease/<epoch>/released     the holder is done

Who finds the newest beat unchanged for `lease_s` on its own clock takes the next epoch, by create-if-absent. A holder
that was only slow may then work beside the new one: the lease spares work, what is published is guarded by its number.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmray.errors import EnvironmentFaultError
from mmray.store import Store

FOLDER, RELEASED = "lease", "released"
BEATS_PER_LEASE = 4
LOOKS_PER_LEASE = 20
OnBeat = Callable[[], None]


@contextmanager
def lease(store: Store, lease_s: float, on_beat: OnBeat = lambda: None) -> Iterator[threading.Event | None]:
    """Holds the lease of a folder for the duration of a `with` block.

    Args:
        store: the folder.
        lease_s: seconds without a beat after which another may take it.
        on_beat: called after each beat, from another thread.

    Yields:
        An event that is set if another takes the lease meanwhile; or None where a holder is alive, and nothing is held.
    """
    epoch = _take(store, lease_s)
    if epoch is None:
        yield None
        return
    lost, ended = threading.Event(), threading.Event()
    beats = threading.Thread(target=_beat, args=(store, epoch, lease_s, lost, ended, on_beat), daemon=True)
    beats.start()
    try:
        yield lost
    finally:
        ended.set()
        beats.join()
        if not lost.is_set():
            store.create(_key(epoch, RELEASED), b"")
            _forget(store, epoch)


def _take(store: Store, lease_s: float) -> int | None:
    """Returns the epoch that was taken, or None where its holder is alive."""
    seen = _newest(store)
    deadline = time.monotonic() + lease_s
    while seen is not None and seen[1] != RELEASED:
        time.sleep(lease_s / LOOKS_PER_LEASE)
        now = _newest(store)
        if now != seen and not (now and now[1] == RELEASED):
            return None
        if time.monotonic() > deadline:
            break
        seen = now
    epoch = seen[0] + 1 if seen else 1
    return epoch if store.create(_key(epoch, f"{0:09d}"), b"") else None


def _newest(store: Store) -> tuple[int, str] | None:
    """Returns the last epoch and its newest beat, or that it was released."""
    found = [key.split("/")[1:] for key in store.list(FOLDER)]
    # "released" comes after every number.
    return max(((int(epoch), beat) for epoch, beat in found), default=None)


def _beat(
    store: Store, epoch: int, lease_s: float, lost: threading.Event, ended: threading.Event, on_beat: OnBeat
) -> None:
    beat = 0
    while not ended.wait(lease_s / BEATS_PER_LEASE):
        try:
            newest = _newest(store)
            if newest is not None and newest[0] > epoch:
                lost.set()
                return
            store.create(_key(epoch, f"{beat + 1:09d}"), b"")
            store.delete(_key(epoch, f"{beat:09d}"))
            beat += 1
            on_beat()
        except EnvironmentFaultError:
            continue  # the store may be back in time; if not, another takes over


def _forget(store: Store, epoch: int) -> None:
    """Removes what is older than the release, which says the epoch to the next holder; that may be at work already."""
    for key in store.list(FOLDER):
        if key < _key(epoch, RELEASED):
            store.delete(key)


def _key(epoch: int, name: str) -> str:
    return f"{FOLDER}/{epoch:09d}/{name}"
