"""Scoring as a user meets it: hostile rows, a cluster that starts late, stops and deaths on one, a run that is done."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
from models import score_in_process
from processes import check_interruptions, mmray, num_parts, pid_at_work, pids_at_work, started, wait_for

from mmray.cluster import cluster
from mmray.errors import EnvironmentFaultError
from mmray.options import ScoreConfig
from mmray.score.plan import make_plan

pytestmark = pytest.mark.ray
ROWS = 240


def test_a_cluster_that_does_not_start_in_time_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def late(**arguments: object) -> None:
        tried.append(arguments)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(EnvironmentFaultError, match="cannot start Ray: The current node timed out"), cluster(1):
        pass
    assert len(tried) == 2


def test_every_odd_image_gets_a_status_and_nothing_is_said_on_the_terminal(
    shared: Path, bundle: str, tmp_path: Path
) -> None:
    folder = shared / "data" / "odd_images"
    names = sorted(path.name for path in folder.iterdir())
    table = pa.table({"image_path": names, "text": [f"picture {name}" for name in names]})
    pq.write_table(table, tmp_path / "odd.parquet")
    run = mmray("score", bundle, tmp_path / "odd.parquet", tmp_path / "out", "--image-root", folder)
    assert run.returncode == 0, run.stderr
    assert all(line.startswith("scoring: ") for line in run.stderr.splitlines()), run.stderr
    scored = pyarrow.dataset.dataset(str(tmp_path / "out" / "data")).to_table()
    assert scored.num_rows == len(names)
    statuses = scored["status"].to_pylist()
    assert set(statuses) == {"ok", "degraded"}
    assert all(
        (status == "ok") == (why is None) for status, why in zip(statuses, scored["reason"].to_pylist(), strict=True)
    )
    assert mmray("verify", tmp_path / "out", "--level", "2").returncode == 0


# In short, test_local.py stops a run, test_train.py a training (on Ray for long, too), and test_kill.py kills.
@pytest.mark.long
def test_a_driver_that_is_stopped_and_then_killed_resumes_with_the_same_command(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = ["score", bundle, rows, output, "--slice-rows", 3, "--actors", 2, "--no-local"]
    slices = len(make_plan(bundle, str(rows), ScoreConfig(slice_rows=3)).slices)
    check_interruptions(output, command, slices)


@pytest.mark.parametrize(
    ("actors", "stuck_after"),
    [pytest.param(2, 600, id="another does its slices"), pytest.param(1, 5, id="it is replaced")],
)
@pytest.mark.long
def test_a_process_that_is_stopped_as_a_whole_holds_nothing_up_and_changes_nothing_when_it_goes_on(
    rows: Path, bundle: str, tmp_path: Path, actors: int, stuck_after: int
) -> None:
    output = tmp_path / "out"
    command = ["score", bundle, rows, output, "--slice-rows", 3, "--no-local"]
    with started(*command, "--actors", actors, "--stuck-after", stuck_after) as process:
        wait_for(lambda: num_parts(output) or process.poll() is not None)
        stopped = stop_one(output)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert num_parts(output) == len(make_plan(bundle, str(rows), ScoreConfig(slice_rows=3)).slices)
    with suppress(ProcessLookupError):  # its cluster has ended it
        os.kill(stopped, signal.SIGCONT)
    assert mmray("verify", output, "--level", "2").returncode == 0


def stop_one(output: Path) -> int:
    """Stops a process in the middle of a slice, and returns its id."""
    while True:
        pid = pid_at_work(output)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            if pid in pids_at_work(output):
                return pid
            os.kill(pid, signal.SIGCONT)


def test_a_finished_run_answers_without_ray_or_a_model(rows: Path, bundle: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    score_in_process(bundle, str(rows), str(output), ScoreConfig())
    code = (
        "import sys; from mmray.cli import main; code = main(['score', *sys.argv[1:]]); "
        "assert not {'ray', 'torch'} & set(sys.modules); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code, bundle, str(rows), str(output)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nothing was scored" in run.stdout
