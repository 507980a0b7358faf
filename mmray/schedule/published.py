"""What is published under a root: numbered lists of scored files, each created once and whole; the highest counts.

    ROOT/published/<number>.parquet            one row per scored file; the totals in its metadata
    ROOT/registered/<number>.parquet           a copy of the list that a Delta table stands for: its runs stay
    ROOT/runs/<number>-<hash8>/data/*.parquet  the files: outputs of `mmray score`, each verifiable on its own

A reader takes the highest number, and has a complete table. Two writers of one number: the store lets one of them win.
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from mmray.errors import TableError
from mmray.parquet import from_parquet, to_parquet
from mmray.score.commit import METADATA_KEY
from mmray.score.ledger import Ledger
from mmray.store import Entry, Store, open_store

FOLDER, REGISTERED, RUNS = "published", "registered", "runs"


@dataclass(frozen=True)
class Part:
    """One scored file: consecutive rows of one input file."""

    input: str
    """URI of the input file."""
    first_row: int
    rows: int
    key: str
    """The scored file, relative to the root."""
    size: int
    """Bytes of the scored file."""
    ledger: Ledger

    @property
    def run(self) -> str:
        """The folder of the run that scored it, relative to the root."""
        return "/".join(self.key.split("/")[:2])


@dataclass(frozen=True)
class Published:
    """A complete scored table."""

    number: int
    identity: dict[str, Any]
    """Model and options that every row was scored with."""
    table: str
    """URI of the input."""
    published_at: str
    """UTC, for people: nothing depends on it."""
    inputs: dict[str, Entry]
    """Every file of the input by URI, also those without rows, as it was when it was scored."""
    parts: tuple[Part, ...]

    @property
    def ledger(self) -> Ledger:
        """The account of all rows."""
        return Ledger.total(part.ledger for part in self.parts)

    @property
    def runs(self) -> set[str]:
        """The runs whose files it lists."""
        return {part.run for part in self.parts}

    def files(self, root: str) -> list[str]:
        """Returns the URIs of the scored files, in the order of the input."""
        store = open_store(root)
        return [store.child(part.key) for part in self.parts]

    def to_parquet(self) -> bytes:
        """Returns it as a parquet file."""
        header = {key: value for key, value in vars(self).items() if key != "parts"}
        rows = [{**asdict(part), "ledger": json.dumps(part.ledger.to_dict())} for part in self.parts]
        metadata = {METADATA_KEY: json.dumps(header).encode()}
        return to_parquet(pa.Table.from_pylist(rows).replace_schema_metadata(metadata))

    @classmethod
    def from_parquet(cls, data: bytes) -> "Published":
        """Reads what `to_parquet` wrote."""
        table = from_parquet(data)
        rows = [{**row, "ledger": Ledger.from_dict(json.loads(row["ledger"]))} for row in table.to_pylist()]
        header = json.loads(table.schema.metadata[METADATA_KEY])
        header["inputs"] = {uri: Entry(*entry) for uri, entry in header["inputs"].items()}
        return cls(**header, parts=tuple(Part(**row) for row in rows))


def pointer(number: int, folder: str = FOLDER) -> str:
    """Returns the key of a number's list."""
    return f"{folder}/{number:09d}.parquet"


def numbers(store: Store, folder: str = FOLDER) -> list[int]:
    """Returns the numbers whose lists are in a folder, in order."""
    matches = (re.fullmatch(rf"{folder}/(\d{{9}})\.parquet", key) for key in store.list(folder))
    return sorted(int(match[1]) for match in matches if match)


def latest(store: Store) -> Published | None:
    """Returns what is published now, or None before the first time."""
    while found := numbers(store):
        if (published := _read(store, pointer(found[-1]))) is not None:
            return published  # else a tick that keeps few has published the next ones meanwhile
    return None


def _read(store: Store, key: str) -> Published | None:
    try:
        return Published.from_parquet(store.read(key))
    except FileNotFoundError:
        return None


def read_published(root: str) -> Published:
    """Returns what is published under a root.

    Raises:
        TableError: nothing is.
    """
    return _published(open_store(root))


def _published(store: Store) -> Published:
    found = latest(store)
    if found is None:
        raise TableError(f"nothing is published under {store.uri!r}; `mmray tick` publishes")
    return found


def hold_published(store: Store) -> Published:
    """Returns what is published, and makes its runs stay until `release_before` a later number.

    Raises:
        TableError: nothing is.
    """
    while True:
        published = _published(store)
        store.create(pointer(published.number, REGISTERED), published.to_parquet())
        # Who removes the list from now on sees the copy: `keep_last` looks for copies after it has removed lists.
        if store.stat(pointer(published.number)) is not None:
            return published


def release_before(store: Store, number: int) -> None:
    """Lets go of the runs that `hold_published` made stay for smaller numbers."""
    for held in numbers(store, REGISTERED):
        if held < number:
            store.delete(pointer(held, REGISTERED))


def keep_last(store: Store, keep: int) -> int:
    """Removes all but the last lists, and the runs that none of them needs; returns how many runs.

    Runs of numbers that are not published yet stay: somebody may be at work there. So do those that are held.
    """
    found = numbers(store)
    for number in found[:-keep]:
        store.delete(pointer(number))
    kept = [Published.from_parquet(store.read(pointer(number))) for number in found[-keep:]]
    held = [_read(store, pointer(number, REGISTERED)) for number in numbers(store, REGISTERED)]  # or let go meanwhile
    needed = set[str]().union(*(published.runs for published in [*kept, *held] if published is not None))
    removed = set[str]()
    for key in store.list(RUNS):
        run = "/".join(key.split("/")[:2])
        if run not in needed and run < f"{RUNS}/{found[-1] + 1:09d}":
            store.delete(key)
            removed.add(run)
    return len(removed)
