"""Images: pixels as they should be, or a reason; never an exception, a word on the terminal or a lot of memory."""

import io
import json
import random
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image  # as the reference only: the package itself decodes with OpenCV

from mmray.config import ImageConfig
from mmray.preprocess.header import read_header
from mmray.preprocess.image import decode_image
from mmray.table import Fault, Reason

CONFIG = ImageConfig(size=64)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB", size: int = 64) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] * 255 // (size - 1)
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8)).convert(mode)


def decoded(data: bytes, config: ImageConfig = CONFIG) -> np.ndarray:
    result = decode_image(data, config)
    assert isinstance(result, np.ndarray), result
    assert result.shape == (config.size, config.size, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    return result


def reason(data: bytes, config: ImageConfig = CONFIG) -> Reason:
    result = decode_image(data, config)
    assert isinstance(result, Fault)
    return result.reason


def difference(left: np.ndarray, right: Image.Image) -> float:
    return float(np.abs(left.astype(int) - np.asarray(right.convert("RGB")).astype(int)).max())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_each_format_gives_rgb_in_that_order(format: str) -> None:
    image = gradient() if format != "GIF" else gradient().quantize(64)
    options = {"lossless": True} if format == "WEBP" else {}
    assert difference(decoded(encoded(image, format, **options)), image) <= 2


def test_a_jpeg_gives_rgb_in_that_order() -> None:
    assert difference(decoded(encoded(gradient(), "JPEG", quality=95)), gradient()) <= 12


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette_images_have_three_channels(mode: str) -> None:
    image = gradient(mode)
    assert difference(decoded(encoded(image, "PNG")), image) <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_white(mode: str) -> None:
    image = gradient(mode)
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))))
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    assert difference(decoded(encoded(image, "PNG")), white) <= 2


def test_a_palette_with_a_transparent_colour_is_white_there() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 32, 64))
    pixels = decoded(encoded(image, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [200, 100, 50]
    assert pixels[0, 63].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_their_upper_half() -> None:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    pixels = decoded(encoded(Image.fromarray(values), "PNG"))
    assert np.abs(pixels[:, :, 0].astype(int) - (values >> 8)).max() <= 1


def test_cmyk_becomes_rgb() -> None:
    image = gradient().convert("CMYK")
    assert difference(decoded(encoded(image, "JPEG", quality=98)), image) <= 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(orientation: int) -> None:
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}
    image = gradient()
    stored = image
    for turn in turns.get(orientation, []):  # the inverse of what a viewer does with the tag
        stored = stored.transpose(turn)
    if orientation in (6, 8):
        stored = image.transpose({6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    assert difference(decoded(encoded(stored, "JPEG", quality=95, exif=exif)), image) <= 14


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [gradient().quantize(64), Image.new("RGB", (64, 64), "red").quantize(2)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert difference(decoded(data), frames[0]) <= 2


def animated_png(first: Image.Image) -> bytes:
    frames = [Image.new(first.mode, first.size, colour) for colour in ("red", "green")]
    return encoded(first, "PNG", save_all=True, append_images=frames, default_image=True)


def test_the_first_frame_of_an_animated_png_counts() -> None:
    data = animated_png(gradient("RGBA"))
    assert b"acTL" in data
    assert difference(decoded(data), gradient()) <= 2


def test_a_damaged_frame_of_an_animated_png_costs_no_process() -> None:
    data = animated_png(gradient("RGBA"))
    start = data.index(b"fdAT")
    length = struct.unpack(">I", data[start - 4 : start])[0]
    # A filter that no PNG has: OpenCV's decoder of animations goes on in a frame of the stack that is gone.
    body = data[start + 4 : start + 8] + zlib.compress(b"\x09" * (64 * 257))
    chunk = struct.pack(">I", len(body)) + b"fdAT" + body + struct.pack(">I", zlib.crc32(b"fdAT" + body))
    damaged = data[: start - 4] + chunk + data[start + 8 + length :]
    code = (
        "import sys; from mmray.config import ImageConfig; from mmray.preprocess.image import decode_image\n"
        "print(decode_image(sys.stdin.buffer.read(), ImageConfig(size=32)).shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=damaged, capture_output=True)
    assert (run.returncode, run.stdout.decode().strip()) == (0, "(32, 32, 3)")


@pytest.mark.parametrize(("tag", "kind"), [(256, 3), (256, 4), (257, 4), (256, 16)])
def test_a_tiff_that_gives_two_sizes_does_not_pass_by_the_smaller(tag: int, kind: int) -> None:
    data = bytearray(encoded(Image.new("RGB", (400, 400)), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, start)[0]
    found = [start + 2 + 12 * k for k in range(entries)]
    other = next(at for at in found if struct.unpack_from("<H", data, at)[0] not in (256, 257, 258, 273, 277, 279))
    struct.pack_into("<HHII", data, other, tag, kind, 1, 4)
    result = decode_image(bytes(data), ImageConfig(size=32, max_pixels=100_000))
    assert isinstance(result, Fault)
    assert result.reason in (Reason.TOO_MANY_PIXELS, Reason.DECODE_ERROR)


def test_nothing_is_read_behind_the_end_of_a_png() -> None:
    whole = encoded(gradient(), "PNG")
    start = whole.index(b"IDAT") - 4
    bomb = whole[:start] + b"\0\0\0\0IEND\xaeB`\x82" + b"\xff\xff\xff\xffIDAT" + whole[start + 8 :]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(bomb) is Reason.DECODE_ERROR
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert (decoded(whole + bomb[8:]) == decoded(whole)).all()


def test_photographs_decode_alike_at_reduced_and_at_full_scale(shared: Path) -> None:
    measured = 0
    for path in sorted((shared / "data" / "photos").glob("*.jpg")):
        data = path.read_bytes()
        if not data:
            assert reason(data) is Reason.EMPTY_FILE
            continue
        small = decoded(data, ImageConfig(size=100))
        whole = Image.open(io.BytesIO(data))
        from PIL import ImageOps

        reference = ImageOps.exif_transpose(whole).convert("RGB").resize((100, 100), Image.Resampling.BOX)
        assert np.abs(small.astype(int) - np.asarray(reference).astype(int)).mean() < 6, path.name
        measured += 1
    assert measured >= 15


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"\xff", Reason.BAD_FORMAT),
        (b"<html><body>404</body></html>", Reason.BAD_FORMAT),
        (b'{"error": "not found"}', Reason.BAD_FORMAT),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.BAD_FORMAT),
        (b"%PDF-1.7\n", Reason.BAD_FORMAT),
        (b"PK\x03\x04" + b"\0" * 100, Reason.BAD_FORMAT),
        (b"\x89PNG\r\n\x1a\n", Reason.TRUNCATED),
        (b"\xff\xd8\xff\xe0", Reason.TRUNCATED),
        (b"GIF89a", Reason.TRUNCATED),
        (b"RIFF", Reason.TRUNCATED),
    ],
)
def test_what_is_no_image_is_named(data: bytes, expected: Reason) -> None:
    assert reason(data) is expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_image_is_never_half_scored(format: str) -> None:
    data = encoded(gradient(size=200), format)
    lengths = [*range(1, 40), *range(40, len(data) - 30, max(len(data) // 60, 1))]
    reasons = {reason(data[:length]) for length in lengths}
    assert reasons <= {Reason.TRUNCATED, Reason.BAD_FORMAT}
    assert decoded(data).any()


def test_trailing_bytes_after_the_end_do_no_harm() -> None:
    for format in ("JPEG", "PNG", "GIF", "WEBP"):
        assert decoded(encoded(gradient(), format) + b"\0" * 99).any(), format


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = zlib.compress(b"\0" * min((width * 3 + 1) * height, 10**7), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_bombs_are_refused_before_they_are_decoded() -> None:
    jpeg = bytearray(encoded(gradient(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
        + b"\2\1\0\0;"
    )
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff" * 6
    bombs = [png_of(100_000, 100), png_of(20_000, 20_000), png_of(2**31 - 1, 2**31 - 1), bytes(jpeg), gif, webp]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert {reason(bomb) for bomb in bombs} == {Reason.TOO_MANY_PIXELS}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_a_file_beyond_the_byte_limit_is_refused() -> None:
    assert reason(encoded(gradient(), "PNG"), ImageConfig(size=64, max_bytes=100)) is Reason.TOO_LARGE_BYTES


def test_damaged_images_give_pixels_or_a_reason() -> None:
    generator = random.Random(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(gradient(), format)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(generator.randint(1, 8)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            result = decode_image(bytes(data), CONFIG)
            assert isinstance(result, Fault) or result.shape == (64, 64, 3)


def test_every_odd_image_gives_pixels_or_a_reason_and_no_decoder_speaks(shared: Path) -> None:
    folder = shared / "data" / "odd_images"
    code = (
        "import sys, json, collections; from pathlib import Path\n"
        "from mmray.config import ImageConfig; from mmray.preprocess.image import decode_image, prepare_decoders\n"
        "from mmray.table import Fault\n"
        "prepare_decoders(); out = {}\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    result = decode_image(path.read_bytes(), ImageConfig(size=32))\n"
        "    out[path.name] = result.reason.value if isinstance(result, Fault) else 'ok'\n"
        "print(json.dumps(out))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    results = json.loads(run.stdout)
    assert len(results) == len(list(folder.iterdir()))
    index = {entry["file"]: entry for entry in json.loads((folder / "index.json").read_text())}
    formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    fine = [n for n, e in index.items() if e["pillow_result"] == "ok" and e["format"] in formats and n in results]
    decoded_too = sum(results[name] == "ok" for name in fine)
    assert decoded_too / len(fine) > 0.9
    assert len(fine) > 400


def test_a_header_is_what_pillow_says_it_is(shared: Path) -> None:
    folder = shared / "data" / "odd_images"
    compared = 0
    for entry in json.loads((folder / "index.json").read_text()):
        header = read_header((folder / entry["file"]).read_bytes())
        if header is None or entry["pillow_result"] != "ok" or not header.width:
            continue
        if entry["format"] in ("JPEG", "PNG", "WEBP", "TIFF", "BMP"):
            assert sorted((header.width, header.height)) == sorted(entry["size"]), entry["file"]  # Pillow turns
            compared += 1
    assert compared > 300
