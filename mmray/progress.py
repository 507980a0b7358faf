"""How far a long step is: a bar in a terminal, plain lines elsewhere, events for machines, or nothing.

Reads what each slice did -> shows rows done, their rate, the time left, what is not ok, and where the time goes.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from mmray.score.pace import Rate, add_up, shares

if TYPE_CHECKING:
    from mmray.score.commit import Receipt
    from mmray.score.plan import Plan

AtWork = Callable[[], int | None]
"""Asks the store how many slices are being worked at."""
LOOK_EVERY_S = 5.0
HEARD_S, HEARD = 300.0, 3  # who has sent nothing for so long, or for so many times as long as a slice takes, is gone
LINE_EVERY_S = 10.0  # without a terminal: often enough to see that it lives, seldom enough for a log
EVENT_EVERY_S = 1.0


@dataclass
class State:
    """How far a step is."""

    what: str
    rows: int
    done: int
    rows_per_s: float = 0.0
    seconds_left: float | None = None
    """None while nothing is known of the rate."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Status -> rows, of those done now."""
    stages: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds, over all processes."""
    slices_at_work: int | None = None
    processes: int | None = None
    """From which slices came lately."""

    def to_dict(self) -> dict[str, Any]:
        """Returns it in JSON's own types."""
        stages = {stage: round(seconds, 3) for stage, seconds in self.stages.items()}
        return {**asdict(self), "rows_per_s": round(self.rows_per_s, 1), "stages": stages}

    def rate(self) -> str:
        """Returns how fast it is, and how long the rest will take; nothing while nobody knows."""
        left = self.seconds_left
        return "" if left is None else f"{self.rows_per_s:,.0f} rows/s, {duration(left)} left"

    def notes(self) -> Iterator[str]:
        """Yields what there is to say beside how many rows are done."""
        bad = {status: rows for status, rows in self.statuses.items() if status != "ok" and rows}
        if bad:
            yield ", ".join(f"{rows:,} {status}" for status, rows in bad.items())
        if self.stages:
            yield shares(self.stages)
        who = "" if self.processes is None else _counted(self.processes, "process")
        what = "" if self.slices_at_work is None else f"{_counted(self.slices_at_work, 'slice')} at work"
        if who or what:
            yield ", ".join(filter(None, (who, what)))


def _counted(number: int, what: str) -> str:
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Returns some time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Display(Protocol):
    """Where a state is shown."""

    def show(self, state: State) -> None:
        """Shows a state, as often as is fit."""

    def stop(self) -> None:
        """Takes away what would stay."""


class RowProgress:
    """Counts rows as they are done."""

    def __init__(self, display: Display) -> None:
        self._display, self._state = display, State("", 0, 0)
        self._at_work: AtWork | None = None
        self._rate, self._looked = Rate(), float("-inf")
        self._heard = dict[str, float]()

    def start(self, what: str, rows: int, done: int = 0, at_work: AtWork | None = None) -> None:
        """Begins with a number of rows, some of which may be done.

        Args:
            what: is done to them.
            rows: how many there are.
            done: how many of them are.
            at_work: see `AtWork`; asked now and then.
        """
        self._state, self._at_work = State(what, rows, done), at_work
        self._rate, self._heard = Rate(), {}
        self._display.show(self._state)

    def advance(
        self,
        rows: int,
        statuses: Mapping[str, int] | None = None,
        stages: Mapping[str, float] | None = None,
        took_s: float | None = None,
        process: str | None = None,
    ) -> None:
        """Counts rows that are done, by status, the seconds of each stage, how long all took, and who did it."""
        state, now = self._state, monotonic()
        state.done += rows
        add_up(state.statuses, statuses or {})
        add_up(state.stages, stages or {})
        self._rate.add(rows, now, took_s, process)
        if (rate := self._rate.per_s()) and self._rate.is_settled():
            state.rows_per_s, state.seconds_left = rate, round((state.rows - state.done) / rate, 1)
        if process is not None:
            limit_s = max(HEARD_S, HEARD * (took_s or 0))
            self._heard = {who: at for who, at in self._heard.items() if now - at < limit_s} | {process: now}
            state.processes = len(self._heard)
        if self._at_work is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked, state.slices_at_work = now, self._at_work()
        self._display.show(state)

    def of_scoring(self) -> dict[str, Any]:
        """Returns the callbacks of `score_table` that show it."""

        def start(plan: "Plan", done: int, at_work: AtWork) -> None:
            self.start("scoring", plan.num_rows, done, at_work)

        def advance(receipt: "Receipt") -> None:
            ledger = receipt.ledger
            self.advance(ledger.rows, ledger.statuses, receipt.seconds, receipt.took_s, receipt.process)

        return {"on_start": start, "on_slice": advance}


@contextmanager
def row_progress(*, quiet: bool = False, events: bool = False) -> Iterator[RowProgress]:
    """Yields a progress display for the duration of a `with` block.

    Args:
        quiet: shows nothing, whatever else is asked for.
        events: writes JSON lines to stdout, for machines; else it is for people, on stderr.
    """
    display = _display(quiet, events)
    try:
        yield RowProgress(display)
    finally:
        display.stop()


def event(name: str, **fields: Any) -> None:
    """Writes a JSON line to stdout, as long as somebody reads it: the step goes on without."""
    try:
        print(json.dumps({"event": name, **fields}), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _display(quiet: bool, events: bool) -> Display:
    if quiet:
        return _Nothing()
    if events:
        return _Events()
    console = Console(file=sys.stderr, highlight=False)
    return _Bar(console) if console.is_terminal else _Lines(console)


class EpochProgress:
    """Says on stderr how each epoch of a training was, and how long the others will take; it may stop before."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._epochs, self._rate = quiet, 0, Rate()

    def start(self, epochs: int, done: int) -> None:
        """Begins with a number of epochs, some of which may be done."""
        self._epochs = epochs
        self._say(f"training: {done} of {epochs} epochs are done" if done else f"training: {epochs} epochs")

    def advance(self, entry: Mapping[str, Any]) -> None:
        """Shows the history's entry of an epoch that has ended."""
        self._rate.add(1, monotonic())
        left, per_s = self._epochs - entry["epoch"], self._rate.per_s()
        self._say(epoch_line(entry) + (f"; {duration(left / per_s)} left at most" if left and per_s else ""))

    def _say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


def epoch_line(entry: Mapping[str, Any]) -> str:
    """Returns one line on an epoch of training."""
    values = (f"{name} {value:.4f}" for name, value in entry.items() if name != "epoch" and value is not None)
    return f"epoch {entry['epoch']:>3}: " + ", ".join(values)


class _Nothing:
    def show(self, state: State) -> None:
        pass

    def stop(self) -> None:
        pass


class _Events:
    def __init__(self) -> None:
        self._last = float("-inf")

    def show(self, state: State) -> None:
        now = monotonic()
        if now - self._last >= EVENT_EVERY_S or state.done == state.rows:
            self._last = now
            event("progress", **state.to_dict())

    def stop(self) -> None:
        pass


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console, self._last = console, monotonic()

    def show(self, state: State) -> None:
        now = monotonic()
        if now - self._last < LINE_EVERY_S:
            return
        self._last = now
        line = ", ".join(filter(None, (f"{state.what}: {state.done:,} of {state.rows:,} rows", state.rate())))
        self._console.print("; ".join([line, *state.notes()]), soft_wrap=True)

    def stop(self) -> None:
        pass


class _Bar(Progress):
    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),  # with the rest within 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        self._notes = ""
        super().__init__(*columns, console=console, transient=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self._notes:  # on a line of their own: a bar and all of them are wider than many a terminal
            yield Text(self._notes, style="dim", no_wrap=True, overflow="ellipsis")

    def show(self, state: State) -> None:
        if not self.tasks:
            self.add_task(state.what, total=state.rows, completed=state.done, rate="starting")
            self.start()
            return
        self._notes = "; ".join(state.notes())
        self.update(self.tasks[0].id, completed=state.done, rate=state.rate())
