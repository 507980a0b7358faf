"""Bundles: what is loaded is what was saved, or it is refused."""

import json
import random
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


@pytest.mark.parametrize("name", ["weights.safetensors", "vocabulary.json", "golden.parquet", "bundle.json"])
def test_every_flipped_bit_is_found(saved: Path, name: str) -> None:
    generator, path = random.Random(name), saved / name
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            bundle = load_bundle(str(saved))
        except BundleError:
            continue
        # A bit in a metric or a version of bundle.json changes no score, and the fingerprint says so.
        assert name == "bundle.json"
        assert bundle.fingerprint == json.loads(whole)["fingerprint"]


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
    with pytest.raises(BundleError, match="format 99; this mmray reads format 2"):
        read_info(str(saved))
    (saved / "bundle.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="damaged"):
        read_info(str(saved))
    (saved / "bundle.json").write_text("null")
    with pytest.raises(BundleError, match="format None"):
        read_info(str(saved))


def test_weights_of_another_shape_are_refused(rows: Path) -> None:
    import dataclasses

    bundle = small_bundle()
    weights = {**bundle.weights, "head._linear.weight": torch.zeros(5, 16)}
    with pytest.raises(BundleError, match="do not fit"):
        dataclasses.replace(bundle, weights=weights).build_model()
