"""Has the slices of a plan scored, by Ray Data or by processes of this machine, and completes the run.

Reads a bundle and a table -> gives an output folder with `_SUCCESS`. The same command resumes: it scores the slices
that are not there yet, in O(slices).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import ConfigError, EnvironmentFaultError, TableError
from mmray.options import ScoreConfig
from mmray.score.attempts import Attempts
from mmray.score.carry import Carry
from mmray.score.commit import Manifest, Output, Receipt, receipt_from_row
from mmray.score.hints import hints
from mmray.score.ledger import Ledger
from mmray.score.local import local_pool, scores_here
from mmray.score.pace import Clock, Pace, shares
from mmray.score.plan import Plan, describe, make_plan
from mmray.slices import Slice
from mmray.stop import RESUMES, stoppable
from mmray.store import open_store
from mmray.table import Status

MAX_DEATHS = 100  # of processes in one run, or a quarter of its slices, whichever is more: some rows kill, not most
OnStart = Callable[[Plan, int, Callable[[], int | None]], None]
"""Called with the plan, the number of rows that are there already, and what asks how many slices are at work."""
OnSlice = Callable[[Receipt], None]
"""Called with the receipt of each slice as it is committed."""


@dataclass(frozen=True)
class ScoreResult:
    """What a run did."""

    output: str
    ledger: Ledger
    num_slices: int
    scored_slices: int
    """Slices scored by this call; the others were there already."""
    pace: Pace
    """How fast this call was."""
    hints: Sequence[str] = ()
    """What to do where most rows lack something."""

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the scored rows as one table, which has to fit in memory; all columns by default.

        Raises:
            TableError: there is no such column, or files of the input have types that no one table can have.
        """
        store = open_store(self.output)
        files = (store.open(key) for key in store.list("data"))
        try:
            # Decoded in this thread, as `mmray.parquet.from_parquet` does, to which a column that is not there is none.
            tables = [pq.read_table(file, columns=columns, use_threads=False) for file in files]
            return pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise TableError(f"cannot read {self.output}/data as one table: {error}; read its files apart") from error

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Returns what the run did, for a terminal."""
        ledger = self.ledger
        counts = ", ".join(f"{ledger.count(status):,} {status.value}" for status in Status)
        lines = [f"{ledger.rows:,} rows: {counts}"]
        lines += [f"  {count:>10,}  {reason}" for reason, count in ledger.reasons_by_count()]
        lines += [f"hint: {hint}" for hint in self.hints]
        if not self.scored_slices:
            return [*lines, "the run was complete already; nothing was scored"]
        rate, stages = self.pace.steady_rows_per_s, self.pace.stages
        steady = f", steady {rate:,.0f} rows/s" if rate else ""
        lines.append(f"{self.scored_slices:,} of {self.num_slices:,} slices in {self.pace.seconds:.1f} s{steady}")
        return [*lines, f"time: {shares(stages)}"] if stages else lines

    def to_dict(self) -> dict[str, Any]:
        """Returns what the run did in JSON's own types."""
        counts = {"slices": self.num_slices, "scored_slices": self.scored_slices}
        ledger = {"rows": self.ledger.rows, "statuses": self.ledger.statuses, "reasons": self.ledger.reasons}
        return {"output": self.output, **ledger, **counts, **self.pace.to_dict(), "hints": list(self.hints)}


def score_table(
    bundle: str,
    table: str,
    output: str,
    options: ScoreConfig | None = None,
    *,
    on_start: OnStart = lambda plan, done, at_work: None,
    on_slice: OnSlice = lambda receipt: None,
) -> ScoreResult:
    """Scores every row of a table, once.

    Args:
        bundle: folder or URI of a bundle.
        table: parquet file, folder or glob.
        output: folder or URI for the scored rows.
        options: what may differ from run to run.
        on_start: see `OnStart`.
        on_slice: see `OnSlice`.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    options = options or ScoreConfig()
    if f"{open_store(output).uri}/".startswith(f"{open_store(table).uri}/"):
        raise ConfigError(f"the output {output!r} lies in the input {table!r} and would be scored next time; move it")
    plan = make_plan(bundle, table, options)
    return score_plan(plan, bundle, table, output, options, on_start=on_start, on_slice=on_slice)


def score_plan(
    plan: Plan,
    bundle: str,
    table: str,
    output: str,
    options: ScoreConfig,
    *,
    carry: Carry | None = None,
    on_start: OnStart = lambda plan, done, at_work: None,
    on_slice: OnSlice = lambda receipt: None,
) -> ScoreResult:
    """Scores what a plan of these says, `carry` aside; see `score_table`."""
    clock, target = Clock(), Output(output)
    target.claim(plan, describe(plan, bundle, table))
    success = target.success()
    if success is not None:
        return _result(output, plan, Ledger.from_dict(success["ledger"]), 0, clock.read())
    done = target.committed(plan.hash)
    todo = tuple(piece for piece in plan.slices if piece.index not in done)
    attempts, manifest = Attempts(target.store), Manifest()
    on_start(plan, sum(piece.num_rows for piece in plan.slices if piece.index in done), attempts.at_work)
    if todo:
        for receipt in _run(open_store(bundle).uri, target.store.uri, plan, todo, options, carry):
            manifest.add(receipt)
            clock.add(receipt)
            on_slice(receipt)
    for receipt in target.receipts(plan.hash, [piece for piece in plan.slices if piece.index not in manifest]):
        manifest.add(receipt)
    attempts.clear()
    ledger, pace = target.finalize(plan, manifest, options.max_error_rate), clock.read()
    if todo:
        target.note_pace(pace.to_dict())
    return _result(output, plan, ledger, len(todo), pace)


def _result(output: str, plan: Plan, ledger: Ledger, scored_slices: int, pace: Pace) -> ScoreResult:
    told = hints(ledger.rows, ledger.reasons, plan.image_roots)
    return ScoreResult(output, ledger, len(plan.slices), scored_slices, pace, told)


def _run(
    bundle: str, output: str, plan: Plan, todo: Sequence[Slice], options: ScoreConfig, carry: Carry | None
) -> Iterator[Receipt]:
    allowed = max(MAX_DEATHS, len(todo) // 4)
    in_all = allowed + Attempts(open_store(output)).left()
    arguments = (bundle, output, plan.hash, plan.image_roots)
    if scores_here(todo, options):
        with local_pool(todo, arguments, options, carry, allowed) as pool, stoppable(pool.finish):
            yield from while_few_die(pool.receipts(), in_all)
    else:
        with closing(_on_ray(arguments, plan, todo, options, carry, allowed)) as receipts:
            yield from while_few_die(receipts, in_all)


def _on_ray(
    arguments: tuple[Any, ...],
    plan: Plan,
    todo: Sequence[Slice],
    options: ScoreConfig,
    carry: Carry | None,
    max_deaths: int,
) -> Generator[Receipt]:
    # Ray is loaded only where there is work for it: a finished run answers without it.
    from mmray.cluster import RAY_ERRORS, cluster, cpus_for, map_slices, unwrap
    from mmray.score.foreman import foreman_of
    from mmray.score.meters import RunMeters
    from mmray.score.placed import Placed

    with cluster(cpus_for(options)), foreman_of(todo, options) as foreman, stoppable(foreman.finish):
        meters = RunMeters(plan.hash[:8], len(plan.slices), len(plan.slices) - len(todo))
        name, given = f"mmray score {plan.hash[:8]}", (*arguments, carry, foreman.actor)
        slices = map_slices(todo, Placed, given, options, name, max_retries=max_deaths, heard=foreman.received)
        try:
            with closing(slices) as rows:
                for row in rows:
                    meters.slice_done()
                    yield receipt_from_row(row)
            foreman.wait_if_finishing()
        except RAY_ERRORS as error:
            raise unwrap(error, "scoring") from error


def while_few_die(receipts: Iterable[Receipt], allowed: int) -> Iterator[Receipt]:
    """Yields receipts of slices, as long as no more processes have died at them than allowed.

    Raises:
        EnvironmentFaultError: more have.
    """
    deaths = 0
    for receipt in receipts:
        yield receipt
        deaths += receipt.deaths
        if deaths > allowed:
            raise EnvironmentFaultError(
                f"processes died {deaths} times at slices, which is more than rows that kill explain; see their logs; "
                f"{RESUMES}"
            )
