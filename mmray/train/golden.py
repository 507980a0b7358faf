"""Golden rows: a few inputs with the outputs they must get, carried by the bundle.

Whoever loads the bundle rescores them first, so that another torch, another colour order or another tokeniser is found
before row one.
"""

import dataclasses
import itertools

import pyarrow as pa

from mmray.bundle import Bundle
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.slices import Table, cut, read_slice
from mmray.source import ImageSource
from mmray.table import Fault, cells

NUM_ROWS = 8
MAX_SCANNED = 256  # rows looked at to find ones with every modality


def golden_rows(bundle: Bundle, table: Table, image_roots: tuple[str, ...]) -> Bundle:
    """Returns the bundle with golden rows: complete ones from the table, and one without each modality."""
    trained = bundle.config.table
    source = ImageSource(image_roots, bundle.config.image.max_bytes)
    piece = cut(table, MAX_SCANNED)[0]
    columns = {name: getattr(trained, f"{name}_column") for name in trained.modalities}
    rows = read_slice(piece, list(columns.values()))
    predictor = Predictor(bundle, source, ScoreConfig(precision="fp32"))
    found = ({name: cell for name, cell in zip(columns, row, strict=True)} for row in _cells(rows, columns))
    usable = (row for row in (_with_bytes(row, source) for row in found) if _is_complete(row, predictor))
    complete = list(itertools.islice(usable, NUM_ROWS))
    partial = [{**complete[0], name: None} for name in columns] if complete and len(columns) > 1 else []
    golden = complete + partial
    if not golden:
        return bundle
    cases = {name: [row[name] for row in golden] for name in columns}
    outputs = predictor.predict(cases).outputs
    types = {"image": pa.binary(), "text": pa.string()}
    arrays = {name: pa.array(values, types[name]) for name, values in cases.items()}
    return dataclasses.replace(
        bundle, golden=pa.table({**arrays, "outputs": pa.array(outputs.tolist(), pa.list_(pa.float32()))})
    )


def _cells(rows: pa.Table, columns: dict[str, str]) -> "zip[tuple[object, ...]]":
    return zip(*(cells(rows[column]) for column in columns.values()), strict=True)


def _with_bytes(row: dict[str, object], source: ImageSource) -> dict[str, object]:
    if "image" in row:
        data = source.read(row["image"])
        row["image"] = None if isinstance(data, Fault) else data
    return row


def _is_complete(row: dict[str, object], predictor: Predictor) -> bool:
    present = predictor.prepare({name: [cell] for name, cell in row.items()}).present
    return all(bool(mask[0]) for mask in present.values())
