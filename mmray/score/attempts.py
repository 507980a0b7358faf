"""How often processes died at a slice: one that dies cannot say at which, but what it had begun stays written.

    OUTPUT/_mmray/attempts/<slice>-<number>     who is at it; removed as the attempt ends in any way but death

So whoever takes a slice up next knows of it: on another machine, in another run of the same command. A slice costs two
requests of its store more, made beside the scoring of another slice.
"""

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mmray.errors import EnvironmentFaultError
from mmray.machine import process_start
from mmray.slices import Slice
from mmray.store import Store

FOLDER = "_mmray/attempts"
MAX_DEATHS = 10  # at one slice: after the first, rows that kill are named, so what dies then dies of something else


class Attempts:
    """The attempts at the slices of one output."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @contextmanager
    def begin(self, piece: Slice, beside: int = 0) -> Iterator[int]:
        """Notes an attempt for the duration of a `with` block, and gives how many before it ended in death.

        A process of this machine that is still alive has not died. Of those of other machines nobody can tell: at worst
        the slice is scored apart without need.

        Args:
            piece: the slice.
            beside: how many other attempts are known to be at work, wherever.

        Raises:
            EnvironmentFaultError: too many have; the next run counts from the start.
        """
        key, deaths = self._next(piece, beside)
        try:
            yield deaths
        finally:
            with suppress(EnvironmentFaultError):  # it would cost the next attempt time, and no more
                self._store.delete(key)

    def at_work(self) -> int | None:
        """Returns how many slices have been begun and are not done; None where the store does not say."""
        try:
            return len({key.rpartition("-")[0] for key in self._store.list(FOLDER)})
        except EnvironmentFaultError:
            return None

    def left(self) -> int:
        """Returns how many attempts have not come to an end."""
        return len(self._store.list(FOLDER))

    def clear(self) -> None:
        """Forgets all attempts."""
        for key in self._store.list(FOLDER):
            self._store.delete(key)

    def _next(self, piece: Slice, beside: int) -> tuple[str, int]:
        """Returns the name of a new attempt, and how many before it ended in death."""
        me, dead, elsewhere = f"{this_process()} {secrets.token_hex(8)}", list[str](), 0
        for number in itertools.count(1):
            key = f"{FOLDER}/{piece.index:09d}-{number}"
            if self._store.create(key, me.encode()):
                break
            there = self._read(key)
            if there == me:  # the store did as told, lost its answer, and said to the second try that the object exists
                break
            if there is not None and not _is_alive(there):
                dead.append(key)
                elsewhere += not there.startswith(f"{_machine()} ")
        if len(dead) < MAX_DEATHS:
            return key, len(dead) - min(beside, elsewhere)
        for begun in [*dead, key]:
            self._store.delete(begun)
        raise EnvironmentFaultError(
            f"{len(dead)} processes died at rows {piece.first_row} to {piece.first_row + piece.num_rows - 1} of "
            f"{piece.uri}, also where each row is scored in a process of its own; see their logs, then "
            "run again"
        )

    def _read(self, key: str) -> str | None:
        try:
            return self._store.read(key).decode()
        except FileNotFoundError:  # its attempt has just ended
            return None


@cache
def _machine() -> str:
    """Names this start of this machine, and the space in which its process ids are unique."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def this_process() -> str:
    """Names this process among those of all machines and times."""
    return f"{_machine()} {os.getpid()} {process_start(os.getpid())}"


def _is_alive(attempt: str) -> bool:
    boot, space, pid, started, _ = attempt.split()
    return f"{boot} {space}" == _machine() and str(process_start(int(pid))) == started
