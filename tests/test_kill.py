"""Whatever is killed, and whenever, each row is there once and as it would have been: `kill.py`, in short."""

from pathlib import Path

import pytest
from kill import looping

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
RUNS = {10_665: 5, 10_666: 4, 10_667: 4, 10_668: 4, 10_669: 4, 10_670: 4}
"""Seed: kills; of all kinds but the head, which takes longest."""


def test_no_row_is_lost_doubled_or_changed_whatever_is_killed(tmp_path: Path) -> None:
    with looping(tmp_path, str(tmp_path), rows=20_000) as loop:
        runs = [loop.run(seed, num_kills) for seed, num_kills in RUNS.items()]
    kinds = [kind for run in runs for kind, _ in run.kills]
    assert len(kinds) == 25
    assert set(kinds) == {"actor", "stuck", "node", "driver", "revenant", "twin"}
    assert all(run.passed for run in runs), runs
