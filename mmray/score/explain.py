"""One scored row once more, stage by stage: what was read, what the model sees of it, what each modality says.

Reads an output and the name of a row, as `mmray errors` prints it -> gives lines of a stage and what came of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.errors import EnvironmentFaultError, TableError
from mmray.predictor import Predictor
from mmray.preprocess.header import read_header
from mmray.preprocess.image import decode_image, thumbnail
from mmray.preprocess.text import tokenize
from mmray.score.commit import Output
from mmray.score.rescore import LEFT_ALONE, rescorer
from mmray.source import ImageSource, bytes_or_path
from mmray.table import Fault, cells

SHOWN = 200  # characters of a cell
Line = tuple[str, str]


def explain_row(output: str, name: str, bundle: str | None = None, picture: str | None = None) -> Iterator[Line]:
    """Yields what each stage makes of a row.

    Args:
        output: scored folder, finished or not.
        name: FILE:ROW, the file of the output and the row's place in it.
        bundle: where the bundle is now; by default where the run had it.
        picture: file for the image as the model sees it, as a JPEG.

    Raises:
        EnvironmentFaultError: the picture cannot be written.
        TableError: there is no such output or row.
        BundleError: the bundle is damaged or of another model.
    """
    owner = Output(output).owner()
    if owner is None:
        raise TableError(f"no scored rows in {output!r}; give the output folder of mmray score")
    row = _row(output, name)
    stored = row.to_pylist()[0]
    yield "stored", _result(stored)
    if stored["reason"] in LEFT_ALONE:
        yield "again", "not tried: this row killed a process, or its image could not be read"
        return
    predictor = rescorer(bundle or owner["bundle"], owner)
    columns = {modality: cells(row[predictor.column(modality)]) for modality in predictor.modalities}
    if "image" in columns:
        yield from _image(columns["image"][0], predictor, picture)
    if "text" in columns:
        yield from _text(columns["text"][0], predictor)
    yield "again", _result(_predicted(predictor, columns))
    for modality in columns if len(columns) > 1 else ():
        only = {other: column if other == modality else [None] for other, column in columns.items()}
        yield f"{modality} alone", _score(_predicted(predictor, only))


def _row(output: str, name: str) -> pa.Table:
    key, _, number = name.rpartition(":")
    store = Output(output).store
    try:
        with store.open(key) as source:
            table = pq.read_table(source, use_threads=False)
    except (OSError, pa.ArrowException):
        raise TableError(f"no row {name!r} in {output}; name a row as `mmray errors` does: FILE:ROW") from None
    if not (number.isdecimal() and int(number) < table.num_rows):
        raise TableError(f"no row {number!r} in {key}, which has {table.num_rows:,}; they count from 0")
    return table.slice(int(number), 1)


def _image(cell: Any, predictor: Predictor, picture: str | None) -> Iterator[Line]:
    config, cell = predictor.bundle.config.image, bytes_or_path(cell)
    yield "image cell", f"{len(cell):,} bytes" if isinstance(cell, bytes) else _short(cell)
    data = ImageSource(predictor.options.image_roots, config.max_bytes).read(cell)
    if isinstance(data, Fault):
        yield "image read", _why(data)
        return
    header = read_header(data)
    size = f", {header.format} of {header.width} x {header.height} pixels" if header else ", of no known format"
    yield "image read", f"{len(data):,} bytes{size}"
    pixels = decode_image(data, config)
    sees = _why(pixels) if isinstance(pixels, Fault) else f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
    yield "model sees", sees
    if picture is not None and not isinstance(pixels, Fault):
        try:
            Path(picture).write_bytes(thumbnail(pixels, len(pixels)))
        except OSError as error:
            raise EnvironmentFaultError(f"cannot write {picture}: {error.strerror}; name another file") from error
        yield "picture", picture


def _text(text: str | None, predictor: Predictor) -> Iterator[Line]:
    yield "text cell", _short(text)
    vocabulary, config = predictor.bundle.vocabulary, predictor.bundle.config.text
    if text is None or vocabulary is None:
        return
    known = set(vocabulary.words)
    tokens = tokenize(text, config)
    marked = [token if token in known else f"[{token}]" for token in tokens]
    unknown = sum(token not in known for token in tokens)
    yield "model sees", f"{_printable(' '.join(marked))}  ({len(tokens)} tokens, {unknown} unknown in brackets)"


def _predicted(predictor: Predictor, columns: dict[str, list[Any]]) -> dict[str, Any]:
    scored: dict[str, Any] = predictor.scores(predictor.predict(columns)).to_pylist()[0]
    return scored


def _result(row: dict[str, Any]) -> str:
    weight = row.get("image_weight")
    parts = [_score(row)] + ([] if weight is None else [f"image weight {weight:.3f}"])
    return "; ".join([*parts, row["status"] + (f": {row['reason_detail']}" if row["reason"] else "")])


def _score(row: dict[str, Any]) -> str:
    return "no score" if row["score"] is None else f"{row.get('predicted_label', 'value')}, score {row['score']:.6f}"


def _why(fault: Fault) -> str:
    return f"{fault.reason}: {fault.detail}"


def _printable(text: str) -> str:
    """Returns a text without what would move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _short(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(cell):,} characters)"
