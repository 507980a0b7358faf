"""What a run will do, decided before it starts: the slices, and a hash that names the run.

Reads the bundle's `bundle.json` and the table's footers -> gives a plan. The same table, model and options always give
the same plan; anything that would change a number or a row gives another, and another plan may not share an output.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmray import __version__
from mmray.bundle_info import BundleInfo, read_info
from mmray.options import COLUMNS, ScoreConfig, column_of
from mmray.parquet import to_parquet
from mmray.slices import Slice, cut, open_table, slices_to_arrow
from mmray.store import open_store
from mmray.table import SCHEMA_VERSION, output_fields, refuse_collisions, require_types


@dataclass(frozen=True)
class Plan:
    """A table cut into slices, and who scores them."""

    slices: tuple[Slice, ...]
    identity: dict[str, Any]
    """Everything that the result depends on."""
    info: BundleInfo

    @property
    def hash(self) -> str:
        """sha256 over the identity: the name of the run."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return sum(piece.num_rows for piece in self.slices)

    @property
    def image_roots(self) -> tuple[str, ...]:
        """Folders and URIs that images may be read from."""
        return tuple(self.identity["options"]["image_roots"])

    def to_parquet(self) -> bytes:
        """Returns the slices as a parquet file."""
        return to_parquet(slices_to_arrow(self.slices))


def make_plan(bundle_uri: str, table_uri: str, options: ScoreConfig, only: Collection[str] | None = None) -> Plan:
    """Plans the scoring of a table, or of some of its files.

    Raises:
        BundleError, TableError: the bundle or the table cannot be used.
    """
    info = read_info(bundle_uri)
    trained = info.config.table
    columns = {name: column_of(name, options, trained) for name in trained.modalities}
    fields = output_fields(info.config.task.kind, probabilities=options.probabilities, modalities=trained.modalities)

    def check(schema: pa.Schema, where: str) -> None:
        require_types(schema, columns, where)
        refuse_collisions(schema, fields, where)

    table = open_table(table_uri, list(columns.values()), check, only, COLUMNS)
    slices = tuple(cut(table, options.slice_rows))
    identity = {
        "fingerprint": info.fingerprint,
        "files": [[file.uri, file.size, file.version, file.num_rows] for file in table.files],
        "slices": hashlib.sha256(json.dumps([[s.first_row, s.num_rows] for s in slices]).encode()).hexdigest(),
        "options": {
            **options.numeric_options(),
            "columns": columns,
            "image_roots": list(table.image_roots(options.image_roots)),  # as JSON gives it back
        },
        "schema_version": SCHEMA_VERSION,
    }
    return Plan(slices, identity, info)


def describe(plan: Plan, bundle_uri: str, table_uri: str) -> dict[str, Any]:
    """Returns what `run.json` keeps: the identity of a run, for people and for `verify`."""
    return {
        "plan_hash": plan.hash,
        "bundle": open_store(bundle_uri).uri,
        "table": open_store(table_uri).uri,
        "num_rows": plan.num_rows,
        "num_slices": len(plan.slices),
        "mmray_version": __version__,
        "identity": {key: value for key, value in plan.identity.items() if key != "files"},
    }
