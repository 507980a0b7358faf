"""Every input and output of a run as a step, of which one goes wrong: on a disk, or in a bucket."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mmray.store

Do = Callable[[], Any]
WRITES = ("mkdir", "create", "write", "fsync", "link", "unlink", "put", "delete")


class Steps:
    """Counts steps, and lets a fault have one."""

    def __init__(self, at: int | None = None, fault: Callable[[Do], Any] = lambda do: do()) -> None:
        self.names: list[str] = []
        self._at, self._fault = at, fault

    def take(self, name: str, do: Do) -> Any:
        self.names.append(name)
        return self._fault(do) if len(self.names) - 1 == self._at else do()


@contextmanager
def on_disk(folder: str, steps: Steps) -> Iterator[None]:
    """Makes each call of the operating system for a file below a folder a step, for the duration of a `with` block."""

    def ours(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            if not os.fspath(path).startswith(folder):
                return real(path, *rest, **named)
            return steps.take(name, lambda: real(path, *rest, **named))

        return call

    def opened(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not str(path).startswith(folder):
            return real_open(path, mode, *rest, **named)
        file = steps.take("create" if "x" in mode else "open", lambda: real_open(path, mode, *rest, **named))
        return _File(file, steps)

    real_open, fsync = io.open, os.fsync
    with ExitStack() as stack:
        for name in ("mkdir", "link", "unlink", "stat", "scandir"):
            stack.enter_context(mock.patch.object(os, name, ours(name, getattr(os, name))))
        stack.enter_context(mock.patch.object(io, "open", opened))
        stack.enter_context(mock.patch.object(os, "fsync", lambda fd: steps.take("fsync", lambda: fsync(fd))))
        yield


class _File:
    """A file whose bytes come to the disk in two halves."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, data: bytes) -> None:
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._steps.take("write", lambda part=part: (self._file.write(part), self._file.flush()))

    def read(self, *size: int) -> Any:
        return self._steps.take("read", lambda: self._file.read(*size))

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def in_bucket(uri: str, steps: Steps) -> Iterator[None]:
    """Makes each call of obstore's client for an output a step, for the duration of a `with` block."""
    remote = mmray.store._remote

    def counted(asked: str) -> Any:
        return _Client(remote(asked), steps) if asked == uri else remote(asked)

    with mock.patch.object(mmray.store, "_remote", counted):
        yield


class _Client:
    def __init__(self, client: Any, steps: Steps) -> None:
        self._client, self._steps = client, steps

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name == "list":  # asks as it goes
            return lambda *given: self._steps.take(name, lambda: list(real(*given)))
        return lambda *given, **named: self._steps.take(name, lambda: real(*given, **named))
