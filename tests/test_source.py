"""Where bytes come from: what is inside of the roots is read, nothing else is, and nothing hangs."""

import os
import socket
from pathlib import Path

import pytest

from mmray.errors import EnvironmentFaultError
from mmray.source import ImageSource
from mmray.store import open_store
from mmray.table import Fault, Reason

CAP = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"inside")
    (folder / "sub" / "b.jpg").write_bytes(b"below")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    (tmp_path / "root-sibling").mkdir()
    (tmp_path / "root-sibling" / "c.jpg").write_bytes(b"outside")
    return folder


def reason(result: bytes | Fault) -> Reason | bytes:
    return result.reason if isinstance(result, Fault) else result


@pytest.mark.parametrize(
    "name", ["a.jpg", "./a.jpg", "sub/../a.jpg", "sub//../a.jpg", "{root}/a.jpg", "file://{root}/a.jpg"]
)
def test_a_path_beneath_a_root_is_read(root: Path, name: str) -> None:
    assert ImageSource([str(root)], CAP).read(name.format(root=root)) == b"inside"


def test_roots_are_tried_in_order(root: Path, tmp_path: Path) -> None:
    source = ImageSource([str(root / "sub"), str(root)], CAP)
    assert source.read("b.jpg") == b"below"
    assert source.read("a.jpg") == b"inside"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "sub/../../secret.jpg",
        "/etc/passwd",
        "//etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file:///%65tc/passwd",
        "{root}/../secret.jpg",
        "{root}-sibling/c.jpg",
        "../root-sibling/c.jpg",
        "sub/link/secret.jpg",
        "link.jpg",
        "a\x00.jpg",
        "http://127.0.0.1/a.jpg",
        "https://169.254.169.254/latest/meta-data",
        "gopher://x/a",
        "ftp://x/a.jpg",
        "data://image/png;base64,AA",
        "s3://bucket/a.jpg",
        "S3://bucket/a.jpg",
        "FILE:///etc/passwd",
    ],
)
def test_nothing_outside_of_the_roots_is_read(root: Path, tmp_path: Path, name: str) -> None:
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "sub" / "link").symlink_to(tmp_path)
    result = ImageSource([str(root)], CAP).read(name.format(root=root))
    assert reason(result) is Reason.NOT_ALLOWED
    assert isinstance(result, Fault)
    assert "secret" not in result.detail
    assert "passwd" not in result.detail


@pytest.mark.parametrize(
    "name", ["~/a.jpg", "$HOME/a.jpg", "%2e%2e/secret.jpg", "..\\secret.jpg", "nothing.jpg", "a.jpg/x"]
)
def test_a_name_that_no_file_has_is_missing(root: Path, name: str) -> None:
    assert reason(ImageSource([str(root)], CAP).read(name)) is Reason.MISSING


def test_a_name_that_is_too_long_is_missing(root: Path) -> None:
    assert reason(ImageSource([str(root)], CAP).read("x" * 5000)) is Reason.MISSING


def test_a_link_that_stays_inside_is_followed(root: Path) -> None:
    (root / "link.jpg").symlink_to("sub/b.jpg")
    assert ImageSource([str(root)], CAP).read("link.jpg") == b"below"


def test_a_circle_of_links_is_no_file(root: Path) -> None:
    (root / "x").symlink_to("y")
    (root / "y").symlink_to("x")
    assert reason(ImageSource([str(root)], CAP).read("x")) is Reason.MISSING


@pytest.mark.parametrize("swapped", ["sub", "sub/b.jpg"])
def test_what_is_swapped_for_a_link_after_it_was_resolved_is_not_followed(
    root: Path, tmp_path: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"outside")
    source, resolve = ImageSource([str(root)], CAP), os.path.realpath

    def resolve_and_swap(path: str) -> str:
        found = resolve(path)
        (root / swapped).rename(root / "old")
        (root / swapped).symlink_to(tmp_path / "elsewhere" / Path(swapped).relative_to("sub"))
        return found

    monkeypatch.setattr(os.path, "realpath", resolve_and_swap)
    assert reason(source.read("sub/b.jpg")) is Reason.MISSING


def test_a_root_that_is_not_there_is_no_fault_of_the_rows(root: Path) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"cannot open the image root .*nothing: No such file"):
        ImageSource([str(root / "nothing")], CAP)


def test_roots_and_files_are_closed_again(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        source = ImageSource([str(root)], CAP)
        for name in ("a.jpg", "sub/b.jpg", "sub", "sub/nothing/x.jpg", "a.jpg/x"):
            source.read(name)
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_devices_pipes_sockets_and_folders_are_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        source = ImageSource([str(root), "/dev"], CAP)
        for name in ("pipe", "socket", "sub", ".", "/dev/zero", "/dev/null", "/dev/tty"):
            assert reason(source.read(name)) in (Reason.NOT_REGULAR, Reason.MISSING), name
        assert reason(source.read("pipe")) is Reason.NOT_REGULAR


def test_sizes_are_looked_at_before_reading(root: Path) -> None:
    with (root / "huge.jpg").open("wb") as file:
        file.truncate(2**40)  # sparse: reading it would take all memory there is
    (root / "empty.jpg").touch()
    source = ImageSource([str(root)], CAP)
    assert reason(source.read("huge.jpg")) is Reason.TOO_LARGE_BYTES
    assert reason(source.read("empty.jpg")) is Reason.EMPTY_FILE


def test_bytes_in_the_table_need_no_file() -> None:
    source = ImageSource([], CAP)
    assert source.read(b"jpeg") == b"jpeg"
    assert source.read({"bytes": b"jpeg", "path": "/etc/passwd"}) == b"jpeg"
    assert reason(source.read({"bytes": None, "path": "/etc/passwd"})) in (Reason.MISSING, Reason.NOT_ALLOWED)
    assert reason(source.read(b"")) is Reason.EMPTY_FILE
    assert reason(source.read(b"x" * (CAP + 1))) is Reason.TOO_LARGE_BYTES


@pytest.mark.parametrize("cell", [None, "", {"bytes": None, "path": None}, {}, float("nan")])
def test_an_absent_image_is_null(cell: object) -> None:
    assert reason(ImageSource([], CAP).read(cell)) is Reason.IMAGE_NULL


def test_images_in_a_bucket_are_read_beneath_their_root(s3: str) -> None:
    open_store(f"{s3}/images").create("a.jpg", b"inside")
    open_store(s3).create("secret.jpg", b"outside")
    source = ImageSource([f"{s3}/images"], CAP)
    assert source.read("a.jpg") == source.read(f"{s3}/images/a.jpg") == b"inside"
    assert reason(source.read("b.jpg")) is Reason.MISSING
    assert reason(source.read(f"{s3}/secret.jpg")) is Reason.NOT_ALLOWED
    assert reason(source.read("../secret.jpg")) is Reason.NOT_ALLOWED


@pytest.mark.parametrize(
    "name", ["http://[oops/i.jpg", "file://[x/y", "https://exa\u2100mple.com/a.jpg", "file://", "://x"]
)
def test_a_malformed_uri_is_a_fault_of_its_row(root: Path, name: str) -> None:
    assert reason(ImageSource([str(root)], CAP).read(name)) in (Reason.NOT_ALLOWED, Reason.MISSING, Reason.NOT_REGULAR)


def test_keys_in_a_bucket_are_found_like_paths_in_a_folder(s3: str) -> None:
    open_store(f"{s3}/images").create("x/a.jpg", b"inside")
    source = ImageSource([f"{s3}/images"], CAP)
    assert [source.read(name) for name in ("x//a.jpg", "./x/a.jpg", f"{s3}/images/x/a.jpg")] == [b"inside"] * 3
    assert reason(source.read("a\n.jpg")) is Reason.MISSING
