"""Where image bytes come from: a cell holds bytes, a path or a URI; only allowed roots are read.

Reads a cell -> gives bytes, or why not. A path is resolved, symbolic links and all, and must still lie beneath a root:
a link is followed where it leads into a root, and refused where it leads out of all. The resolved path is then walked
from the root, which was opened once, without following links: what is swapped for a link meanwhile is not there. What
is opened is looked at before it is read, so that no device, pipe or giant file is.
"""

import errno
import os
import posixpath
import stat
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote

from mmray.errors import EnvironmentFaultError
from mmray.options import OnUnavailable
from mmray.store import REMOTE_SCHEMES, ObjectStore, split_uri
from mmray.table import Fault, Reason, fault
from mmray.url import PORTS, UrlRoot, is_url

_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW
_WALK_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_ODD = {errno.ENXIO, errno.ENODEV, errno.EISDIR}


class ImageSource:
    """Reads images beneath some roots; thread-safe."""

    def __init__(self, roots: Sequence[str], max_bytes: int, on_unavailable: OnUnavailable = "fail") -> None:
        """Takes the folders, URIs and URLs that may be read from, and the most bytes an image may have.

        Args:
            roots: folders, URIs and URLs.
            max_bytes: of an image.
            on_unavailable: whether an image that cannot be read now is an error, or recorded as its row's fault.

        Raises:
            ConfigError: a root is malformed.
            EnvironmentFaultError: a folder is not there.
        """
        self._urls = tuple(UrlRoot(root) for root in roots if is_url(root))
        schemes = [(root, split_uri(root)) for root in roots if not is_url(root)]
        self._folders = tuple(_Folder(path) for _, (scheme, path) in schemes if scheme == "file")
        self._remotes = tuple(root.rstrip("/") for root, (scheme, _) in schemes if scheme != "file")
        self._max_bytes, self._on_unavailable = max_bytes, on_unavailable

    @property
    def is_remote(self) -> bool:
        """Whether some images lie in a store or on a server, where a read is mostly waiting."""
        return bool(self._remotes or self._urls)

    def read(self, cell: Any) -> bytes | Fault:
        """Returns the bytes that a cell holds or names, or why there are none.

        Raises:
            EnvironmentFaultError: the disk or the store failed, which says nothing about the image.
        """
        try:
            return self._read(cell)
        except EnvironmentFaultError as error:
            if self._on_unavailable == "fail":
                raise
            return fault(Reason.UNAVAILABLE, str(error))

    def _read(self, cell: Any) -> bytes | Fault:
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
        elif scheme in PORTS:
            asked = ((root, root.target(name)) for root in self._urls)
            return next((self._fetched(root, target) for root, target in asked if target is not None), _outside())
        elif scheme:
            return fault(Reason.NOT_ALLOWED, "no scheme that images are read by")
        return self._by_path(name)

    def _by_path(self, name: str) -> bytes | Fault:
        """Looks for a path beneath each root in turn; for an absolute one beneath folders only."""
        if not self._folders and not self.is_remote:
            return _outside()
        looks: list[Callable[[], bytes | Fault]] = [partial(self._local, folder, name) for folder in self._folders]
        if not os.path.isabs(name):
            looks += [partial(self._remote, root, name) for root in self._remotes]
            looks += [partial(self._fetched, root, root.child(name)) for root in self._urls]
        found: bytes | Fault = fault(Reason.MISSING, "no such file")
        for look in looks:
            found = look()
            if not (isinstance(found, Fault) and found.reason is Reason.MISSING):
                break
        return found

    def _local(self, folder: "_Folder", name: str) -> bytes | Fault:
        try:
            path = os.path.realpath(os.path.join(folder.path, name))
            inside = [root for root in self._folders if _beneath(path, root.path)]
            if not inside:
                return _outside()
            descriptor = inside[0].open(path)
        except (OSError, ValueError) as error:
            return _explain(error)
        try:
            return self._opened(descriptor)
        except OSError as error:
            return _explain(error)
        finally:
            os.close(descriptor)

    def _opened(self, descriptor: int) -> bytes | Fault:
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

    def _fetched(self, root: UrlRoot, target: str | None) -> bytes | Fault:
        if target is None:
            return _outside()
        found = root.read(target, self._max_bytes)
        return self._inline(found) if isinstance(found, bytes) else found


class _Folder:
    """A root on this machine, opened once: it stays what it is, whatever its name comes to mean."""

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)
        try:
            self._descriptor = os.open(self.path, _WALK_FLAGS)
        except OSError as error:
            raise EnvironmentFaultError(
                f"cannot open the image root {self.path}: {error.strerror}; mount it here, or correct the root"
            ) from None
        weakref.finalize(self, os.close, self._descriptor)

    def open(self, path: str) -> int:
        """Opens a resolved path beneath this root, and nothing that a link would lead to."""
        *folders, name = (path[len(self.path) :].strip("/") or ".").split("/")
        here = os.dup(self._descriptor)
        try:
            for folder in folders:
                below = os.open(folder, _WALK_FLAGS | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = below
            return os.open(name, _OPEN_FLAGS, dir_fd=here)
        finally:
            os.close(here)


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
    raise EnvironmentFaultError(
        f"cannot read an image: {os.strerror(code or errno.EIO)}; mend the disk or mount, then run again"
    ) from None
