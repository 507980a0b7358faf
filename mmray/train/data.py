"""From training tables to preprocessed rows, slice by slice.

Reads parquet slices -> gives what the model has to know beforehand (labels, vocabulary: `surveying`) and the rows it
trains on (`preprocessing`). Both are work on slices, which is done where the run has its place (`place.py`).
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmray.config import Config, TableConfig
from mmray.errors import ConfigError, TableError
from mmray.labels import encode_targets, is_label, label_name, label_names, number
from mmray.preprocess import Preprocessor
from mmray.preprocess.image import prepare_decoders
from mmray.preprocess.text import Vocabulary, tokenize
from mmray.slices import Slice, Table, cut, open_table, read_slice, slices_from_arrow
from mmray.source import ImageSource
from mmray.table import cells, require_types
from mmray.train.rows import file_id

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
BLOCK_BYTES = 64 * 2**20  # decoded rows per block: Ray's object store moves and spills whole blocks
READS = 64  # images of a store that a task reads at a time
_FRACTION_STEPS = 10_000


@dataclass(frozen=True)
class Tables:
    """The tables of a run and how their rows are split."""

    train: Table
    validation: Table | None
    config: TableConfig

    def of(self, split: Split) -> Table:
        """Returns the table that a split's rows are in."""
        return self.validation if split == "validation" and self.validation is not None else self.train


@dataclass(frozen=True)
class Survey:
    """What one pass over the training rows counts."""

    rows: int
    unlabelled: int
    """Further training rows, which have no label."""
    held_out: int
    """Rows of the validation split, labelled or not."""
    labels: Mapping[str, int]
    """Label -> rows (for multilabel, rows that carry it); empty for regression."""
    words: Mapping[str, int]
    target_mean: float
    target_std: float


@dataclass(frozen=True)
class Work:
    """Something to do with slices, each by itself."""

    slices: Sequence[Slice]
    function: Callable[..., Any]
    """Called with a pyarrow table of one slice, as `slices_to_arrow` makes it, and the arguments."""
    arguments: tuple[Any, ...]


def open_tables(config: Config) -> Tables:
    """Opens the tables and checks their columns.

    Raises:
        TableError: a table or column is missing, or of the wrong type.
    """
    settings = config.table
    modal = {name: getattr(settings, f"{name}_column") for name in settings.modalities}
    columns = [*modal.values(), settings.label_column]
    split = [settings.split_column] if settings.split_column and settings.validation is None else []

    def check(schema: pa.Schema, where: str) -> None:
        require_types(schema, modal, where)

    remedy = "name the right one as table.image_column, text_column, label_column or split_column"
    train = open_table(settings.train, [*columns, *split], check, remedy=remedy)
    validation = open_table(settings.validation, columns, check, remedy=remedy) if settings.validation else None
    return Tables(train, validation, settings)


def surveying(tables: Tables, config: Config) -> Work:
    """Returns the work of counting labels and words of the training rows, whose rows `surveyed` puts together."""
    return Work(cut(tables.train), _survey_slice, (config, tables.validation is not None))


def surveyed(counted: Iterable[Mapping[str, Any]], tables: Tables, config: Config) -> Survey:
    """Puts together what was counted.

    Raises:
        TableError: no row is for training, too few have a label, or a label cannot be read.
    """
    parts = [json.loads(row["counts"]) for row in counted]
    labels, words = Counter[str](), Counter[str]()
    for part in parts:
        labels.update(part["labels"])
        words.update(part["words"])
    rows = sum(part["rows"] for part in parts)
    if not rows:
        raise TableError(
            f"{tables.train.uri} has no labelled row for training; check table.label_column and table.split_column"
        )
    unlabelled = sum(part["unlabelled"] for part in parts)
    check_labelled(unlabelled, rows + unlabelled, "training", "no label", config.table)
    mean, deviation = _mean_and_deviation([part["moments"] for part in parts])
    if config.task.kind == "regression" and deviation == 0:
        raise TableError(f"the label column {config.table.label_column!r} is constant; there is nothing to learn")
    held_out = sum(part["held_out"] for part in parts)
    if tables.validation is not None:
        held_out = tables.validation.num_rows
    return Survey(rows, unlabelled, held_out, labels, words, mean, deviation or 1.0)


def check_labelled(unusable: int, rows: int, which: str, what: str, config: TableConfig) -> None:
    """Refuses a table of which too many rows are of no use.

    Raises:
        TableError: their share is above `table.max_unlabelled`.
    """
    if unusable > config.max_unlabelled * rows:
        raise TableError(
            f"{unusable:,} of {rows:,} {which} rows have {what}, more than table.max_unlabelled = "
            f"{config.max_unlabelled:g} allows; check table.label_column = {config.label_column!r}, or raise it"
        )


def _mean_and_deviation(moments: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Merges count, mean and sum of squared differences from it (Chan et al. 1979): exact far from zero as well."""
    rows, mean, squares = 0, 0.0, 0.0
    for more_rows, more_mean, more_squares in moments:
        total = rows + more_rows
        if total:
            difference = more_mean - mean
            squares += more_squares + difference**2 * rows * more_rows / total
            mean += difference * more_rows / total
        rows = total
    return mean, float(np.sqrt(squares / max(rows, 1)))


def preprocessing(
    tables: Tables, split: Split, config: Config, vocabulary: Vocabulary | None, labels: Sequence[str]
) -> Work:
    """Returns the work of which come the preprocessed, labelled rows of a split, in table order.

    Columns: the arrays of `Features`, `present_<modality>`, `target` (see `encode_targets`), and which row of the table
    it is: `file` (see `file_id`) and `row`, its number there.
    """
    table = tables.of(split)
    slice_rows = max(min(BLOCK_BYTES // row_bytes(config, len(labels)), max(table.num_rows // 16, 64)), 1)
    roots = table.image_roots(config.table.image_roots)
    arguments = (config, tables.validation is not None, split, vocabulary, tuple(labels), roots)
    return Work(cut(table, slice_rows), _preprocess_slice, arguments)


def row_bytes(config: Config, num_labels: int, image_bytes: int | None = None) -> int:
    """Returns the size of one preprocessed row; `image_bytes` is that of what stands in the image's place."""
    targets = 4 * num_labels if config.task.kind == "multilabel" else 8
    pixels = config.image.size**2 * 3 if "image" in config.table.modalities else 0
    return (
        (pixels if image_bytes is None else image_bytes)
        + 4 * (config.text.max_tokens + (config.text.max_ngrams if config.text.ngram_buckets else 0))
        + targets
        + 72
    )


def _survey_slice(rows: pa.Table, config: Config, separate: bool) -> pa.Table:
    (piece,) = slices_from_arrow(rows)
    columns = config.table
    table, splits = _rows_of(piece, config, separate)
    held_out = 0
    if splits is not None:
        held_out = int(np.count_nonzero(splits == "validation"))
        table = table.filter(pa.array(splits == "train", pa.bool_()))
    values = table.filter(_is_labelled(table, config, None))[columns.label_column].to_pylist()
    words: Counter[str] = Counter()
    if columns.text_column is not None:
        for text in cells(table[columns.text_column]):
            words.update(tokenize(text, config.text) if text else ())
    numbers = np.asarray([number(v, columns.label_column) for v in values] if config.task.kind == "regression" else [])
    names = [name for v in values for name in (label_names(v) if config.task.kind == "multilabel" else [label_name(v)])]
    mean = float(numbers.mean()) if len(numbers) else 0.0
    counts = {
        "rows": len(values),
        "unlabelled": table.num_rows - len(values),
        "held_out": held_out,
        "labels": {} if config.task.kind == "regression" else Counter(names),
        "words": words,
        "moments": [len(numbers), mean, float(((numbers - mean) ** 2).sum())],
    }
    return pa.table({"counts": [json.dumps(counts)]})


def _preprocess_slice(
    rows: pa.Table,
    config: Config,
    separate: bool,
    split: Split,
    vocabulary: Vocabulary | None,
    labels: Sequence[str],
    roots: Sequence[str],
) -> dict[str, NDArray[np.generic]]:
    prepare_decoders()
    (piece,) = slices_from_arrow(rows)
    table, splits = _rows_of(piece, config, separate)
    chosen = _is_labelled(table, config, labels).to_numpy(zero_copy_only=False)
    if splits is not None:
        chosen = chosen & (splits == split)
    table, numbers = table.filter(pa.array(chosen)), piece.first_row + np.flatnonzero(chosen)
    values = table[config.table.label_column].to_pylist()
    source = ImageSource(roots, config.image.max_bytes)
    modal = {name: cells(table[getattr(config.table, f"{name}_column")]) for name in config.table.modalities}
    features = Preprocessor(config, vocabulary, source, reads=READS)(modal)
    arrays = {name: _pad(name, array, config) for name, array in features.arrays.items()}
    present = {f"present_{name}": mask for name, mask in features.present.items()}
    targets = encode_targets(values, config.task.kind, labels, config.table.label_column)
    identity = {"file": np.full(len(values), file_id(piece.uri)), "row": numbers}
    return {**arrays, **present, **identity, "target": targets}


def _rows_of(piece: Slice, config: Config, separate: bool) -> tuple[pa.Table, NDArray[np.object_] | None]:
    """Reads the rows of a slice.

    Returns:
        The rows, and the split that each belongs to; no splits where these are separate tables.
    """
    columns = config.table
    wanted = [*(getattr(columns, f"{name}_column") for name in columns.modalities), columns.label_column]
    if separate:
        return read_slice(piece, wanted), None
    if columns.split_column is not None:
        table = read_slice(piece, [*wanted, columns.split_column])
        return table, np.asarray(table[columns.split_column].to_pylist(), object)
    table = read_slice(piece, wanted)
    held_out = [_is_held_out(key, config) for key in _split_keys(table, piece, columns)]
    return table, np.asarray(["validation" if held else "train" for held in held_out], object)


def _split_keys(table: pa.Table, piece: Slice, columns: TableConfig) -> list[str]:
    # Equal texts share a side: a duplicate of a training row would make validation look better than it is.
    texts = cells(table[columns.text_column]) if columns.text_column else [None] * table.num_rows
    return [text or f"{piece.uri}:{piece.first_row + k}" for k, text in enumerate(texts)]


def _is_held_out(key: str, config: Config) -> bool:
    digest = zlib.crc32(f"{config.train.seed}:{key}".encode("utf-8", "replace"))
    return digest % _FRACTION_STEPS < config.table.validation_fraction * _FRACTION_STEPS


def _is_labelled(table: pa.Table, config: Config, labels: Sequence[str] | None) -> pa.BooleanArray:
    cells_of_labels = table[config.table.label_column].to_pylist()
    return pa.array([is_label(cell, config.task.kind, labels) for cell in cells_of_labels], pa.bool_())


def _pad(name: str, array: NDArray[np.generic], config: Config) -> NDArray[np.generic]:
    widths = {"token_ids": config.text.max_tokens, "ngram_ids": config.text.max_ngrams}
    if name not in widths:
        return array
    return np.pad(array, ((0, 0), (0, widths[name] - array.shape[1])))


def check_label_column(config: Config, table: Table) -> None:
    """Refuses a label column whose type does not fit the task, before any worker starts.

    Raises:
        ConfigError: the type is another.
    """
    kind = table.schema.field(config.table.label_column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list != (config.task.kind == "multilabel"):
        fix = "use task.kind = 'multilabel'" if is_list else "a multilabel task needs a list of labels in each row"
        raise ConfigError(f"the label column {config.table.label_column!r} is of type {kind}; {fix}")
