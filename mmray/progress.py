"""How far a long step is: a bar with rate and remaining time in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0  # without a terminal: often enough to see that it lives, seldom enough for a log


class RowProgress:
    """Counts rows as they are done."""

    def __init__(self, console: Console) -> None:
        self._console, self._bar = console, _bar(console)
        self._task: TaskID | None = None
        self._what, self._total, self._done, self._noted = "", 0, 0, 0
        self._started = self._last_line = time.monotonic()

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begins with a number of rows, some of which may be done."""
        self._what, self._total, self._done = what, total, done
        if self._console.is_terminal:
            self._task = self._bar.add_task(what, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, rows: int, note: str = "") -> None:
        """Counts rows that are done."""
        self._done += rows
        self._noted += rows
        now = time.monotonic()
        rate = self._noted / max(now - self._started, 1e-9)
        if self._task is not None:
            self._bar.update(self._task, advance=rows, note=f"{rate:,.0f} rows/s {note}")
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            left = (self._total - self._done) / rate
            self._console.print(
                f"{self._what}: {self._done:,} of {self._total:,} rows, {rate:,.0f} rows/s, {left:,.0f} s left {note}"
            )

    def of_scoring(self) -> dict[str, Any]:
        """Returns the callbacks of `score_table` that show it."""
        return {
            "on_start": lambda plan, done: self.start("scoring", plan.num_rows, done),
            "on_slice": lambda ledger: self.advance(ledger.rows),
        }

    def stop(self) -> None:
        """Takes the bar away."""
        if self._task is not None:
            self._bar.stop()


@contextmanager
def row_progress() -> Iterator[RowProgress]:
    """Yields a progress display on stderr for the duration of a `with` block."""
    progress = RowProgress(Console(file=sys.stderr, highlight=False))
    try:
        yield progress
    finally:
        progress.stop()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
