"""Makes `clipart.parquet`, the demo's data, from a folder of Open Clip Art (Debian's `openclipart`, public domain).

    python mmray/demo/make_clipart.py SOURCE

SOURCE holds `openclipart.parquet` (id, image_path, text, label, split) and the images it names. Every row is kept, with
its image at most 96 pixels wide and high.
"""

import sys
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

MAX_SIDE = 96
QUALITY = 72  # with 96 pixels: 4,117 images in 8 MB


def make(source: Path, target: Path) -> None:
    """Writes the rows of `source` with their images inside."""
    rows = pq.read_table(source / "openclipart.parquet")
    images = [_small(source / path) for path in rows["image_path"].to_pylist()]
    columns = {name: pa.array(rows[name].to_pylist(), pa.string()) for name in ("id", "text", "label", "split")}
    table = pa.table({"id": columns.pop("id"), "image": pa.array(images, pa.binary()), **columns})
    pq.write_table(table, target, compression="zstd", compression_level=19, use_dictionary=["label", "split"])
    print(f"{table.num_rows:,} rows, {target.stat().st_size / 1e6:.2f} MB: {target}")


def _small(path: Path) -> bytes:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None, path
    scale = min(MAX_SIDE / max(image.shape[:2]), 1.0)
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1])[1])


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(__file__).with_name("clipart.parquet"))
