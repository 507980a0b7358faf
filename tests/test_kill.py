"""Whatever is killed, and whenever, each row is there once and as it would have been: `kill.py`, in short."""

from pathlib import Path

import pytest
from faults import KINDS as FAULTS
from faults import faulty
from kill import KINDS, looping

pytestmark = [pytest.mark.ray, pytest.mark.slow]
RUNS, KILLS, ROWS = 6, 5, 20_000
SEED = 1163  # by which everything is killed that can be, and most often what takes little time to come back


def test_no_row_is_lost_doubled_or_changed_whatever_is_killed(tmp_path: Path) -> None:
    with looping(tmp_path, str(tmp_path), ROWS) as loop:
        runs = [loop.run(seed, KILLS) for seed in range(SEED, SEED + RUNS)]
    kills = [kind for run in runs for kind, _ in run.kills]
    assert len(kills) >= 25
    assert set(kills) == set(KINDS)
    assert [run for run in runs if not run.passed] == []


def test_nor_is_one_in_a_store_that_fails_one_request_in_five(
    s3: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(s3_server, share=1 / 5) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        with looping(tmp_path, s3, rows=2_000) as loop:
            run = loop.run(seed=0, num_kills=2)
        assert {kind for _, kind in store.faults} == set(FAULTS)
    assert len(run.kills) == 2
    assert run.passed, run
