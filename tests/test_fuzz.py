"""Hostile input by the thousand: each gives what it should or a reason; no crash, no escape, no wrong value."""

import random
from pathlib import Path

import pytest
from fuzz import decode_images
from models import colour_table, saved_bundle

from mmray.bundle import load_bundle
from mmray.errors import BundleError

pytestmark = pytest.mark.slow


def test_twenty_thousand_damaged_images_give_pixels_or_a_reason_and_kill_no_process() -> None:
    outcome = decode_images(count=20_000, seed=1)
    assert outcome.deaths == []
    assert outcome.wrong == []
    assert sum(outcome.results.values()) == 20_000
    assert outcome.results["ok"] > 2_000, "mutants that decode are those that go deep"
    assert outcome.peak_mb < 600


def test_every_flipped_bit_of_a_bundle_is_refused(tmp_path: Path) -> None:
    saved = Path(saved_bundle(tmp_path / "bundle", colour_table(tmp_path / "rows", rows=20)))
    names, generator = sorted(path.name for path in saved.iterdir()), random.Random(0)
    for k in range(1000):
        path = saved / names[k % len(names)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        at, bit = generator.randrange(len(damaged)), generator.randrange(8)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(BundleError):
            pytest.fail(f"bit {bit} of byte {at} of {path.name}: {load_bundle(str(saved)).fingerprint}")
        path.write_bytes(whole)
    assert load_bundle(str(saved)).fingerprint, "whole again"
