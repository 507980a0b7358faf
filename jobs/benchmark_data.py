"""What the benchmarks score: photographs of one size and texts, and a model that nobody has trained."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = ((500, 375), (375, 500), (640, 480), (500, 333))  # width, height
NUM_FILES = 8


def make_table(folder: Path, rows: int, photos: Path | None, images: int | None = None) -> Path:
    """Writes JPEGs, one a row or fewer, and a table of (id, image_path, text, label) in several files."""
    (folder / "images").mkdir(parents=True)
    generator, records = np.random.default_rng(0), []
    originals, words = list(pictures(photos)), Path(__file__).read_text().split()
    for k in range(rows):
        name = f"images/{k % (images or rows):06d}.jpg"
        if k < (images or rows):
            image, (width, height) = originals[k % len(originals)], SIZES[k % len(SIZES)]
            top, left = (int(generator.integers(0, side * 4 // 10)) for side in image.shape[:2])
            part = image[top : top + image.shape[0] * 6 // 10, left : left + image.shape[1] * 6 // 10]
            sized = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(folder / name), sized, [cv2.IMWRITE_JPEG_QUALITY, 85])
        text = " ".join(generator.choice(words, generator.integers(8, 60)))
        records.append({"id": k, "image_path": name, "text": text, "label": f"kind {k % 4}"})
    for k in range(NUM_FILES):
        pq.write_table(pa.Table.from_pylist(records[k::NUM_FILES]), folder / f"part-{k}.parquet")
    return folder


def pictures(photos: Path | None) -> Iterator[cv2.typing.MatLike]:
    """Yields the photographs of a folder, or some of the demo's drawings."""
    if photos is not None:
        found = (cv2.imread(str(path)) for path in sorted(photos.iterdir()))
        yield from (image for image in found if image is not None and min(image.shape[:2]) > 300)
        return
    from importlib.resources import as_file, files

    with as_file(files("mmray.demo") / "clipart.parquet") as path:
        for data in pq.read_table(path, columns=["image"])["image"].to_pylist()[:200]:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            assert image is not None, "the demo holds whole JPEGs"
            yield cv2.resize(image, (800, 600), interpolation=cv2.INTER_CUBIC)


def make_bundle(folder: Path, network: str = "mobilenet_v3_small", table: Path | None = None) -> Path:
    """Writes an untrained torchvision network + lstm with golden rows of a table, by default the one beside it."""
    import torch

    from mmray.bundle import Bundle, save_bundle
    from mmray.config_file import parse_config
    from mmray.model import FusionModel
    from mmray.preprocess.text import Vocabulary
    from mmray.slices import open_table
    from mmray.train.golden import golden_rows

    model = {
        "image_encoder": {"kind": "torchvision", "name": network},
        "text_encoder": {"kind": "lstm", "hidden_dim": 64, "pooling": "mean"},
    }
    config = parse_config(
        {
            "table": {"train": "table"},
            "image": {"size": 224},
            "text": {"ngram_buckets": 0},
            "task": {"kind": "binary"},
            "model": model,
        },
        "benchmark",
    )
    torch.manual_seed(0)
    words = tuple(sorted(set(Path(__file__).read_text().lower().split())))
    weights = FusionModel(config, num_labels=2, words=words).state_dict()
    bundle = Bundle(config=config, labels=("no", "yes"), vocabulary=Vocabulary(words), weights=weights)
    table, path = table or folder / "table", folder / f"bundle-{network}"
    save_bundle(golden_rows(bundle, open_table(str(table)), (str(table),)), str(path))
    return path
