"""Measures what each step of a row takes of one CPU core, or of a GPU, on rows of a table."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 2.0  # of each step
ROWS = 256


def measure_steps(bundle: str, table: str, precision: str, gpu: bool = False) -> dict[str, float]:
    """Returns milliseconds per row: to prepare it, of which to read, to decode and for its text; and to predict it.

    Call it in a process of its own, which has the environment of one that scores.
    """
    from mmray.bundle import load_bundle
    from mmray.options import ScoreConfig
    from mmray.predictor import Predictor
    from mmray.preprocess.image import decode_image
    from mmray.preprocess.text import encode
    from mmray.slices import cut, open_table, read_slice
    from mmray.source import ImageSource
    from mmray.table import cells

    loaded = load_bundle(bundle)
    vocabulary = loaded.vocabulary
    assert vocabulary is not None, "it reads texts"
    source = ImageSource([table], loaded.config.image.max_bytes)
    options = ScoreConfig(gpus_per_actor=int(gpu), precision=precision, decode_threads=1)
    predictor = Predictor.on_this_worker(loaded, source, options)
    rows = read_slice(next(iter(cut(open_table(table), ROWS))))
    columns = {name: cells(rows[predictor.column(name)]) for name in predictor.modalities}
    features, images = predictor.prepare(columns), [source.read(cell) for cell in columns["image"]]
    batches = features.split(options.rows_per_batch)
    steps: dict[str, Callable[[], Any]] = {
        "prepare": lambda: predictor.prepare(columns),
        "read": lambda: [source.read(cell) for cell in columns["image"]],
        "decode": lambda: [decode_image(image, loaded.config.image) for image in images if isinstance(image, bytes)],
        "text": lambda: encode(columns["text"], vocabulary, loaded.config.text),
        "predict": lambda: [predictor.predict_features(batch) for batch in batches],
    }
    return {name: round(_seconds(step) / rows.num_rows * 1000, 3) for name, step in steps.items()}


def measure_start(bundle: Path) -> dict[str, float]:
    """Returns the seconds that a scoring process takes to import what it needs, and to load the model."""
    started = time.perf_counter()
    from mmray.bundle import load_bundle
    from mmray.options import ScoreConfig
    from mmray.predictor import Predictor
    from mmray.source import ImageSource

    imported = time.perf_counter()
    loaded = load_bundle(str(bundle))
    Predictor.on_this_worker(loaded, ImageSource([str(bundle)], 2**20), ScoreConfig())
    return {"imports": round(imported - started, 2), "model": round(time.perf_counter() - imported, 2)}


def _seconds(step: Callable[[], Any]) -> float:
    """Returns the seconds of one call, in the mean of many."""
    step()
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        step()
        calls += 1
    return (time.perf_counter() - started) / calls
