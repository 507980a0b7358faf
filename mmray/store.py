"""Files and objects by URI: list, read, and create if absent. The only place that knows where bytes are kept.

Local folders use the operating system; `s3://`, `gs://` and `az://` use obstore, which takes credentials from the
environment. Both give one guarantee that the commit of a slice rests on: `create` is atomic and never overwrites.
"""

import errno
import io
import os
import secrets
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from mmray.errors import ConfigError, EnvironmentFaultError

REMOTE_SCHEMES = ("s3", "gs", "az")
READ_AHEAD = 2**16  # bytes per request at least: a parquet footer comes with one
TEMPORARY_SUFFIX = ".mmray-tmp"
CONFLICT_PAUSES_S = (0.1, 0.2, 0.5, 1, 2, 5)


class Entry(NamedTuple):
    """What a listing says of one object."""

    size: int
    """Bytes."""
    version: str
    """Changes when the content does: modification time in nanoseconds, or the store's entity tag."""


class Store(ABC):
    """A folder, local or remote; keys are relative paths with forward slashes."""

    uri: str

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes an object that does not exist yet, all of it or nothing; False where it exists already."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object if it is there."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Returns an object's bytes, or raises FileNotFoundError."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Opens an object for reading at any offset, or raises FileNotFoundError."""

    @abstractmethod
    def stat(self, key: str) -> Entry | None:
        """Returns an object's size and version, or None where there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> dict[str, Entry]:
        """Returns every object below a folder, by key in sorted order."""

    def child(self, key: str) -> str:
        """Returns the URI of a key."""
        return f"{self.uri}/{key}" if key else self.uri


class LocalStore(Store):
    """A folder of this machine or of a file system it mounts."""

    def __init__(self, path: str) -> None:
        self.uri = os.path.abspath(path)

    def create(self, key: str, data: bytes) -> bool:
        # link(2) is atomic and fails where the name exists; rename(2) would overwrite. Table readers skip names that
        # start with a dot, so no reader of the folder ever sees half a file.
        target = Path(self.uri, key)
        temporary = target.parent / f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return self._link(temporary, target)
        except OSError as error:
            raise EnvironmentFaultError(
                f"cannot write {target}: {error.strerror}; free space or fix permissions, then run again"
            ) from error
        finally:
            with suppress(OSError):  # who reads the folder does not see it
                temporary.unlink(missing_ok=True)

    @staticmethod
    def _link(temporary: Path, target: Path) -> bool:
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    def delete(self, key: str) -> None:
        with self._asking("delete", key):
            Path(self.uri, key).unlink(missing_ok=True)

    def read(self, key: str) -> bytes:
        with self._asking("read", key), self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        with self._asking("read", key):
            return open(os.path.join(self.uri, key), "rb", opener=_open_regular)

    @contextmanager
    def _asking(self, verb: str, key: str) -> Iterator[None]:
        """Turns what the operating system raises into a fault of the machine, but for the absence of a file."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError as error:
            raise _local_fault(verb, self.child(key), error) from error

    def stat(self, key: str) -> Entry | None:
        try:
            status = os.stat(os.path.join(self.uri, key) if key else self.uri)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _local_fault("look at", self.child(key), error) from error
        return Entry(status.st_size, str(status.st_mtime_ns))

    def list(self, prefix: str = "") -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        seen = set[str]()
        top = os.path.join(self.uri, prefix)
        for folder, below, names in os.walk(top, onerror=_unless_absent(top), followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(real)
            for name in names:
                if name.endswith(TEMPORARY_SUFFIX):
                    continue
                key = os.path.relpath(os.path.join(folder, name), self.uri)
                if entry := self.stat(key):
                    found[key] = entry
        return dict(sorted(found.items()))


class ObjectStore(Store):
    """A prefix of a bucket."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.uri,)

    @property
    def _store(self) -> Any:
        return _remote(self.uri)

    def create(self, key: str, data: bytes) -> bool:
        # S3 answers 409 where another writer is at the same name, who may yet fail; obstore says "exists" to that too.
        for pause_s in (*CONFLICT_PAUSES_S, 0):
            if self._put(key, data):
                return True
            if self.stat(key) is not None:
                return False
            time.sleep(pause_s)
        raise EnvironmentFaultError(
            f"cannot write {self.child(key)}: the store says that it exists, and has no such object; run again"
        )

    def _put(self, key: str, data: bytes) -> bool:
        import obstore.exceptions as oe

        with self._asking("write", key, required=True):
            try:
                self._store.put(key, data, mode="create", use_multipart=False)
            except oe.AlreadyExistsError:
                return False
        return True

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError), self._asking("delete", key):
            self._store.delete(key)

    def read(self, key: str) -> bytes:
        with self._asking("read", key):
            return bytes(self._store.get(key).bytes())

    def read_at_most(self, key: str, limit: int) -> bytes | int:
        """Returns an object's bytes, or its size where it has more than a limit: one request either way.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._asking("read", key):
            found = self._store.get(key)
            size = int(found.meta["size"])
            return bytes(found.bytes()) if size <= limit else size

    def open(self, key: str) -> BinaryIO:
        entry = self.stat(key)
        if entry is None:
            raise FileNotFoundError(self.child(key))
        return io.BufferedReader(_RemoteFile(self, key, entry.size), READ_AHEAD)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Returns some bytes of an object."""
        with self._asking("read", key, required=True):
            return bytes(self._store.get_range(key, start=start, length=length))

    def stat(self, key: str) -> Entry | None:
        try:
            with self._asking("look up", key):
                return _entry(self._store.head(key))
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> dict[str, Entry]:
        with self._asking("list", prefix, required=True):
            metas = [meta for page in self._store.list(prefix or None) for meta in page]
        return dict(sorted((meta["path"], _entry(meta)) for meta in metas))

    @contextmanager
    def _asking(self, verb: str, key: str, *, required: bool = False) -> Iterator[None]:
        """Turns what obstore raises into a fault of the store; absence too if `required`, else FileNotFoundError."""
        import obstore.exceptions as oe

        try:
            yield
        except (oe.BaseError, FileNotFoundError) as error:
            if not required and isinstance(error, oe.NotFoundError | FileNotFoundError):
                raise FileNotFoundError(self.child(key)) from None
            raise self._fault(verb, key, error) from error

    def _fault(self, verb: str, key: str, error: Exception) -> EnvironmentFaultError:
        cause = str(error).splitlines()[0][:300]
        return EnvironmentFaultError(
            f"cannot {verb} {self.child(key)}: {cause}; check the store and the credentials, then run again"
        )


def _entry(meta: Any) -> Entry:
    return Entry(meta["size"], meta["e_tag"] or str(meta["last_modified"]))


class _RemoteFile(io.RawIOBase):
    """An object as a file that can be read at any offset."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._store, self._key, self._size, self._position = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._position), 0)
        if length:
            buffer[:length] = self._store.read_range(self._key, self._position, length)
            self._position += length
        return length


def _unless_absent(top: str) -> Callable[[OSError], None]:
    """Makes a listing fail where a folder cannot be read: the rows in it would be lost without a word."""

    def fail(error: OSError) -> None:
        if not (error.filename == top and isinstance(error, FileNotFoundError | NotADirectoryError)):
            raise _local_fault("list", str(error.filename), error) from error

    return fail


def _local_fault(verb: str, path: str, error: OSError) -> EnvironmentFaultError:
    return EnvironmentFaultError(f"cannot {verb} {path}: {error.strerror}; fix its permissions or name, then run again")


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # to wait for a pipe's writer is to hang
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # the latter is refused by whoever asked for a file
        return descriptor
    os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "a device, pipe or socket", path)


def open_store(uri: str) -> Store:
    """Opens a folder by path or URI.

    Raises:
        ConfigError: the scheme is unknown.
    """
    scheme, path = split_uri(uri)
    return LocalStore(path) if scheme == "file" else ObjectStore(uri)


def open_parent(uri: str) -> tuple[Store, str]:
    """Opens the folder that an object lies in, and returns it with the object's name."""
    scheme, path = split_uri(uri)
    head, _, name = (os.path.abspath(path) if scheme == "file" else uri.rstrip("/")).rpartition("/")
    return open_store(head or "/"), name


def split_uri(uri: str) -> tuple[str, str]:
    """Splits a path or URI into its scheme (`file` for paths) and its path.

    Raises:
        ConfigError: the scheme is unknown.
    """
    if "://" not in uri:
        return "file", os.path.expanduser(uri)
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return "file", unquote(parts.path)
    if parts.scheme not in REMOTE_SCHEMES:
        known = ", ".join(f"{s}://" for s in ("file", *REMOTE_SCHEMES))
        raise ConfigError(f"unknown scheme in {uri!r}; use a path or one of {known}")
    return parts.scheme, parts.path


def as_url(uri: str) -> str:
    """Returns the URI of a bucket's folder as a URL: `#`, `?` and `%` are signs of a key like any other."""
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    return f"{scheme}://{bucket}/{quote(prefix)}"


@cache
def _remote(uri: str) -> Any:
    from obstore.store import from_url

    try:
        return from_url(as_url(uri))
    except Exception as error:  # obstore raises several unrelated classes for a malformed URL or missing settings
        raise ConfigError(f"cannot open {uri}: {str(error).splitlines()[0]}") from error
