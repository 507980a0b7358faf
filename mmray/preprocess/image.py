"""From bytes to pixels, by OpenCV: the only place that decodes an image.

Reads the bytes of a JPEG, PNG, WEBP, GIF, BMP or TIFF image -> gives uint8 [S, S, 3] RGB, or why not. Conversions, each
the only one: turned upright by its EXIF orientation (with transparent parts it stays as stored); grey repeated over
three channels; transparent parts on white; CMYK and palettes to RGB; 16 bits to 8 by their upper half; of an animation
the first frame; squeezed to a square.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmray.config import ImageConfig
from mmray.errors import ConfigError
from mmray.preprocess.header import Header, plain_png, read_header
from mmray.table import Fault, Reason, fault

try:
    import cv2
except ImportError as error:  # the wheel needs two system libraries that slim images lack
    raise ConfigError(
        f"OpenCV does not load ({error}): run `apt-get install libgl1 libglib2.0-0`, "
        "or install opencv-python-headless in place of opencv-python"
    ) from error

# JPEG decodes at a half, quarter or eighth of its size in much less time: by its own transform, not by resizing. OpenCV
# has names for these scales in grey and in BGR only; the flag for RGB goes with the grey ones.
_REDUCED = {
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
}
_AVERAGE_FROM = 3  # times smaller: below, bilinear sampling meets most pixels, at a sixth of the cost of their average


def prepare_decoders() -> None:
    """Sets OpenCV up for a worker process: quiet, and on the threads that call it only."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    cv2.setNumThreads(0)


def decode_image(data: bytes, config: ImageConfig) -> NDArray[np.uint8] | Fault:
    """Decodes an image to uint8 [S, S, 3] RGB, S = `config.size`, or says why it cannot be.

    Raises:
        MemoryError: there was none left, which says nothing about the image.
    """
    header = read_header(data)
    refused = _refuse(data, header, config)
    if refused is not None:
        return refused
    assert header is not None
    # OpenCV's decoder of animated PNGs goes astray in memory where a frame is damaged (opencv/opencv#27744), and of one
    # without pixels it reads on behind the end, for as many bytes as it finds a chunk to have there: up to 4 GiB.
    data = plain_png(data) if header.format == "png" else data
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _flags(header, config.size))
        if pixels is None or not pixels.size:
            return fault(Reason.DECODE_ERROR, f"the {header.format} decoder refused the data")
        pixels = _on_white(pixels) if header.alpha else pixels
        average = max(pixels.shape[:2]) >= _AVERAGE_FROM * config.size and min(pixels.shape[:2]) >= config.size
        square = cv2.resize(
            pixels, (config.size, config.size), interpolation=cv2.INTER_AREA if average else cv2.INTER_LINEAR
        )
        return np.asarray(square, np.uint8)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"no memory to decode {header.width} x {header.height} pixels") from None
        return fault(Reason.DECODE_ERROR, f"the {header.format} decoder failed: {error.err}")


def thumbnail(pixels: NDArray[np.uint8], side: int) -> bytes:
    """Returns uint8 [S, S, 3] RGB as a small JPEG of at most `side` pixels, for people to look at."""
    if len(pixels) > side:
        pixels = np.asarray(cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return data.tobytes()


def _refuse(data: bytes, header: Header | None, config: ImageConfig) -> Fault | None:
    if not data:
        return fault(Reason.EMPTY_FILE, "no bytes")
    if len(data) > config.max_bytes:
        return fault(Reason.TOO_LARGE_BYTES, f"{len(data)} bytes, {config.max_bytes} allowed")
    if header is None:
        return fault(Reason.BAD_FORMAT, "not a JPEG, PNG, WEBP, GIF, BMP or TIFF image")
    width, height = header.width, header.height
    if width * height > config.max_pixels or max(width, height) > config.max_side:
        return fault(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels")
    if not header.complete:
        return fault(Reason.TRUNCATED, f"the {header.format} data ends early")
    if width <= 0 or height <= 0:
        return fault(Reason.DECODE_ERROR, f"the {header.format} header gives no size")
    return None


def _flags(header: Header, size: int) -> int:
    if header.alpha:
        return int(cv2.IMREAD_UNCHANGED)
    if header.format == "jpeg":
        for factor, flag in _REDUCED.items():
            if min(header.width, header.height) >= factor * size:
                return int(flag)
    return int(cv2.IMREAD_COLOR_RGB)


def _on_white(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Returns RGB [H, W, 3] from an image as OpenCV leaves it: grey, BGR or BGRA, of 8 or 16 bits."""
    eight = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels.astype(np.uint8)
    if eight.ndim == 2 or eight.shape[2] == 1:
        return np.repeat(eight.reshape(*eight.shape[:2], 1), 3, axis=2)
    if eight.shape[2] == 3:
        return eight[:, :, ::-1]
    alpha = eight[:, :, 3:].astype(np.uint16)
    mixed = (eight[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return mixed[:, :, ::-1].astype(np.uint8)
