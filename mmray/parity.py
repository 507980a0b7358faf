"""The same rows by every path that scores: the predictor, Ray Data at several batch sizes and actor counts, HTTP.

Reads a bundle and rows of a table -> gives the largest difference of a score per path, and how many rows got another
label, status or reason.
"""

import base64
import json
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from mmray.bundle import load_bundle
from mmray.bundle_info import BundleInfo, read_info
from mmray.cluster import cluster
from mmray.options import COLUMNS, ScoreConfig, column_of
from mmray.predictor import TOLERANCE, Predictor
from mmray.score.job import score_table
from mmray.score.rescore import SAME, distance
from mmray.serve.app import endpoint
from mmray.serve.haproxy import free_port
from mmray.serve.settings import ServeConfig
from mmray.slices import Table, cut, open_table, read_slice
from mmray.source import ImageSource, bytes_or_path
from mmray.table import cells

PLACEMENTS = ((1, 1), (32, 2), (7, 2))  # rows per forward pass, actors
ITEMS = 16  # per request
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Parity:
    """How one path compares with the predictor called directly."""

    path: str
    largest_difference: float
    """Of a score, in the units of the bundle's score range."""
    other_rows: int
    """Rows with another label, status or reason."""

    @property
    def holds(self) -> bool:
        """Whether it is the same within the tolerance of fp32."""
        return self.other_rows == 0 and self.largest_difference <= TOLERANCE["fp32"]


def compare_paths(bundle: str, table_uri: str, options: ScoreConfig, max_rows: int = 500) -> Iterator[Parity]:
    """Scores the first rows of a table by every path, and yields how each compares.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    info = read_info(bundle)
    columns = {name: column_of(name, options, info.config.table) for name in info.config.table.modalities}
    table = open_table(table_uri, list(columns.values()), remedy=COLUMNS)
    roots = table.image_roots(options.image_roots)
    settings = options.model_copy(update={"image_roots": roots, "precision": "fp32"})
    rows = _first_rows(table, max_rows)
    with tempfile.TemporaryDirectory(prefix="mmray-parity-") as folder:
        pq.write_table(rows, f"{folder}/rows.parquet", row_group_size=64)
        want = _predicted(bundle, rows, settings)
        with cluster():
            for batch_size, actors in PLACEMENTS:
                placed = settings.model_copy(
                    update={"batch_size": batch_size, "num_actors": actors, "slice_rows": -(-rows.num_rows // 8)}
                )
                output = f"{folder}/{batch_size}-{actors}"
                score_table(bundle, f"{folder}/rows.parquet", output, placed)
                got = pyarrow.dataset.dataset(f"{output}/data").to_table().to_pylist()
                yield _compare(f"mmray score, batch {batch_size}, {actors} actors", want, got, info)
        yield _compare(f"HTTP, {ITEMS} items a request", want, _asked(bundle, rows, columns, roots), info)


def _first_rows(table: Table, max_rows: int) -> pa.Table:
    parts, left = [], max_rows
    for piece in cut(table, max_rows):
        parts.append(read_slice(piece).slice(0, left))
        left -= parts[-1].num_rows
        if not left:
            break
    return pa.concat_tables(parts, promote_options="default")


def _predicted(bundle: str, rows: pa.Table, options: ScoreConfig) -> Rows:
    loaded = load_bundle(bundle)
    source = ImageSource(options.image_roots, loaded.config.image.max_bytes)
    scored: Rows = Predictor.on_this_worker(loaded, source, options).score(rows).to_pylist()
    return scored


def _asked(bundle: str, rows: pa.Table, columns: dict[str, str], roots: Sequence[str]) -> Rows:
    found = {name: cells(rows[column]) for name, column in columns.items()}
    items = [_item({name: column[k] for name, column in found.items()}) for k in range(rows.num_rows)]
    answers: Rows = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is no matter for a proxy
    with endpoint(bundle, ServeConfig(port=free_port(), image_roots=tuple(roots))) as url:
        for start in range(0, len(items), ITEMS):
            body = json.dumps({"items": items[start : start + ITEMS]}).encode()
            request = urllib.request.Request(f"{url}/v1/score", body, {"Content-Type": "application/json"})
            with opener.open(request) as response:
                answers += json.load(response)["results"]
    return answers


def _item(row: dict[str, Any]) -> dict[str, Any]:
    image = bytes_or_path(row.get("image"))
    item = {} if row.get("text") is None else {"text": row["text"]}
    if isinstance(image, bytes):
        item["image"] = {"base64": base64.b64encode(image).decode()}
    elif image is not None:
        item["image"] = {"path": image}
    return item


def _compare(path: str, want: Rows, got: Rows, info: BundleInfo) -> Parity:
    pairs = list(zip(want, got, strict=True))
    return Parity(
        path=path,
        largest_difference=max((distance(a, b, info.score_range) for a, b in pairs), default=0.0),
        other_rows=sum(any(a.get(name) != b.get(name) for name in SAME) for a, b in pairs),
    )
