"""Whatever is killed, and whenever, each row is there once and as it would have been: `kill.py`, in short."""

from pathlib import Path

import pytest
from kill import Run, Work, looping

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS = 20_000
WITHOUT_RAY = {4: 4, 7: 4, 12: 4, 54: 4, 93: 4}
ON_RAY = {24_111: 5}
LONGER = {10_665: 5, 10_666: 4, 10_667: 4, 10_668: 4, 10_669: 4, 10_670: 4}
"""Seed: kills; of all kinds but the head, which takes longest. The soak has many more of these."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"), ROWS)


def kinds_of(runs: list[Run]) -> list[str]:
    """What was killed, in runs where it cost nothing."""
    assert all(run.passed for run in runs), runs
    return [kind for run in runs for kind, _ in run.kills]


def test_no_row_is_lost_doubled_or_changed_whatever_is_killed_without_ray(work: Work, tmp_path: Path) -> None:
    with looping(work, str(tmp_path), without_ray=True) as loop:
        kinds = kinds_of([loop.run(seed, kills) for seed, kills in WITHOUT_RAY.items()])
    assert len(kinds) == sum(WITHOUT_RAY.values())
    assert set(kinds) == {"actor", "driver", "twin"}


@pytest.mark.parametrize(
    ("seeds", "also"), [(ON_RAY, set()), pytest.param(LONGER, {"revenant"}, marks=pytest.mark.long)]
)
def test_no_row_is_lost_doubled_or_changed_whatever_is_killed_of_a_cluster(
    work: Work, tmp_path: Path, seeds: dict[int, int], also: set[str]
) -> None:
    with looping(work, str(tmp_path)) as loop:
        kinds = kinds_of([loop.run(seed, kills) for seed, kills in seeds.items()])
    assert len(kinds) == sum(seeds.values())
    assert set(kinds) == {"actor", "stuck", "node", "driver", "twin"} | also
