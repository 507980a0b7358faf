"""The proof that an output holds what its input promises.

Level 0, seconds: `_SUCCESS` names a manifest that is intact, and the files there are exactly those it lists.
Level 1: every file's footer carries this plan, its slice, and as many rows as the plan says.
Level 2: every input column stands in the output, row by row and in order; statuses, scores and counts agree.
Level 3: random rows get the same scores again, from the bundle that the run names, whose golden rows are scored first.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmray.errors import MmrayError, VerifyError
from mmray.parquet import from_parquet
from mmray.score.commit import Output, part_key
from mmray.score.ledger import Ledger
from mmray.slices import Slice, read_slice, slices_from_arrow
from mmray.table import Status, cells

LEVELS = (0, 1, 2, 3)
SAMPLE = 256  # rows scored again; each may cost the reading of a slice
MAX_NAMED = 5  # mismatches named per check; the count says how many there are
THREADS = 4


@dataclass
class VerifyReport:
    """What was checked, and what does not hold."""

    output: str
    level: int
    rows: int = 0
    slices: int = 0
    checks: dict[str, int] = field(default_factory=dict)
    """Check -> how often it was made."""
    mismatches: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return not self.mismatches


def verify_output(
    output: str,
    level: int = 1,
    *,
    sample: int = SAMPLE,
    seed: int = 0,
    bundle: str | None = None,
    on_start: Callable[[int], None] = lambda rows: None,
    on_slice: Callable[[int], None] = lambda rows: None,
) -> VerifyReport:
    """Checks an output folder.

    Args:
        output: folder or URI of a finished run.
        level: 0, 1, 2 or 3; each includes those before it.
        sample: rows that level 3 scores again, drawn at random.
        seed: which ones; the same seed draws the same rows.
        bundle: folder or URI of the bundle for it, if it is no longer where the run had it.
        on_start: called with the rows there are, before slices are checked (from level 1).
        on_slice: called with the rows of each slice as it has been checked (from level 1).

    Raises:
        VerifyError: there is no finished run to check.
        BundleError: the bundle for level 3 is damaged, or not the one that the rows were scored with.
    """
    target = Output(output)
    owner, success = target.owner(), target.success()
    if owner is None:
        raise VerifyError(f"{output!r} is not an output of mmray score: it has no _mmray/run.json")
    report = VerifyReport(output, level)
    if success is None:
        done, planned = len(target.committed(owner["plan_hash"])), owner["num_slices"]
        report.mismatches.append(
            f"the run is not finished: {done} of {planned} slices are there and no _SUCCESS; run the same command again"
        )
        return report
    report.rows, report.slices = success["rows"], success["slices"]
    try:
        slices = _plan_slices(target, owner["plan_hash"])
        _collect(report, "manifest", _check_manifest(target, success, slices))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        report.mismatches.append(f"the plan or the manifest is missing or damaged: {str(error).splitlines()[0]}")
        return report
    if level >= 1:
        check = _check_footer if level == 1 else _check_rows
        on_start(report.rows)
        with ThreadPoolExecutor(THREADS) as pool:
            results = pool.map(lambda piece: (piece, list(check(target, owner["plan_hash"], piece))), slices)
            for piece, found in results:
                _collect(report, "slice footers" if level == 1 else "slices row by row", found)
                on_slice(piece.num_rows)
    if level >= 3 and report.passed:
        _rescore(report, target, slices, bundle or owner["bundle"], owner, (sample, seed))
    return report


def _rescore(
    report: VerifyReport,
    target: Output,
    slices: list[Slice],
    bundle: str,
    owner: dict[str, Any],
    drawn: tuple[int, int],
) -> None:
    from mmray.score.rescore import differences, rescorer, sample_rows  # seconds to load, which only this level needs

    predictor, compared, found = rescorer(bundle, owner), 0, list[str]()
    for k, some in sample_rows(slices, *drawn).items():
        number, different = differences(target, owner["plan_hash"], slices[k], some, predictor)
        compared, found = compared + number, found + different
    report.checks["rows scored again"] = compared
    report.mismatches += _few("rows get other scores now", found, "; ")


def _collect(report: VerifyReport, check: str, found: Iterable[str]) -> None:
    report.checks[check] = report.checks.get(check, 0) + 1
    report.mismatches.extend(found)


def _plan_slices(target: Output, plan_hash: str) -> list[Slice]:
    data = target.store.read(f"_mmray/plan-{plan_hash[:8]}.parquet")
    return slices_from_arrow(from_parquet(data))


def _check_manifest(target: Output, success: dict[str, object], slices: list[Slice]) -> Iterator[str]:
    digest = str(success["manifest"])
    data = target.store.read(f"_mmray/manifest-{digest[:8]}.parquet")
    if hashlib.sha256(data).hexdigest() != digest:
        yield "the manifest does not have the sha256 that _SUCCESS gives"
        return
    manifest = from_parquet(data).to_pylist()
    listed, there = {row["key"]: row["size"] for row in manifest}, target.store.list("data")
    yield from _few("files missing", [key for key in listed if key not in there])
    yield from _few("files not in the manifest", [key for key in there if key not in listed])
    yield from _few("files of another size", [k for k, size in listed.items() if k in there and there[k].size != size])
    if [row["slice"] for row in manifest] != [piece.index for piece in slices]:
        yield "the manifest does not list each slice of the plan once"
    if not sum(row["rows"] for row in manifest) == success["rows"] == sum(piece.num_rows for piece in slices):
        yield "the rows of manifest, plan and _SUCCESS do not add up"
    total = Ledger.total(Ledger.from_dict(json.loads(row["ledger"])) for row in manifest)
    if total.to_dict() != Ledger.from_dict(dict(success["ledger"])).to_dict():  # type: ignore[call-overload]
        yield "the counts of the slices do not add up to those of _SUCCESS"


def _check_footer(target: Output, plan_hash: str, piece: Slice) -> Iterator[str]:
    try:
        receipt = target.receipt(plan_hash, piece)
        if receipt.ledger.rows != piece.num_rows:
            yield f"slice {piece.index}: its footer counts {receipt.ledger.rows} rows, the plan {piece.num_rows}"
    except MmrayError as error:
        yield f"slice {piece.index}: {error}"


def _check_rows(target: Output, plan_hash: str, piece: Slice) -> Iterator[str]:
    yield from _check_footer(target, plan_hash, piece)
    try:
        with target.store.open(part_key(plan_hash, piece.index)) as source:
            scored = pq.read_table(source, use_threads=False, page_checksum_verification=True)
        rows = read_slice(piece)
    except (OSError, pa.ArrowException, MmrayError) as error:
        yield f"slice {piece.index}: {error}"
        return
    if scored.num_rows != rows.num_rows:
        yield f"slice {piece.index}: {rows.num_rows} rows in, {scored.num_rows} rows out"
        return
    for name in rows.schema.names:
        if name not in scored.schema.names or not _same(rows[name], scored[name]):
            yield f"slice {piece.index}: the column {name!r} is not what the input holds, in its order"
    known = pc.is_in(scored["status"], pa.array([status.value for status in Status]))
    failed = pc.equal(scored["status"], Status.FAILED.value)
    if not pc.all(known).as_py() or not failed.equals(scored["score"].is_null()):
        yield f"slice {piece.index}: a row has neither a score nor a failure, or both"


def _same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    # NaN is not equal to itself; its text is.
    return left.equals(right) or (
        left.type == right.type and list(map(repr, cells(left))) == list(map(repr, cells(right)))
    )


def _few(what: str, named: list[str], separator: str = ", ") -> Iterator[str]:
    if named:
        more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        yield f"{len(named)} {what}: {separator.join(named[:MAX_NAMED])}{more}"
