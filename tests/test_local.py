"""Scoring without Ray, by processes of this machine: the same files, and what is killed is replaced."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from models import score_in_process, with_other_scores
from processes import check_interruptions, mmray, num_parts, pid_at_work, started, wait_for

from mmray.errors import ConfigError
from mmray.options import ScoreConfig
from mmray.score.local import MAX_ROWS, scores_here, share
from mmray.slices import Slice

pytestmark = pytest.mark.slow
ROWS = 240


def test_it_gives_the_files_of_one_process_byte_for_byte_and_loads_no_ray(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    output, options = tmp_path / "out", ScoreConfig(slice_rows=30)
    (tmp_path / "ray.py").write_text("raise ImportError('not here')")
    run = mmray("score", bundle, rows, output, "--slice-rows", 30, "--actors", 2, "--json", PYTHONPATH=str(tmp_path))
    assert (run.returncode, run.stderr) == (0, "")
    *events, done = map(json.loads, run.stdout.splitlines())
    assert {event["event"] for event in events} == {"progress"}
    assert (events[0]["done"], events[-1]["done"]) == (0, 240)
    assert (done["event"], done["rows"], done["statuses"]) == ("done", 240, {"ok": 240})
    assert done["rows_over_time"][-1][1] == 240, "rows over time"
    assert done["stages"].keys() == {"read", "prepare", "forward", "commit"}
    assert all(seconds > 0 for seconds in done["stages"].values())
    pace = json.loads((output / "_mmray" / "pace.json").read_text())
    assert pace["rows_over_time"] == done["rows_over_time"], "kept for the report"
    score_in_process(bundle, str(rows), str(tmp_path / "alone"), options)
    assert scored_files(output) == scored_files(tmp_path / "alone")
    assert mmray("verify", output, "--level", 2).returncode == 0


def scored_files(output: Path) -> dict[str, bytes]:
    """The files of a run."""
    return {path.name: path.read_bytes() for path in output.glob("data/*.parquet")}


def family(pid: int) -> list[int]:
    """The ids of the children of a process, each before its own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [each for child in map(int, children) for each in (child, *family(child))]


def are_gone(pids: list[int]) -> bool:
    """Whether there are no such processes any more."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def sockets(pid: int) -> set[str]:
    """The sockets that a process has."""
    found = set[str]()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(descriptor))
    return {name for name in found if name.startswith("socket:")}


@pytest.mark.long
def test_a_process_that_is_killed_is_replaced(rows: Path, bundle: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started("score", bundle, rows, output, "--slice-rows", 1, "--actors", 2, "--local") as process:
        killed = set[int]()
        while len(killed) < 3 and process.poll() is None:
            with suppress(ProcessLookupError):
                pid = pid_at_work(output)
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                wait_for(lambda: num_parts(output) > 10 * len(killed) or process.poll() is not None)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(killed) == 3
    assert "processes said" not in errors
    assert mmray("verify", output, "--level", 2).returncode == 0


def test_a_process_that_is_stopped_from_outside_is_replaced(rows: Path, bundle: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["score", bundle, rows, output, "--slice-rows", 1, "--actors", 1, "--local", "--stuck-after", 2]
    with started(*command) as process:
        wait_for(lambda: num_parts(output) or process.poll() is not None)
        stopped = pid_at_work(output)
        os.kill(stopped, signal.SIGSTOP)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not Path(f"/proc/{stopped}").exists()
    assert mmray("verify", output, "--level", 2).returncode == 0


def test_processes_end_with_the_one_that_all_came_from_and_the_run_goes_on_with_others(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with started("score", bundle, rows, output, "--slice-rows", 1, "--actors", 2, "--local") as process:
        wait_for(lambda: num_parts(output) or process.poll() is not None)
        nursery, *workers = family(process.pid)
        assert len(sockets(workers[0]) & sockets(workers[1])) == 1, "by which they ask for others"
        os.kill(nursery, signal.SIGKILL)
        wait_for(lambda: are_gone(workers))
        assert process.poll() is None
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert mmray("verify", output, "--level", 2).returncode == 0


def test_a_run_comes_to_its_end_where_the_process_that_all_came_from_is_stopped(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = ["score", bundle, rows, output, "--slice-rows", 1, "--actors", 2, "--local", "--stuck-after", 2]
    with started(*command) as process:
        wait_for(lambda: num_parts(output) or process.poll() is not None)
        nursery, *workers = family(process.pid)
        os.kill(nursery, signal.SIGSTOP)
        os.kill(workers[0], signal.SIGKILL)  # nobody can say how it ended, nor start another
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    wait_for(lambda: are_gone([nursery, *workers]))


def test_no_process_outlives_a_driver_that_is_killed(rows: Path, bundle: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started("score", bundle, rows, output, "--slice-rows", 8, "--actors", 2, "--local") as process:
        os.kill(pid_at_work(output), signal.SIGKILL)  # at its slice there will be a process more, to score rows apart
        wait_for(lambda: len(family(process.pid)) > 3 or process.poll() is not None)
        others = family(process.pid)
        process.kill()
    assert len(others) > 3, "one that all came from, two that score, one that does apart"
    wait_for(lambda: are_gone(others))


def test_a_run_that_is_stopped_and_then_killed_resumes_with_the_same_command(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    check_interruptions(output, ["score", bundle, rows, output, "--slice-rows", 1, "--actors", 2, "--local"], 240)


def test_ctrl_c_while_processes_start_ends_the_run_at_once_as_at_any_time(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    with started("score", bundle, rows, tmp_path / "out", "--slice-rows", 30, "--actors", 4, "--local") as process:
        wait_for(lambda: len(family(process.pid)) == 5 or process.poll() is not None)
        workers = family(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    wait_for(lambda: are_gone(workers))


def test_what_stops_a_process_is_said_in_its_own_words(rows: Path, bundle: str, tmp_path: Path) -> None:
    other = with_other_scores(bundle, tmp_path / "other")
    run = mmray("score", other, rows, tmp_path / "out", "--local")
    assert run.returncode == 2
    assert "golden rows come out" in run.stderr
    assert "Traceback" not in run.stderr


def test_processes_that_do_not_start_end_the_run_and_leave_what_they_said(
    rows: Path, bundle: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'mmray.score.nursery' in sys.orig_argv: sys.exit('no room here')\n"
    )
    run = mmray("score", bundle, rows, tmp_path / "out", "--local", PYTHONPATH=str(tmp_path), TMPDIR=str(tmp_path))
    assert run.returncode == 5
    (log,) = tmp_path.glob("mmray-*.log")
    assert str(log) in run.stderr.splitlines()[-1]
    assert "no room here" in log.read_text()


@pytest.mark.parametrize(
    ("options", "rows", "here"),
    [
        ({}, MAX_ROWS, True),
        ({}, MAX_ROWS + 1, False),
        ({"local": True}, MAX_ROWS + 1, True),
        ({"local": False}, 1, False),
        ({"gpus_per_actor": 1.0}, 1, True),
        ({"node_labels": {"a": "b"}}, 1, False),
        ({"placement": "cluster"}, 1, False),
    ],
)
def test_few_rows_need_no_cluster(
    options: dict[str, object], rows: int, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = [Slice(0, "a.parquet", "1", 0, rows)]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert scores_here(slices, ScoreConfig.model_validate(options)) == here
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert scores_here(slices, ScoreConfig.model_validate(options)) == bool(options.get("local"))


def test_what_only_ray_gives_is_refused(rows: Path, bundle: str, tmp_path: Path) -> None:
    run = mmray("score", bundle, rows, tmp_path / "out", "--local", "--placement", "cluster")
    assert run.returncode == 2
    assert "--local" in run.stderr


@pytest.mark.parametrize(
    ("gpus", "each", "shared"),
    [
        ("a", 1, "a"),
        ("ab", 1, "ab"),
        ("ab", 0.7, "ab"),
        ("ab", 0.5, "abab"),
        ("abcd", 2, "ac"),
        ("a", 1 / 93, "a" * 93),
    ],
)
def test_processes_share_gpus_in_turns_and_none_lies_across_two(gpus: str, each: float, shared: str) -> None:
    assert "".join(share(list(gpus), each)) == shared
    with pytest.raises(ConfigError, match="were asked for, and this machine has 0"):
        share([], each)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpus_that_are_not_there_are_refused(rows: Path, bundle: str, tmp_path: Path) -> None:
    run = mmray("score", bundle, rows, tmp_path / "out", "--gpus", 0.5)
    assert run.returncode == 2
    assert "0.5 GPUs for each process were asked for, and this machine has 0" in run.stderr
