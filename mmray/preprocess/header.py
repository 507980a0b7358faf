"""What an image's first bytes say of it, before a decoder touches it: format, size, alpha, and whether it is all there.

A decoder allocates what a header asks for, and fills what is missing with grey; both are found out here, at the cost of
microseconds. Formats go by content, never by file name.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple


class Header(NamedTuple):
    """An image as it describes itself."""

    format: str
    width: int
    height: int
    alpha: bool
    """Whether some pixels may be transparent."""
    complete: bool
    """Whether the data goes on to its end."""


def read_header(data: bytes) -> Header | None:
    """Reads the header of a JPEG, PNG, WEBP, GIF, BMP or TIFF image; None where the bytes are none of these.

    Sources: ITU-T T.81 (JPEG), W3C PNG, RFC 9649 (WebP), GIF89a, the BITMAPINFOHEADER documentation, TIFF 6.0.
    """
    for magic, parse in _PARSERS.items():
        if data.startswith(magic):
            try:
                return parse(data)
            except (struct.error, IndexError):
                return Header(parse.__name__.strip("_"), 0, 0, False, False)  # it ends within its header
    return None


def _jpeg(data: bytes) -> Header:
    position, width, height = 2, 0, 0
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:  # fill bytes, or rubbish between segments
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            position += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and not width:
            height, width = struct.unpack_from(">HH", data, position + 5)
        if marker in (0xDA, 0xD9):  # within the scan, FF is always followed by 00 or a restart: FF D9 is the end
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return Header("jpeg", width, height, False, data.find(b"\xff\xd9", position) >= 0)


def plain_png(data: bytes) -> bytes:
    """Returns a PNG as far as its end, without the chunks of an animation: what viewers that know of none show."""
    chunks = _png_chunks(data)
    kept = [part for kind, part in chunks if kind not in _ANIMATION]
    if len(kept) == len(chunks) and chunks[-1][1].stop >= len(data):
        return data
    return data[:8] + b"".join(data[part] for part in kept)


def _png(data: bytes) -> Header:
    width, height, _, color = struct.unpack_from(">IIBB", data, 16)
    chunks = _png_chunks(data)
    kinds = {kind for kind, _ in chunks}
    complete = b"IEND" in kinds and chunks[-1][1].stop <= len(data) + 4
    return Header("png", width, height, color in (4, 6) or b"tRNS" in kinds, complete)


def _png_chunks(data: bytes) -> list[tuple[bytes, slice]]:
    """Returns the kind of each chunk and where it stands, as far as IEND."""
    position, chunks = 8, list[tuple[bytes, slice]]()
    while position + 8 <= len(data) and not (chunks and chunks[-1][0] == b"IEND"):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks.append((kind, slice(position, position + 12 + length)))
        position += 12 + length
    return chunks


def _webp(data: bytes) -> Header:
    complete = len(data) >= 8 + struct.unpack_from("<I", data, 4)[0]
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return Header("webp", width, height, bool(data[20] & 0x10), complete)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1), complete)
    width, height = struct.unpack_from("<HH", data, 26)
    return Header("webp", width & 0x3FFF, height & 0x3FFF, False, complete)


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    alpha = False
    while data[position] == 0x21:  # extensions before the first frame
        alpha |= data[position + 1] == 0xF9 and bool(data[position + 3] & 1)
        position = _skip_blocks(data, position + 2)
    left, top, w, h, local = struct.unpack_from("<HHHHB", data, position + 1)
    position += 10 + (3 << (local & 7) + 1 if local & 0x80 else 0)
    whole = (left, top, w, h) == (0, 0, width, height)
    complete = data[position : position + 1] != b"" and _skip_blocks(data, position + 1) <= len(data)
    return Header("gif", max(width, left + w), max(height, top + h), alpha or not whole, complete)


def _skip_blocks(data: bytes, position: int) -> int:
    while size := data[position]:
        position += 1 + size
    return position + 1


def _bmp(data: bytes) -> Header:
    offset, header_size = struct.unpack_from("<II", data, 10)
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    needed = offset + (width * bits + 31) // 32 * 4 * abs(height) if compression == 0 else 0
    return Header("bmp", abs(width), abs(height), False, len(data) >= needed)


def _tiff(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    tags: dict[int, int] = {}
    for k in range(struct.unpack_from(order + "H", data, start)[0]):
        tag, kind, _ = struct.unpack_from(order + "HHI", data, start + 2 + 12 * k)
        value = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, start + 10 + 12 * k)[0]
        if tag in (256, 257) and kind not in (3, 4):  # by other types, decoders read it from elsewhere
            return Header("tiff", 0, 0, False, True)
        tags[tag] = max(tags.get(tag, 0), value)  # of a size that is there twice, decoders take one or the other
    return Header("tiff", tags.get(256, 0), tags.get(257, 0), 338 in tags, True)


_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_PARSERS: dict[bytes, Callable[[bytes], Header]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"GIF87a": _gif,
    b"GIF89a": _gif,
    b"BM": _bmp,
    b"II*\x00": _tiff,
    b"MM\x00*": _tiff,
}
