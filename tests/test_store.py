"""Stores: the same promises on a local folder and on an S3 server."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmray.errors import ConfigError, EnvironmentFaultError
from mmray.store import Store, open_parent, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "folder"))
    return open_store(f"{request.getfixturevalue('s3')}/folder-{tmp_path.name}")


def test_what_is_created_can_be_read_listed_and_opened(store: Store) -> None:
    assert store.create("a/b.bin", b"hello")
    assert store.create("a/c.bin", b"")
    assert store.read("a/b.bin") == b"hello"
    with store.open("a/b.bin") as file:
        file.seek(1)
        assert file.read(3) == b"ell"
    assert [(key, entry.size) for key, entry in store.list("a").items()] == [("a/b.bin", 5), ("a/c.bin", 0)]
    entry = store.stat("a/b.bin")
    assert entry is not None
    assert entry == store.list()["a/b.bin"]


def test_an_object_is_never_overwritten(store: Store) -> None:
    assert store.create("x", b"first")
    assert not store.create("x", b"second")
    assert store.read("x") == b"first"


def test_of_many_racing_writers_one_wins(tmp_path: Path) -> None:
    # Only the local store: the test server's own check is not atomic.
    store = open_store(str(tmp_path))
    start = threading.Barrier(8)

    def write(k: int) -> bool:
        start.wait()
        return store.create("x", bytes([k]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert store.read("x") == bytes([won.index(True)]) * 100_000
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_absent_is_absent(store: Store) -> None:
    assert store.stat("nothing") is None
    assert store.list("nothing") == {}
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.open("nothing")


def test_a_deleted_object_is_gone_and_deleting_twice_is_fine(store: Store) -> None:
    store.create("x", b"1")
    store.delete("x")
    store.delete("x")
    assert store.stat("x") is None


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create("x", b"1")
    before = store.stat("x")
    (tmp_path / "x").write_bytes(b"2")
    os.utime(tmp_path / "x", ns=(1, 1))
    assert store.stat("x") != before


def test_an_unwritable_folder_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EnvironmentFaultError, match="cannot write"):
        open_store(str(tmp_path / "file")).create("x", b"1")


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="s3://"):
        open_store("ftp://host/folder")


def test_a_file_uri_and_a_path_are_the_same_folder(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").uri == open_store(str(tmp_path)).uri
    parent, name = open_parent(str(tmp_path / "rows.parquet"))
    assert (parent.uri, name) == (str(tmp_path), "rows.parquet")


def test_a_folder_that_links_into_is_listed_and_a_circle_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "folder")
    assert list(open_store(str(tmp_path / "folder")).list()) == ["link/x"]


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:  # tests may run as root, whom no permission stops
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(EnvironmentFaultError, match=r"cannot list .*closed: Permission denied"):
        open_store(str(tmp_path)).list()


@pytest.mark.parametrize("folder", ["plain", "od#d", "pe%20r%c", "qu?e", "gr üß/x=1"])
def test_keys_in_a_bucket_may_have_any_sign(s3: str, folder: str) -> None:
    keys = ["100%.txt", "a b.txt", "a#b.txt", "a%20b.txt", "a+b.txt", "a?b.txt", "x=1/y&z.txt", "ü.txt"]
    store = open_store(f"{s3}/{folder}")
    for key in keys:
        assert store.create(key, key.encode())
        parent, name = open_parent(store.child(key))
        assert parent.read(name) == key.encode()
    assert sorted(store.list()) == sorted(keys)
    assert sorted(open_store(s3).list(folder)) == sorted(f"{folder}/{key}" for key in keys)
