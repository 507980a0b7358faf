"""How far a long step is, as people see it in a terminal and in a log, and as machines read it."""

import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mmray import progress as shown
from mmray.options import ScoreConfig
from mmray.progress import EpochProgress, RowProgress, State, event, row_progress
from mmray.score.attempts import this_process
from mmray.score.commit import Output, receipt_from_row, receipts_to_arrow
from mmray.score.pace import Clock as PaceClock
from mmray.score.pace import Rate
from mmray.score.plan import describe, make_plan
from mmray.score.worker import SliceScorer


class Clock:
    """The time of a test, in seconds."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shown, "monotonic", lambda: clock.now)
    return clock


def half_done(progress: RowProgress, clock: Clock) -> None:
    """Shows a run of 1,000 rows, 500 of which are done, by two processes of 5 rows a second that began at 40 s."""
    progress.start("scoring", 1000, 100, at_work=lambda: 4)
    for at_s, bad in ((60, {"failed": 1}), (80, {"degraded": 6})):
        clock.now = at_s
        for process in ("a 1", "b 1", "a 1", "b 1"):
            statuses = {"ok": 50 - sum(bad.values()), **bad}
            progress.advance(50, statuses, {"prepare": 2.5, "forward": 7.375, "commit": 0.125}, 20.0, process)


def test_a_log_gets_lines_with_the_rate_what_is_left_what_is_not_ok_and_where_time_goes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with row_progress() as progress:
        half_done(progress, clock)
    first, last = capsys.readouterr().err.splitlines()
    assert first == (
        "scoring: 150 of 1,000 rows; 1 failed; preparing 25%, model 74%, writing 1%; 1 process, 4 slices at work"
    )
    assert last == (
        "scoring: 350 of 1,000 rows, 6 rows/s, 104 s left; 4 failed, 6 degraded; "
        "preparing 25%, model 74%, writing 1%; 2 processes, 4 slices at work"
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
    assert "4 failed, 24 degraded; preparing 25%, model 74%, writing 1%; 2 processes, 4 slices at work" in text


def test_machines_get_events_and_nothing_else(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with row_progress(events=True) as progress:
        half_done(progress, clock)
    written = capsys.readouterr()
    events = [json.loads(line) for line in written.out.splitlines()]
    assert written.err == ""
    assert [event["done"] for event in events] == [100, 150, 350]
    assert events[-1] == {
        "event": "progress",
        "what": "scoring",
        "rows": 1000,
        "done": 350,
        "rows_per_s": 6.2,
        "seconds_left": 104.0,
        "statuses": {"ok": 240, "failed": 4, "degraded": 6},
        "stages": {"prepare": 12.5, "forward": 36.875, "commit": 0.625},
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


def test_a_rate_is_of_the_time_since_the_first_slice_was_begun_however_many_processes_begin_at_once() -> None:
    rate = Rate()
    seen = []
    for at_s in (12, 14, 16):  # two processes, two slices of 100 rows each at a time, from 10 s on
        for process in ("a 1", "b 1", "a 1", "b 1"):
            rate.add(100, at_s, 2.0, process)
        seen.append((rate.per_s(), rate.is_settled()))
    assert seen == [(200, False), (200, True), (200, True)]
    rate.add(100, 18, 10.0, "slower")
    assert rate.per_s() == pytest.approx(1300 / 10), "it began at 8 s"
    untimed = Rate()
    for at_s in (10, 11, 12):
        untimed.add(50, at_s)
    assert untimed.per_s() == 50, "what came first is the start"


def test_a_receipt_that_has_travelled_says_the_same(rows: Path, bundle: str, tmp_path: Path) -> None:
    plan = make_plan(bundle, str(rows), ScoreConfig())
    output = Output(str(tmp_path / "out"))
    output.claim(plan, describe(plan, bundle, str(rows)))
    scorer = SliceScorer(bundle, str(tmp_path / "out"), plan.hash, plan.image_roots, ScoreConfig())
    receipt = scorer.score(plan.slices[0])
    assert receipt.process == this_process()
    assert receipt.took_s is not None
    assert receipt.took_s > receipt.seconds["read"] + receipt.seconds["commit"] > 0
    (row,) = receipts_to_arrow([receipt]).to_pylist()
    assert receipt_from_row(row) == dataclasses.replace(receipt, created=False)
    again = scorer.score(plan.slices[0])
    assert (again.took_s, again.process) == (None, None), "it was there"
    clock = PaceClock()
    for _ in range(2):
        clock.add(dataclasses.replace(receipt, took_s=60.0))
    assert clock.read().steady_rows_per_s == pytest.approx(2 * receipt.ledger.rows / 60, rel=0.1)


def test_a_process_that_sends_nothing_any_more_is_not_counted(clock: Clock) -> None:
    progress = RowProgress(shown._Nothing())
    progress.start("scoring", 1000)
    seen = []
    for at_s, process in ((0, "a 1"), (10, "a 2"), (20, None), (shown.HEARD_S + 5, "a 2")):
        clock.now = at_s
        progress.advance(10, took_s=5.0, process=process)
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
        "epoch   6: train_loss 0.5000; 60 s left at most",
        "epoch   7: train_loss 0.5000; 55 s left at most",
        "epoch  12: train_loss 0.5000",
    ]


def test_nothing_is_said_of_what_there_is_none_of() -> None:
    assert list(State("verifying", 10, 5).notes()) == []
    assert list(State("scoring", 10, 5, slices_at_work=0).notes()) == ["0 slices at work"]
    assert list(State("scoring", 10, 5, processes=1).notes()) == ["1 process"]
    assert list(State("scoring", 10, 5, processes=3, slices_at_work=1).notes()) == ["3 processes, 1 slice at work"]
