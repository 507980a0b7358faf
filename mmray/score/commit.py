"""How scored slices become visible exactly once: create-if-absent, and nothing else.

    OUTPUT/_mmray/run.json                      which run the folder belongs to
    OUTPUT/_mmray/plan-<hash8>.parquet          its slices
    OUTPUT/data/part-<slice>-<hash8>.parquet    one scored slice: its creation is its commit
    OUTPUT/_mmray/attempts/                     slices that are being scored, or that a process died at
    OUTPUT/_mmray/manifest-<sha8>.parquet       every slice with its size and ledger
    OUTPUT/_SUCCESS                             the run is complete: the manifest's sha256 and the totals
    OUTPUT/_mmray/pace.json                     how fast the call was that completed it, for the report; may be missing

Every object is created whole under a name that only this plan can give, and never overwritten. So any number of
retries, twins and revenants converge on the first file of each slice, and a reader of `data/*.parquet` is right at any
moment.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import EnvironmentFaultError, ErrorBudgetError, OutputConflictError
from mmray.parquet import to_parquet
from mmray.score.ledger import Ledger
from mmray.score.plan import Plan
from mmray.slices import Slice
from mmray.store import open_parent, open_store

METADATA_KEY = b"mmray"
RUN, SUCCESS, PACE = "_mmray/run.json", "_SUCCESS", "_mmray/pace.json"
_PART = re.compile(r"data/part-(\d{9})-([0-9a-f]{8})\.parquet")
RECEIPT = pa.schema(
    {
        "slice": pa.int64(),
        "key": pa.string(),
        "size": pa.int64(),
        "deaths": pa.int64(),
        "ledger": pa.string(),
        "seconds": pa.string(),
        "took_s": pa.float64(),
        "process": pa.string(),
    }
)
READS = 32  # footers at a time: a store takes its time for each
READ_AHEAD = 1024  # of them at most wait to be taken


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a committed slice holds, as its own footer says."""

    slice: int
    key: str
    size: int
    """Bytes of the file."""
    ledger: Ledger
    created: bool = False
    """Whether this call wrote it; otherwise it was there."""
    deaths: int = 0
    """Processes that had died at it."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> seconds that its process spent there since the receipt before."""
    took_s: float | None = None
    """From its begin to its commit; None where it was there."""
    process: str | None = None
    """Who scored it; None where it was there."""


def _packed(ledger: Ledger) -> str:
    return json.dumps(ledger.to_dict())


@dataclass
class Manifest:
    """Every slice with its size and ledger, and the sum. It keeps of each no more than it writes: there may be many."""

    total: Ledger = field(default_factory=Ledger)
    _rows: dict[int, tuple[str, int, int, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, receipts: Iterable[Receipt]) -> "Manifest":
        """Lists what some receipts say."""
        manifest = cls()
        for receipt in receipts:
            manifest.add(receipt)
        return manifest

    def add(self, receipt: Receipt) -> None:
        """Lists a slice."""
        assert receipt.slice not in self._rows, "each slice once"
        ledger = receipt.ledger
        self._rows[receipt.slice] = receipt.key, receipt.size, ledger.rows, _packed(ledger)
        self.total = Ledger.total([self.total, ledger])

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    @property
    def slices(self) -> list[int]:
        """The slices listed, in order."""
        return sorted(self._rows)

    def to_parquet(self) -> bytes:
        """Returns it as a parquet file, in order of the slices."""
        slices = self.slices
        keys, sizes, rows, ledgers = zip(*(self._rows[k] for k in slices), strict=True)
        columns = {"slice": slices, "key": keys, "size": sizes, "rows": rows, "ledger": ledgers}
        return to_parquet(pa.table(columns))


def note_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Returns what a slice's file says of itself, of the metadata of its footer or schema."""
    note: dict[str, Any] = json.loads((metadata or {}).get(METADATA_KEY, b"{}"))
    return note


def part_key(plan_hash: str, index: int) -> str:
    """Returns the name of a slice's file."""
    return f"data/part-{index:09d}-{plan_hash[:8]}.parquet"


class Output:
    """An output folder or URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.store = open_store(uri)

    def claim(self, plan: Plan, description: dict[str, Any]) -> None:
        """Takes the folder for a plan, or recognises it as taken by the same plan before.

        Raises:
            OutputConflictError: it belongs to another plan, or holds other files.
        """
        owner = self.owner()
        if owner is None and self.store.list("data"):
            owner = self.owner()  # now and not before: another driver of this run may have begun in between
            if owner is None:
                raise OutputConflictError(f"{self.uri} has data that mmray did not write; give an empty folder")
        if owner is None and not self.store.create(RUN, json.dumps(description, indent=1).encode()):
            owner = self.owner()
        if owner is not None and owner["plan_hash"] != plan.hash:
            raise OutputConflictError(
                f"{self.uri} belongs to another run ({_difference(owner, description)}); give another output folder"
            )
        self.store.create(f"_mmray/plan-{plan.hash[:8]}.parquet", plan.to_parquet())

    def owner(self) -> dict[str, Any] | None:
        """Returns `run.json`, or None in a folder that no run has taken."""
        try:
            owner: dict[str, Any] = json.loads(self.store.read(RUN))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return owner

    def success(self) -> dict[str, Any] | None:
        """Returns `_SUCCESS`, or None where the run is not complete."""
        try:
            success: dict[str, Any] = json.loads(self.store.read(SUCCESS))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return success

    def note_pace(self, pace: Mapping[str, object]) -> None:
        """Keeps how fast a run was, unless another call has."""
        with suppress(EnvironmentFaultError):  # the run is complete without
            self.store.create(PACE, json.dumps(pace).encode())

    def pace(self) -> dict[str, Any] | None:
        """Returns what `note_pace` kept, if it did."""
        try:
            pace: dict[str, Any] = json.loads(self.store.read(PACE))
        except (FileNotFoundError, EnvironmentFaultError, ValueError):
            return None
        return pace

    def committed(self, plan_hash: str) -> set[int]:
        """Returns the slices that are there, by one listing."""
        matches = (_PART.fullmatch(key) for key in self.store.list("data"))
        return {int(m[1]) for m in matches if m and m[2] == plan_hash[:8]}

    def commit(
        self, plan_hash: str, piece: Slice, scored: pa.Table, ledger: Ledger, provenance: dict[str, Any]
    ) -> Receipt:
        """Writes a scored slice, all of it or nothing; where it is there already, that file counts.

        Raises:
            OutputConflictError: the name is taken by a file of another plan.
            EnvironmentFaultError: the store failed.
        """
        assert scored.num_rows == piece.num_rows == ledger.rows, "n rows in = n rows out"
        note = {"plan_hash": plan_hash, "slice": piece.index, "ledger": ledger.to_dict(), **provenance}
        metadata = {**(scored.schema.metadata or {}), METADATA_KEY: json.dumps(note).encode()}
        noted = scored.replace_schema_metadata(metadata)
        data = to_parquet(noted, compression="zstd", write_page_checksum=True)
        key = part_key(plan_hash, piece.index)
        if self.store.create(key, data):
            return Receipt(piece.index, key, len(data), ledger, created=True)
        return self.receipt(plan_hash, piece)

    def receipt(self, plan_hash: str, piece: Slice) -> Receipt:
        """Reads the receipt of a committed slice from its footer.

        Raises:
            OutputConflictError: the file is not this slice of this plan.
            EnvironmentFaultError: it cannot be read.
        """
        key = part_key(plan_hash, piece.index)
        try:
            with self.store.open(key) as source:
                footer, size = pq.read_metadata(source), source.seek(0, io.SEEK_END)
            note, rows = note_of(footer.metadata), footer.num_rows
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None):  # of the operating system, not of who understands parquet
                raise EnvironmentFaultError(f"cannot read {self.store.child(key)}: {error}; run again") from error
            raise OutputConflictError(f"{self.store.child(key)} is not a file that mmray wrote: {error}") from None
        if (note.get("plan_hash"), note.get("slice"), rows) != (plan_hash, piece.index, piece.num_rows):
            raise OutputConflictError(f"{self.store.child(key)} does not hold slice {piece.index} of this run")
        return Receipt(piece.index, key, size, Ledger.from_dict(note["ledger"]))

    def found(self, plan_hash: str, piece: Slice) -> Receipt | None:
        """Returns the receipt of a slice if it is committed; raises as `receipt` does."""
        there = self.store.stat(part_key(plan_hash, piece.index)) is not None
        return self.receipt(plan_hash, piece) if there else None

    def receipts(self, plan_hash: str, slices: Sequence[Slice]) -> Iterator[Receipt]:
        """Yields the receipts of committed slices in their order, several read at a time; raises as `receipt` does."""
        with ThreadPoolExecutor(READS) as pool:
            for k in range(0, len(slices), READ_AHEAD):
                yield from pool.map(partial(self.receipt, plan_hash), slices[k : k + READ_AHEAD])

    def finalize(self, plan: Plan, manifest: Manifest, max_error_rate: float) -> Ledger:
        """Checks that every slice is there once and the rows add up, then creates the manifest and `_SUCCESS`.

        Raises:
            ErrorBudgetError: more rows failed than allowed; the data stays, `_SUCCESS` is withheld.
            EnvironmentFaultError: the input changed since the plan was made.
        """
        assert manifest.slices == [s.index for s in plan.slices], "each slice once"
        total = manifest.total
        assert total.rows == plan.num_rows, "every row is accounted for"
        _check_inputs(plan)
        failed = total.count("failed") / total.rows
        if failed > max_error_rate:
            raise ErrorBudgetError(
                f"{total.count('failed'):,} of {total.rows:,} rows failed ({failed:.2%} > {max_error_rate:.2%}); "
                f"`mmray errors {self.uri}` lists them, --max-error-rate accepts them; the scored data is kept"
            )
        listed = manifest.to_parquet()
        digest = hashlib.sha256(listed).hexdigest()
        self.store.create(f"_mmray/manifest-{digest[:8]}.parquet", listed)
        success = {
            "manifest": digest,
            "plan_hash": plan.hash,
            "fingerprint": plan.info.fingerprint,
            "rows": total.rows,
            "slices": len(plan.slices),
            "ledger": total.to_dict(),
        }
        self.store.create(SUCCESS, json.dumps(success, indent=1).encode())
        return total


def _check_inputs(plan: Plan) -> None:
    for uri, size, version, _ in plan.identity["files"]:
        parent, name = open_parent(uri)
        entry = parent.stat(name)
        if entry is None or (entry.size, entry.version) != (size, version):
            raise EnvironmentFaultError(
                f"the input {uri} changed while it was being scored; restore it, or start again in a new output"
            )


def _difference(owner: dict[str, Any], ours: dict[str, Any]) -> str:
    names = {"fingerprint": "another model", "options": "other options", "slices": "other slices"}
    theirs, mine = owner.get("identity", {}), ours["identity"]
    found = [text for key, text in names.items() if theirs.get(key) != mine.get(key)]
    if owner.get("table") != ours["table"]:
        found.append("another table")
    return ", ".join(found) or "the table's files changed"


def receipts_to_arrow(receipts: Iterable[Receipt]) -> pa.Table:
    """Returns receipts as rows that Ray Data can carry."""
    rows = [
        {
            **{name: getattr(r, name) for name in RECEIPT.names},
            "ledger": _packed(r.ledger),
            "seconds": json.dumps(dict(r.seconds)),
        }
        for r in receipts
    ]
    return pa.Table.from_pylist(rows, RECEIPT)


def receipt_from_row(row: dict[str, Any]) -> Receipt:
    """Reads what `receipts_to_arrow` wrote."""
    read = {name: json.loads(row[name]) for name in ("ledger", "seconds")}
    known = {name: row[name] for name in RECEIPT.names if name not in read}
    return Receipt(**known, ledger=Ledger.from_dict(read["ledger"]), seconds=read["seconds"])
