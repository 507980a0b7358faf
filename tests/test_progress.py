"""How far a long step is, as people see it in a terminal and in a log, and as machines read it."""

import io
import json
import os
import sys

import pytest
from rich.console import Console

from mmray import progress as shown
from mmray.progress import EpochProgress, RowProgress, State, event, row_progress
from mmray.score.pace import Rate


class Clock:
    """The time of a test, in seconds."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shown, "monotonic", lambda: clock.now)
    return clock


def half_done(progress: RowProgress, clock: Clock) -> None:
    """Shows a run of 1,000 rows, 500 of which are done at 10 rows a second, those begun with after a minute."""
    progress.start("scoring", 1000, 100, at_work=lambda: 4)
    for at_s, process, failed in ((60, "a 1", 1), (60, "b 1", 0), (60, "a 1", 0), (60, "b 1", 0)):
        clock.now = at_s
        stages = {"prepare": 2.5, "forward": 7.375, "commit": 0.125}
        progress.advance(50, {"ok": 50 - failed, "failed": failed}, stages, process)
    for at_s, process in ((65, "a 1"), (70, "b 1"), (75, "a 1"), (80, "b 1")):
        clock.now = at_s
        progress.advance(50, {"ok": 47, "degraded": 3}, {"prepare": 2.5, "forward": 7.5}, process)


def test_a_log_gets_lines_with_the_rate_what_is_left_what_is_not_ok_and_where_time_goes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with row_progress() as progress:
        half_done(progress, clock)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == (
        "scoring: 150 of 1,000 rows; 1 failed; preparing 25%, model 74%, writing 1%; 1 process at 4 slices"
    )
    assert last == (
        "scoring: 500 of 1,000 rows, 10 rows/s, 50 s left; 1 failed, 12 degraded; "
        "preparing 25%, model 74%, writing 1%; 2 processes at 4 slices"
    )


def test_a_terminal_gets_a_bar_with_all_that_beneath(clock: Clock) -> None:
    screen = io.StringIO()
    bar = shown._Bar(Console(file=screen, force_terminal=True, width=100, highlight=False))
    half_done(RowProgress(bar), clock)
    bar.refresh()
    bar.stop()
    text = screen.getvalue()
    assert "500/1000" in text
    assert "10 rows/s, 50 s left" in text
    assert "1 failed, 12 degraded; preparing 25%, model 74%, writing 1%; 2 processes at 4 slices" in text


def test_machines_get_events_and_nothing_else(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with row_progress(events=True) as progress:
        half_done(progress, clock)
    written = capsys.readouterr()
    events = [json.loads(line) for line in written.out.splitlines()]
    assert written.err == ""
    assert [event["done"] for event in events] == [100, 150, 350, 400, 450, 500]
    assert events[-1] == {
        "event": "progress",
        "what": "scoring",
        "rows": 1000,
        "done": 500,
        "rows_per_s": 10.0,
        "seconds_left": 50.0,
        "statuses": {"ok": 387, "failed": 1, "degraded": 12},
        "stages": {"prepare": 20.0, "forward": 59.5, "commit": 0.5},
        "slices_at_work": 4,
        "processes": 2,
    }


def test_a_step_goes_on_when_nobody_reads_its_events_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for _ in range(3):
            event("progress", rows=1)
        monkeypatch.undo()


def test_what_processes_begin_with_comes_together_and_says_nothing_of_their_rate() -> None:
    rate = Rate()
    seen = []
    for at_s in (10, 12, 14, 16):  # two processes, two slices of 100 rows each at a time
        for process in ("a 1", "b 1", "a 1", "b 1"):
            rate.add(100, at_s, process)
            seen.append(rate.per_s())
    assert seen[:4] == [None] * 4
    assert seen[-1] == 200, "as long as they are at it, whatever came when they began"


def test_a_process_that_sends_nothing_any_more_is_not_counted(clock: Clock) -> None:
    progress = RowProgress(shown._Nothing())
    progress.start("scoring", 1000)
    seen = []
    for at_s, process in ((0, "a 1"), (10, "a 2"), (20, None), (shown.HEARD_S + 5, "a 2")):
        clock.now = at_s
        progress.advance(10, process=process)
        seen.append(progress._state.processes)
    assert seen == [1, 2, 2, 1]


def test_who_wants_quiet_gets_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with row_progress(quiet=True, events=True) as progress:
        half_done(progress, clock)
    assert capsys.readouterr() == ("", "")


def test_epochs_say_how_they_were_and_how_long_the_others_take(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (False, True):
        clock.now = 0
        progress = EpochProgress(quiet=quiet)
        progress.start(12, 4)
        for epoch, at_s in ((5, 30), (6, 40), (7, 52), (12, 90)):
            clock.now = at_s
            progress.advance({"epoch": epoch, "train_loss": 0.5, "auroc": None})
    assert capsys.readouterr().err.splitlines() == [
        "training: 4 of 12 epochs are done",
        "epoch   5: train_loss 0.5000",
        "epoch   6: train_loss 0.5000; 60 s left",
        "epoch   7: train_loss 0.5000; 55 s left",
        "epoch  12: train_loss 0.5000",
    ]


def test_nothing_is_said_of_what_there_is_none_of() -> None:
    assert list(State("verifying", 10, 5).notes()) == []
    assert list(State("scoring", 10, 5, slices_at_work=0).notes()) == ["0 slices at work"]
    assert list(State("scoring", 10, 5, processes=1).notes()) == ["1 process"]
    assert list(State("scoring", 10, 5, processes=3, slices_at_work=1).notes()) == ["3 processes at 1 slice"]
