"""One tick of a schedule: finds what is new, scores it once, and publishes the whole.

Reads a bundle, a table and a root folder -> gives the next published list. Files whose size and version are those of
the last list, scored by the same model with the same options, are carried over; the others are scored into a run
folder of the next number. A tick that was killed is continued by the next one; one too many finds nothing to do.
"""

import datetime
import sys
from dataclasses import dataclass

from mmray.errors import EnvironmentFaultError, GateError
from mmray.histogram import stability_index
from mmray.options import ScoreConfig
from mmray.schedule.lease import lease
from mmray.schedule.published import RUNS, Part, Published, keep_last, latest, pointer
from mmray.schedule.settings import ScheduleConfig
from mmray.score.carry import Carry, ScoredFile
from mmray.score.commit import Output, Receipt
from mmray.score.job import OnSlice, OnStart, score_plan
from mmray.score.ledger import Ledger
from mmray.score.plan import make_plan
from mmray.slices import list_files
from mmray.store import Entry, open_store


@dataclass(frozen=True)
class TickResult:
    """What a tick did."""

    published: Published | None
    """What is published now; None where nothing is yet."""
    outcome: str
    """`published`, `nothing new`, or `another tick is at work`."""
    new_rows: int = 0
    """Rows that this tick scored."""
    removed_runs: int = 0
    """Runs that nobody needs any more, and that are gone."""

    def lines(self) -> list[str]:
        """Returns what the tick did, for a terminal."""
        if self.published is None:
            return [self.outcome]
        rows, number = self.published.ledger.rows, self.published.number
        if self.outcome != "published":
            return [f"{self.outcome}; number {number:,} with {rows:,} rows stays"]
        carried = rows - self.new_rows
        return [f"published number {number:,}: {rows:,} rows, {self.new_rows:,} scored now, {carried:,} carried over"]

    def to_dict(self) -> dict[str, object]:
        """Returns what the tick did in JSON's own types."""
        there = {"number": self.published.number, "rows": self.published.ledger.rows} if self.published else {}
        return {"outcome": self.outcome, **there, "new_rows": self.new_rows, "removed_runs": self.removed_runs}


def tick(
    bundle: str,
    table: str,
    root: str,
    options: ScoreConfig,
    rules: ScheduleConfig,
    *,
    on_start: OnStart = lambda plan, done, at_work: None,
    on_slice: OnSlice = lambda receipt: None,
) -> TickResult:
    """Brings what is published under a root up to date with a table and a model.

    Args:
        bundle: folder or URI of the bundle.
        table: parquet file, folder or glob.
        root: folder or URI for runs and published lists.
        options: how rows are scored; other options than last time score every row again.
        rules: what has to hold before something is published, and what is kept.
        on_start: see `mmray.score.job.OnStart`; the plan is that of what is new.
        on_slice: see `mmray.score.job.OnSlice`.

    Raises:
        GateError: the result is not fit to be published; what was published stays.
        MmrayError: see `mmray.errors` for the others.
    """
    store = open_store(root)
    with lease(store, rules.lease_s, _on_beat) as lost:
        if lost is None:
            return TickResult(latest(store), "another tick is at work")

        def guarded(receipt: Receipt) -> None:
            if lost.is_set():
                raise EnvironmentFaultError("another tick took over, for this one seemed dead; leave it to that one")
            on_slice(receipt)

        before, files = latest(store), list_files(table)
        identity = _identity(bundle, table, options, next(iter(files)))
        same = _unchanged(before, identity, files, rules) if before else set[str]()
        if before is not None and before.inputs.keys() == files.keys() == same:
            return TickResult(before, "nothing new")
        number = before.number + 1 if before else 1
        new = files.keys() - same
        scored = []
        if new:
            carry = _carry(before, identity, same, root, rules)
            scored = _score(bundle, table, root, number, options, new, carry, on_start, guarded)
        carried = [part for part in before.parts if part.input in same] if before else []
        order = {uri: k for k, uri in enumerate(files)}
        parts = sorted([*carried, *scored], key=lambda part: (order[part.input], part.first_row))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        after = Published(number, identity, open_store(table).uri, now, files, tuple(parts))
        _gates(before, after, scored, rules)
        if not store.create(pointer(number), after.to_parquet()):
            raise EnvironmentFaultError(f"another tick published number {number} first; run again")
        new_rows = sum(part.rows - part.ledger.carried for part in scored)
        return TickResult(after, "published", new_rows, keep_last(store, rules.keep))


def _identity(bundle: str, table: str, options: ScoreConfig, file: str) -> dict[str, object]:
    """Returns the model and the options that a row's score depends on, from a plan of one file."""
    identity = make_plan(bundle, table, options, [file]).identity
    return {key: identity[key] for key in ("fingerprint", "options", "schema_version")}


def _unchanged(
    before: Published, identity: dict[str, object], files: dict[str, Entry], rules: ScheduleConfig
) -> set[str]:
    """Returns the input files whose published rows still stand for them."""
    if before.identity != identity or rules.full:
        return set()
    same = {uri for uri, entry in files.items() if before.inputs.get(uri) == entry}
    if rules.retry_failed:
        same -= {part.input for part in before.parts if part.ledger.count("ok") < part.rows}
    return same


def _on_beat() -> None:
    if "ray" in sys.modules:  # a tick that finds nothing new never loads it
        from mmray.schedule.meters import beat

        beat()


def _carry(
    before: Published | None, identity: dict[str, object], same: set[str], root: str, rules: ScheduleConfig
) -> Carry | None:
    """Returns where the rows of files that changed may have been scored before."""
    if rules.key is None or rules.full or before is None or before.identity != identity:
        return None
    store, changed = open_store(root), (part for part in before.parts if part.input not in same)
    files = (ScoredFile(store.child(part.key), part.input, part.first_row) for part in changed)
    return Carry.of(rules.key, files, rules.retry_failed)


def _score(
    bundle: str,
    table: str,
    root: str,
    number: int,
    options: ScoreConfig,
    new: set[str],
    carry: Carry | None,
    on_start: OnStart,
    on_slice: OnSlice,
) -> list[Part]:
    """Scores some files into the run folder of a number; one that was begun before is continued."""
    plan = make_plan(bundle, table, options, new)
    if not plan.slices:
        return []
    run = f"{RUNS}/{number:09d}-{plan.hash[:8]}"
    output = Output(open_store(root).child(run))
    score_plan(plan, bundle, table, output.uri, options, carry=carry, on_start=on_start, on_slice=on_slice)
    receipts = zip(plan.slices, output.receipts(plan.hash, plan.slices), strict=True)
    return [Part(p.uri, p.first_row, p.num_rows, f"{run}/{r.key}", r.size, r.ledger) for p, r in receipts]


def _gates(before: Published | None, after: Published, scored: list[Part], rules: ScheduleConfig) -> None:
    """Refuses what is not fit to be published."""
    rows = after.ledger.rows
    if rows < rules.min_rows:
        raise GateError(f"{rows:,} rows are fewer than --min-rows {rules.min_rows:,}; nothing is published")
    if before is None or rules.max_drift is None or not scored:
        return
    drift = stability_index(before.ledger.histogram, Ledger.total(part.ledger for part in scored).histogram)
    if drift > rules.max_drift:
        raise GateError(
            f"the new scores drift from those published: {drift:.3f} > --max-drift {rules.max_drift:g}; look at them "
            f"in {scored[0].run}, then give a larger --max-drift to publish them"
        )
