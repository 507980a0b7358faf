"""Hostile input by the thousand: each gives what it should or a reason, and never a crash, an escape or a wrong value."""

import pytest
from fuzz import decode_images

pytestmark = pytest.mark.slow


def test_twenty_thousand_damaged_images_give_pixels_or_a_reason_and_kill_no_process() -> None:
    outcome = decode_images(count=20_000, seed=1)
    assert outcome.deaths == []
    assert outcome.wrong == []
    assert sum(outcome.results.values()) == 20_000
    assert outcome.results["ok"] > 2_000, "mutants that decode are those that go deep"
    assert outcome.peak_mb < 600
