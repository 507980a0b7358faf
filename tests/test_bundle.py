"""Bundles: what is loaded is what was saved, or it is refused."""

import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from models import colour_table, saved_bundle, small_bundle, with_golden

from mmray.bundle import load_bundle, save_bundle
from mmray.bundle_info import read_info
from mmray.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=20)


@pytest.fixture
def saved(tmp_path: Path, rows: Path) -> Path:
    saved_bundle(tmp_path / "bundle", rows)
    return tmp_path / "bundle"


def test_a_saved_bundle_loads_as_it_was(saved: Path, rows: Path) -> None:
    before, after = with_golden(small_bundle(), rows), load_bundle(str(saved))
    assert after.fingerprint == before.fingerprint == read_info(str(saved)).fingerprint
    assert after.config == before.config
    assert after.vocabulary == before.vocabulary
    assert all(torch.equal(after.weights[name], tensor) for name, tensor in before.weights.items())
    assert after.golden is not None
    assert after.golden.equals(before.golden)


def test_a_bundle_in_a_bucket_loads_too(s3: str, rows: Path) -> None:
    bundle = with_golden(small_bundle(), rows)
    save_bundle(bundle, f"{s3}/models/one")
    assert load_bundle(f"{s3}/models/one").fingerprint == bundle.fingerprint


def test_the_folder_holds_no_pickle(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"bundle.json", "weights.safetensors", "vocabulary.json", "golden.parquet"}


def test_the_fingerprint_changes_with_whatever_changes_a_score(rows: Path) -> None:
    from models import WORDS, small_config

    from mmray.bundle import Bundle
    from mmray.preprocess.text import Vocabulary

    base = small_bundle()
    others = [
        small_bundle(seed=1),
        small_bundle(labels=("a", "b", "c")),
        small_bundle(small_config(image={"size": 17})),
        Bundle(base.config, base.labels, Vocabulary(tuple(reversed(WORDS))), base.weights),
    ]
    assert len({bundle.fingerprint for bundle in [base, *others]}) == 5


def test_a_bundle_is_never_overwritten(saved: Path) -> None:
    with pytest.raises(ConfigError, match="already holds"):
        save_bundle(small_bundle(seed=1), str(saved))


@pytest.mark.parametrize("name", ["weights.safetensors", "vocabulary.json", "golden.parquet"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        load_bundle(str(saved))


def test_what_is_no_bundle_is_refused_in_words(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        read_info(str(tmp_path / "nothing"))
    manifest = json.loads((saved / "bundle.json").read_text())
    (saved / "bundle.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(BundleError, match="format 99; this mmray reads format 3"):
        read_info(str(saved))
    (saved / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="damaged"):
        read_info(str(saved))
    (saved / "bundle.json").write_text("null")
    with pytest.raises(BundleError, match="format None"):
        read_info(str(saved))


def test_a_manifest_that_was_edited_is_refused(saved: Path) -> None:
    text = (saved / "bundle.json").read_text()
    for edited in (text.replace('"labels": [', '"labels":  ['), text + "\n", text.replace('"seal"', '"sea1"')):
        (saved / "bundle.json").write_text(edited)
        with pytest.raises(BundleError, match="does not have the sha256 that it ends with"):
            load_bundle(str(saved))


def sealed_with(saved: Path, **changes: object) -> None:
    """Changes a bundle.json and seals it again, as whoever makes a bundle can."""
    manifest = json.loads((saved / "bundle.json").read_text())
    text = json.dumps({**manifest, **changes, "seal": "0" * 64}, indent=1)
    (saved / "bundle.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["weights.safetensors", "vocabulary.json", "golden.parquet", "bundle.json"])
def test_a_pickle_is_not_opened_whatever_its_name_and_digest(saved: Path, tmp_path: Path, name: str) -> None:
    fired = tmp_path / "fired"
    for bomb in (pickle.dumps(Bomb(fired)), zipped(pickle.dumps(Bomb(fired)))):
        for other in ("model.pt", "weights.pkl", "data.pkl", "tokenizer.py", "sitecustomize.py"):
            (saved / other).write_bytes(bomb)
        assert load_bundle(str(saved)).fingerprint, "what no bundle has is not looked at"
        whole = (saved / name).read_bytes(), (saved / "bundle.json").read_bytes()
        (saved / name).write_bytes(bomb)
        if name != "bundle.json":
            digests = json.loads(whole[1])["sha256"]
            sealed_with(saved, sha256={**digests, name: hashlib.sha256(bomb).hexdigest()})
        with pytest.raises(BundleError, match="damaged"):
            load_bundle(str(saved))
        (saved / name).write_bytes(whole[0])
        (saved / "bundle.json").write_bytes(whole[1])
    assert not fired.exists()


def zipped(data: bytes) -> bytes:
    """The same in an archive as torch.save makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "model.pt", "bundle.json", ""])
def test_a_bundle_does_not_name_files_of_others(saved: Path, name: str) -> None:
    sealed_with(saved, sha256={**json.loads((saved / "bundle.json").read_text())["sha256"], name: "f" * 64})
    with pytest.raises(BundleError, match="which no bundle has"):
        load_bundle(str(saved))


@pytest.mark.parametrize("name", ["weights.safetensors", "bundle.json"])
def test_links_are_read_like_files_and_pipes_and_devices_are_not(saved: Path, tmp_path: Path, name: str) -> None:
    (saved / name).rename(tmp_path / "kept")
    (saved / name).symlink_to(tmp_path / "kept")
    assert load_bundle(str(saved)).fingerprint
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("nothing")):
        (saved / name).unlink()
        make(saved / name)
        with pytest.raises(BundleError, match=r"lacks weights|no bundle at"):
            load_bundle(str(saved))


def test_weights_of_another_shape_are_refused(rows: Path) -> None:
    import dataclasses

    bundle = small_bundle()
    weights = {**bundle.weights, "head._linear.weight": torch.zeros(5, 16)}
    with pytest.raises(BundleError, match="do not fit"):
        dataclasses.replace(bundle, weights=weights).build_model()
