"""Makes `clipart.parquet`, the demo's data, from a folder of Open Clip Art (Debian's `openclipart`, public domain).

    python mmray/demo/make_clipart.py SOURCE

SOURCE holds `openclipart.parquet` (id, image_path, text, label, split) and the images it names. Images are at most 96
pixels wide and high. Of rows with the same text two are kept: 52 drawings called `ornamental` are right or wrong
together, and a figure that hangs on one of them says little.
"""

import sys
from collections import Counter
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

MAX_SIDE = 96
QUALITY = 72
MAX_EQUAL = 2  # rows with the same text


def make(source: Path, target: Path) -> None:
    """Writes the rows of `source` with their images inside."""
    rows = _varied(pq.read_table(source / "openclipart.parquet"))
    images = [_small(source / path) for path in rows["image_path"].to_pylist()]
    columns = {name: pa.array(rows[name].to_pylist(), pa.string()) for name in ("id", "text", "label", "split")}
    table = pa.table({"id": columns.pop("id"), "image": pa.array(images, pa.binary()), **columns})
    pq.write_table(table, target, compression="zstd", compression_level=19, use_dictionary=["label", "split"])
    print(f"{table.num_rows:,} rows, {target.stat().st_size / 1e6:.2f} MB: {target}")


def _varied(rows: pa.Table) -> pa.Table:
    seen, keep = Counter[str](), []
    for text in rows["text"].to_pylist():
        seen[text] += 1
        keep.append(seen[text] <= MAX_EQUAL)
    return rows.filter(pa.array(keep))


def _small(path: Path) -> bytes:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None, path
    scale = min(MAX_SIDE / max(image.shape[:2]), 1.0)
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1])[1])


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(__file__).with_name("clipart.parquet"))
