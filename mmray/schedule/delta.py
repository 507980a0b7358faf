"""What is published as a Delta table: a log at the root that refers to the files; none is copied or rewritten.

    ROOT/_delta_log/    each registration is one commit of files; the published number is its transaction

Reads the latest published list -> gives the newest version of the table. Its files stay; those of older versions go
with the lists that had them (`keep_last`), as after a VACUUM. Transactions are what the Delta protocol has against
committing twice: https://github.com/delta-io/delta/blob/master/PROTOCOL.md#transaction-identifiers
"""

import json
import re
import time
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, TableFeatures, Transaction
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions

from mmray.errors import ConfigError, EnvironmentFaultError, OutputConflictError
from mmray.schedule.delta_schema import Columns, columns_of, fields, schema_of, widened
from mmray.schedule.published import Published, hold_published, release_before
from mmray.store import LocalStore, Store, as_url, open_store

APPLICATION = "mmray"  # no URI: the log lies in the root that it speaks of, and moves with it
ATTEMPTS = 20  # each but the last is lost to another's commit
# A VACUUM removes whatever the table does not list, as the published lists, unless it is younger than this.
SETTINGS: dict[str, str | None] = {"delta.deletedFileRetentionDuration": "interval 3650 days"}

ZONELESS = "timestamp_ntz"  # the only type here that a table has to announce


@dataclass(frozen=True)
class Registration:
    """What a registration did."""

    outcome: str
    """`registered` or `nothing new`."""
    number: int
    """The published number that the table stands for now."""
    version: int
    """The newest version of the table."""
    added: int = 0
    removed: int = 0
    """Files that came and went with this registration."""
    skipped: int = 0
    """Numbers since the one registered before that never were a version."""

    def lines(self) -> list[str]:
        """Returns what the registration did, for a terminal."""
        text = f"{self.outcome}: version {self.version:,} of the Delta table is number {self.number:,}"
        if self.outcome == "nothing new":
            return [text]
        skipped = f"; {self.skipped:,} numbers before it are skipped" if self.skipped else ""
        return [f"{text}, {self.added:,} files added, {self.removed:,} removed{skipped}"]


def register(root: str) -> Registration:
    """Makes what is published under a root the newest version of the Delta table there, once.

    Raises:
        TableError: nothing is published, or its columns do not make a Delta table.
        ConfigError: deltalake cannot open a folder of this name.
        OutputConflictError: the Delta table there is not of what is published there.
        EnvironmentFaultError: the store failed.
    """
    store, failure = open_store(root), ""
    uri = _table_uri(store)
    for _ in range(ATTEMPTS):
        try:
            table = _open(uri)  # before the list, which is at least as new then
            published = hold_published(store)
            before = table.transaction_version(APPLICATION) if table else 0
            if before is None or before > published.number:
                raise OutputConflictError(f"{store.child('_delta_log')} is not of what is published here; move it away")
            if table and before == published.number:
                done = Registration("nothing new", before, table.version())
            else:
                done = _commit(store, uri, table, published, before)
            release_before(store, done.number)
            return done
        except DeltaError as error:  # as a rule, another was faster
            failure = str(error)
        except (OSError, pa.ArrowException) as error:
            raise _fault(uri, str(error)) from error
    raise _fault(uri, failure)


def _commit(store: Store, uri: str, table: DeltaTable | None, published: Published, before: int) -> Registration:
    """Makes the files of a list those of the table, in one commit; fails if another commits meanwhile."""
    active, there = (_sizes(table), columns_of(table.schema())) if table else ({}, {})
    listed = {part.key: part for part in published.parts}
    new = [part for key, part in listed.items() if key not in active]
    gone = active.keys() - listed.keys()
    carried = len(active) > len(gone)
    columns = widened(there if carried else {}, store, new)
    now, made = int(time.time() * 1000), int(datetime.fromisoformat(published.published_at).timestamp() * 1000)
    adds = [AddAction(p.key, p.size, {}, made, True, json.dumps({"numRecords": p.rows})) for p in new]
    removes = [RemoveAction(key, True, now, active[key], {}) for key in sorted(gone)]
    # Without retries: deltalake would put these changes on top of another's commit, which nobody has looked at.
    number = CommitProperties(max_commit_retries=0, app_transactions=[Transaction(APPLICATION, published.number)])
    if table is None:
        create_table_with_add_actions(uri, schema_of(columns), adds, configuration=SETTINGS, commit_properties=number)
    else:
        _make_room(table, there, columns, carried)
        # "overwrite" sets the schema and removes all files by itself; one that is added again would be in one commit
        # twice, which Delta forbids.
        actions: list[AddAction | RemoveAction] = [*adds, *(removes if carried else ())]
        mode = "append" if carried else "overwrite"
        table.create_write_transaction(actions, mode, schema_of(columns), commit_properties=number)
    version, skipped = (table.version() + 1 if table else 0), published.number - before - 1
    return Registration("registered", published.number, version, len(new), len(gone), skipped)


def _make_room(table: DeltaTable, there: Columns, columns: Columns, carried: bool) -> None:
    """Adds to the schema what the commit of files will not add itself, in a commit of its own that changes no row."""
    once = CommitProperties(max_commit_retries=0)
    if carried and (more := fields(columns, without=there)):
        table.alter.add_columns(more, commit_properties=once)
    elif not carried and ZONELESS in json.dumps(columns) and ZONELESS not in json.dumps(there):
        feature = TableFeatures.TimestampWithoutTimezone
        table.alter.add_feature(feature, allow_protocol_versions_increase=True, commit_properties=once)


def _open(uri: str) -> DeltaTable | None:
    try:
        return DeltaTable(uri)
    except TableNotFoundError:
        return None


def _sizes(table: DeltaTable) -> dict[str, int]:
    """Returns the bytes of a table's files by key."""
    files = pa.table(table.get_add_actions())
    return dict(zip(files["path"].to_pylist(), files["size_bytes"].to_pylist(), strict=True))


def _table_uri(store: Store) -> str:
    """Returns what deltalake finds a folder by.

    Raises:
        ConfigError: it would look for one of another name.
    """
    local = isinstance(store, LocalStore)
    if unquote(store.uri) != store.uri or (local and "\\" in store.uri):
        raise ConfigError(f"deltalake takes a sign in {store.uri!r} for an escape; give the folder another name")
    return store.uri if local else as_url(store.uri)


def _fault(uri: str, cause: str) -> EnvironmentFaultError:
    line = " ".join(re.sub("\x1b\\[\\d*m|↳", "", cause).split())[:300]  # a tree of causes, in colour
    return EnvironmentFaultError(f"cannot register in {uri}: {line}; check the store and credentials, then run again")
