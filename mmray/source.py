"""Where image bytes come from: a cell holds bytes, a path or a URI; only allowed roots are read.

Reads a cell -> gives bytes, or why not. A path is resolved, symbolic links and all, and must still lie beneath a root;
what is opened is looked at before it is read, so that no device, pipe or giant file is.
"""

import errno
import os
import posixpath
import stat
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from mmray.errors import EnvironmentFaultError
from mmray.store import REMOTE_SCHEMES, ObjectStore, split_uri
from mmray.table import Fault, Reason, fault

_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_ODD = {errno.ENXIO, errno.ENODEV, errno.EISDIR}


class ImageSource:
    """Reads images beneath some roots; thread-safe."""

    def __init__(self, roots: Sequence[str], max_bytes: int) -> None:
        """Takes the folders and URIs that may be read from, and the most bytes an image may have."""
        schemes = [(root, split_uri(root)) for root in roots]
        self._folders = tuple(os.path.realpath(path) for _, (scheme, path) in schemes if scheme == "file")
        self._remotes = tuple(root.rstrip("/") for root, (scheme, _) in schemes if scheme != "file")
        self._max_bytes = max_bytes

    @property
    def is_remote(self) -> bool:
        """Whether some images lie in a store, where a read is mostly waiting."""
        return bool(self._remotes)

    def read(self, cell: Any) -> bytes | Fault:
        """Returns the bytes that a cell holds or names, or why there are none.

        Raises:
            EnvironmentFaultError: the disk or the store failed, which says nothing about the image.
        """
        cell = bytes_or_path(cell)
        if cell is None or cell == "":
            return fault(Reason.IMAGE_NULL, "no image")
        if isinstance(cell, bytes):
            return self._inline(cell)
        if not isinstance(cell, str):
            return fault(Reason.IMAGE_NULL, f"neither bytes nor a path but {type(cell).__name__}")
        if "\0" in cell:
            return fault(Reason.NOT_ALLOWED, "a path with a NUL character")
        return self._by_name(cell)

    def _inline(self, data: bytes) -> bytes | Fault:
        return self._wrong_size(len(data)) or data

    def _wrong_size(self, size: int) -> Fault | None:
        if size == 0:
            return fault(Reason.EMPTY_FILE, "no bytes")
        return self._too_large(size) if size > self._max_bytes else None

    def _too_large(self, size: int) -> Fault:
        return fault(Reason.TOO_LARGE_BYTES, f"{size} bytes, {self._max_bytes} allowed")

    def _by_name(self, name: str) -> bytes | Fault:
        scheme, rest = _split(name)
        if scheme == "file":
            name = unquote(rest[rest.find("/") :]) if "/" in rest else ""
        elif scheme in REMOTE_SCHEMES:
            inside = [root for root in self._remotes if name.startswith(root + "/")]
            return self._remote(inside[0], name[len(inside[0]) + 1 :]) if inside else _outside()
        elif scheme:
            return fault(Reason.NOT_ALLOWED, "URLs are not fetched")
        if not self._folders and not self._remotes:
            return _outside()
        found: bytes | Fault = fault(Reason.MISSING, "no such file")
        for folder in self._folders:
            found = self._local(folder, name)
            if not (isinstance(found, Fault) and found.reason is Reason.MISSING):
                return found
        for root in () if os.path.isabs(name) else self._remotes:
            found = self._remote(root, name)
            if not (isinstance(found, Fault) and found.reason is Reason.MISSING):
                return found
        return found

    def _local(self, folder: str, name: str) -> bytes | Fault:
        try:
            path = os.path.realpath(os.path.join(folder, name))
            if not any(_beneath(path, root) for root in self._folders):
                return _outside()
            descriptor = os.open(path, _OPEN_FLAGS | os.O_NOFOLLOW)
        except (OSError, ValueError) as error:
            return _explain(error)
        try:
            return self._opened(descriptor)
        except OSError as error:
            return _explain(error)
        finally:
            os.close(descriptor)

    def _opened(self, descriptor: int) -> bytes | Fault:
        # A folder swapped for a link between resolving and opening would show here.
        real = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else None
        if real is not None and not any(_beneath(real, root) for root in self._folders):
            return _outside()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return fault(Reason.NOT_REGULAR, "a folder, device, pipe or socket")
        wrong = self._wrong_size(status.st_size)
        if wrong is not None:
            return wrong
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(self._max_bytes)

    def _remote(self, root: str, key: str) -> bytes | Fault:
        if ".." in key.split("/"):
            return _outside()
        try:
            found = ObjectStore(root).read_at_most(posixpath.normpath(key), self._max_bytes)
        except (FileNotFoundError, ValueError):  # ValueError: no object can have such a name
            return fault(Reason.MISSING, "no such object")
        return self._inline(found) if isinstance(found, bytes) else self._too_large(found)


def bytes_or_path(cell: Any) -> Any:
    """Returns what a cell holds: of a struct its bytes, or its path where it has none."""
    if not isinstance(cell, dict):
        return cell
    return cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")


def _split(name: str) -> tuple[str, str]:
    """Splits a URI into its scheme and what follows it; paths have no scheme."""
    scheme, separator, rest = name.partition("://")
    return (scheme.lower(), rest) if separator else ("", name)


def _beneath(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _outside() -> Fault:
    return fault(Reason.NOT_ALLOWED, "outside of the allowed roots; --image-root allows more")


def _explain(error: OSError | ValueError) -> Fault:
    code = error.errno if isinstance(error, OSError) else errno.EINVAL
    if code in _ABSENT:
        return fault(Reason.MISSING, "no such file")
    if code in _FORBIDDEN:
        return fault(Reason.NOT_ALLOWED, "no permission to read the file")
    if code in _ODD:
        return fault(Reason.NOT_REGULAR, "a folder, device, pipe or socket")
    raise EnvironmentFaultError(f"cannot read an image: {error}; mend the disk or mount, then run again") from error
