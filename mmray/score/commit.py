"""How scored slices become visible exactly once: create-if-absent, and nothing else.

    OUTPUT/_mmray/run.json                      which run the folder belongs to
    OUTPUT/_mmray/plan-<hash8>.parquet          its slices
    OUTPUT/data/part-<slice>-<hash8>.parquet    one scored slice: its creation is its commit
    OUTPUT/_mmray/attempts/                     slices that are being scored, or that a process died at
    OUTPUT/_mmray/manifest-<sha8>.parquet       every slice with its size and ledger
    OUTPUT/_SUCCESS                             the run is complete: the manifest's sha256 and the totals

Every object is created whole under a name that only this plan can give, and never overwritten. So any number of
retries, twins and revenants converge on the first file of each slice, and a reader of `data/*.parquet` is right at any
moment.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import EnvironmentFaultError, ErrorBudgetError, OutputConflictError
from mmray.score.ledger import Ledger
from mmray.score.plan import Plan
from mmray.slices import Slice
from mmray.store import open_parent, open_store

METADATA_KEY = b"mmray"
RUN, SUCCESS = "_mmray/run.json", "_SUCCESS"
_PART = re.compile(r"data/part-(\d{9})-([0-9a-f]{8})\.parquet")


@dataclass(frozen=True)
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
        buffer = io.BytesIO()
        pq.write_table(scored.replace_schema_metadata(metadata), buffer, compression="zstd", write_page_checksum=True)
        key = part_key(plan_hash, piece.index)
        if self.store.create(key, buffer.getvalue()):
            return Receipt(piece.index, key, buffer.tell(), ledger, created=True)
        return self.receipt(plan_hash, piece)

    def receipt(self, plan_hash: str, piece: Slice) -> Receipt:
        """Reads the receipt of a committed slice from its footer.

        Raises:
            OutputConflictError: the file is not this slice of this plan.
            EnvironmentFaultError: it cannot be read.
        """
        key = part_key(plan_hash, piece.index)
        try:
            entry = self.store.stat(key)
            with self.store.open(key) as source, pq.ParquetFile(source) as file:
                note = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
                rows = file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None):  # of the operating system, not of who understands parquet
                raise EnvironmentFaultError(f"cannot read {self.store.child(key)}: {error}; run again") from error
            raise OutputConflictError(f"{self.store.child(key)} is not a file that mmray wrote: {error}") from None
        if entry is None or (note.get("plan_hash"), note.get("slice"), rows) != (
            plan_hash,
            piece.index,
            piece.num_rows,
        ):
            raise OutputConflictError(f"{self.store.child(key)} does not hold slice {piece.index} of this run")
        return Receipt(piece.index, key, entry.size, Ledger.from_dict(note["ledger"]))

    def finalize(self, plan: Plan, receipts: list[Receipt], max_error_rate: float) -> Ledger:
        """Checks that every slice is there once and the rows add up, then creates the manifest and `_SUCCESS`.

        Raises:
            ErrorBudgetError: more rows failed than allowed; the data stays, `_SUCCESS` is withheld.
            EnvironmentFaultError: the input changed since the plan was made.
        """
        receipts = sorted(receipts, key=lambda receipt: receipt.slice)
        assert [r.slice for r in receipts] == [s.index for s in plan.slices], "each slice once"
        total = Ledger.total(receipt.ledger for receipt in receipts)
        assert total.rows == plan.num_rows, "every row is accounted for"
        _check_inputs(plan)
        failed = total.count("failed") / total.rows
        if failed > max_error_rate:
            raise ErrorBudgetError(
                f"{total.count('failed'):,} of {total.rows:,} rows failed ({failed:.2%} > {max_error_rate:.2%}); "
                f"`mmray errors {self.uri}` lists them, --max-error-rate accepts them; the scored data is kept"
            )
        manifest = _manifest(receipts)
        digest = hashlib.sha256(manifest).hexdigest()
        self.store.create(f"_mmray/manifest-{digest[:8]}.parquet", manifest)
        success = {
            "manifest": digest,
            "plan_hash": plan.hash,
            "fingerprint": plan.info.fingerprint,
            "rows": total.rows,
            "slices": len(receipts),
            "ledger": total.to_dict(),
        }
        self.store.create(SUCCESS, json.dumps(success, indent=1).encode())
        return total


def _manifest(receipts: list[Receipt]) -> bytes:
    rows = [
        {
            "slice": r.slice,
            "key": r.key,
            "size": r.size,
            "rows": r.ledger.rows,
            "ledger": json.dumps(r.ledger.to_dict()),
        }
        for r in receipts
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


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
