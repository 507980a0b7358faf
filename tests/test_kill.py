"""Whatever is killed, and whenever, each row is there once and as it would have been: `kill.py`, in short."""

from pathlib import Path

import pytest
from kill import looping

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SEED = (
    1166  # by which processes, a node that comes back from the dead and a command with a twin are among what is killed
)


def test_no_row_is_lost_doubled_or_changed_whatever_is_killed(tmp_path: Path) -> None:
    with looping(tmp_path, str(tmp_path), rows=20_000) as loop:
        run = loop.run(SEED, num_kills=5)
    assert {kind for kind, _ in run.kills} == {"actor", "revenant", "twin"}
    assert len(run.kills) == 5
    assert run.passed, run
