"""Images nobody would send by accident, by the thousand: made from seeds, decoded in a process that may die of them.

    python -m tests.fuzz images --count 300000 --seed 1 --json out.json

Reads the small images of the demo, of OpenCV's own encoders and, where it is there, of the development data -> gives
what became of each mutant. Every mutant is a function of the seed and its number, so that `mutant` makes it again.
"""

import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIDE, MAX_PIXELS, MAX_CORPUS_BYTES = 32, 300_000, 6_000  # small, so that there can be many
MUTANT_S = 20  # until a decoder hangs
MUTANT_MB = 100  # more than any image of so few pixels can need
INTERESTING = (0, 1, 2, 3, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


@dataclass
class Outcome:
    """What became of the mutants of one seed."""

    seed: int
    count: int
    results: Counter[str] = field(default_factory=Counter)
    """`ok` or a reason -> how many."""
    wrong: list[str] = field(default_factory=list)
    """Mutants that gave something else: an exception, pixels of another shape, a reason that is none."""
    deaths: list[str] = field(default_factory=list)
    """Mutants that the process died of."""
    peak_mb: int = 0
    """Most memory of any process that decoded."""
    seconds: float = 0.0


def corpus() -> list[bytes]:
    """Returns small images of every format that is accepted, each format as often as any other."""
    import cv2
    import numpy as np
    import pyarrow.parquet as pq

    from mmray.preprocess.header import read_header

    y, x = np.mgrid[0:24, 0:32]
    picture = np.stack([x * 8, y * 10, (x * y) % 256, 255 - x * 4], axis=2).astype(np.uint8)
    made = [
        cv2.imencode(name, picture[:, :, :channels], list(options))[1].tobytes()
        for name, channels, *options in (
            (".jpg", 3),
            (".jpg", 3, cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
            (".png", 3),
            (".png", 4),
            (".webp", 3),
            (".webp", 4, cv2.IMWRITE_WEBP_QUALITY, 101),
            (".gif", 3),
            (".bmp", 3),
            (".tiff", 3),
            (".tiff", 4, cv2.IMWRITE_TIFF_COMPRESSION, 8),
        )
    ]
    demo = pq.read_table(ROOT / "mmray" / "demo" / "clipart.parquet").slice(0, 40)
    cells = next(column for column in demo.columns if "binary" in str(column.type)).to_pylist()
    cells = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    odd = Path(os.environ.get("MMRAY_SHARED", ROOT.parent / "shared")) / "data" / "odd_images"
    files = [path.read_bytes() for path in sorted(odd.glob("*.*")) if path.stat().st_size <= MAX_CORPUS_BYTES]
    kinds: dict[str, list[bytes]] = {}
    for data in [*made, *cells, *files]:
        header = read_header(data)
        if header is not None and len(data) <= MAX_CORPUS_BYTES:
            kinds.setdefault(header.format, []).append(data)
    most = max(map(len, kinds.values()))
    return [some[k % len(some)] for _, some in sorted(kinds.items()) for k in range(most)]


def mutant(seed: int, number: int, images: Sequence[bytes]) -> bytes:
    """Returns one mutant: a real image with one to three things done to it."""
    generator = random.Random(f"{seed}:{number}")
    data = generator.choice(images)
    for _ in range(generator.choice((1, 1, 2, 3))):
        data = generator.choice(MUTATIONS)(generator, data, images) or data
    return data


def _bits(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(generator.randint(1, 8)):
        out[generator.randrange(len(out))] ^= 1 << generator.randrange(8)
    return bytes(out)


def _truncated(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    return data[: generator.randrange(1, len(data) + 1)]


def _cut_out(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    start = generator.randrange(len(data))
    return data[:start] + data[start + generator.randint(1, 64) :]


def _repeated(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    start = generator.randrange(len(data))
    end = start + generator.randint(1, 64)
    return data[:end] + data[start:end] * generator.randint(1, 20) + data[end:]


def _spliced(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    alike = [image for image in images if image[:2] == data[:2]]
    other = generator.choice(alike if alike and generator.random() < 0.8 else images)
    share = generator.random()
    return data[: int(share * len(data)) + 1] + other[int(share * len(other)) :]


def _header_field(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    form = generator.choice(("B", "<H", ">H", "<I", ">I"))
    size = struct.calcsize(form)
    at = generator.randrange(min(len(data), 64))
    value = generator.choice(INTERESTING) & (1 << 8 * size) - 1
    return data[:at] + struct.pack(form, value) + data[at + size :]


def _png_chunk(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    """Alters a chunk and mends its checksum, so that what reads the chunk meets it."""
    position, chunks = 8, []
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    if not data.startswith(b"\x89PNG") or not chunks:
        return _bits(generator, data, images)
    k = generator.randrange(len(chunks))
    kind, body = chunks[k]
    action = generator.randrange(5)
    if action == 0:
        chunks.insert(k, chunks[generator.randrange(len(chunks))])
    elif action == 1:
        chunks.pop(k)
    elif action == 2:
        chunks[k] = (generator.choice((b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"eXIf")), body)
    elif body:
        chunks[k] = (kind, _bits(generator, body, images) if action == 3 else _header_field(generator, body, images))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _jpeg_segment(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    """Alters the kind, the length or the body of a segment."""
    starts = [k for k in range(len(data) - 4) if data[k] == 0xFF and data[k + 1] not in (0, 0xFF)]
    if not data.startswith(b"\xff\xd8") or not starts:
        return _bits(generator, data, images)
    at, out = generator.choice(starts), bytearray(data)
    action = generator.randrange(3)
    if action == 0:
        out[at + 1] = generator.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xEE, 0xD9))
    elif action == 1:
        out[at + 2 : at + 4] = struct.pack(">H", generator.choice(INTERESTING) & 0xFFFF)
    else:
        out[min(at + 4 + generator.randrange(16), len(out) - 1)] = generator.choice(INTERESTING) & 0xFF
    return bytes(out)


def _tiff_entry(generator: random.Random, data: bytes, images: Sequence[bytes]) -> bytes:
    """Alters a tag, type, count or value of the first directory."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    start = struct.unpack_from(order + "I", data, 4)[0] if order and len(data) > 8 else len(data)
    if order is None or start + 14 > len(data):
        return _bits(generator, data, images)
    entries = struct.unpack_from(order + "H", data, start)[0]
    entry = start + 2 + 12 * generator.randrange(max(min(entries, (len(data) - start - 2) // 12), 1))
    offset, form = generator.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H")))
    value = generator.choice((*INTERESTING, 256, 257, 258, 259, 262, 273, 277, 279, 317, 322, 339, 5, 6, 32773, 34712))
    out = bytearray(data + b"\0" * 12)
    struct.pack_into(order + form, out, entry + offset, value & (0xFFFF if form == "H" else 0xFFFFFFFF))
    return bytes(out)


MUTATIONS: tuple[Mutation, ...] = (
    _bits,
    _truncated,
    _cut_out,
    _repeated,
    _spliced,
    _header_field,
    _header_field,
    _png_chunk,
    _jpeg_segment,
    _tiff_entry,
)


def decode_mutants(seed: int, first: int, count: int, last: Path) -> None:
    """Decodes mutants in this process, and says of each before it is decoded which one it is.

    Prints the results as JSON; what is not among them, the process died of.
    """
    import numpy as np

    from mmray.config import ImageConfig
    from mmray.preprocess.image import decode_image, prepare_decoders
    from mmray.table import Fault, Reason

    prepare_decoders()
    images, config = corpus(), ImageConfig(size=SIDE, max_pixels=MAX_PIXELS)
    results, wrong = Counter[str](), []
    descriptor, peak_mb = os.open(last, os.O_WRONLY | os.O_CREAT), _peak_mb()
    for number in range(first, first + count):
        os.pwrite(descriptor, number.to_bytes(8, "little"), 0)
        data = mutant(seed, number, images)
        signal.alarm(MUTANT_S)  # whose default is to end the process, in the middle of a decoder too
        try:
            found = decode_image(data, config)
        except Exception as error:
            wrong.append(f"{seed}:{number} raised {type(error).__name__}: {error}")
            continue
        before, peak_mb = peak_mb, _peak_mb()
        if peak_mb - before > MUTANT_MB:
            wrong.append(f"{seed}:{number} took {peak_mb - before} MB")
        if isinstance(found, Fault):
            results[found.reason.value] += 1
            if found.reason not in Reason or len(found.detail) > 256 or not found.detail.isprintable():
                wrong.append(f"{seed}:{number} has the fault {found!r}")
        else:
            results["ok"] += 1
            if found.shape != (SIDE, SIDE, 3) or found.dtype != np.uint8:
                wrong.append(f"{seed}:{number} has pixels {found.shape} {found.dtype}")
    signal.alarm(0)
    print(json.dumps({"results": results, "wrong": wrong, "peak_mb": _peak_mb()}))


def _peak_mb() -> int:
    # Not ru_maxrss: it begins with what the process that started this one had.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def decode_images(count: int, seed: int) -> Outcome:
    """Decodes the first mutants of a seed, in a process of their own that is started again where it died."""
    outcome, first, started = Outcome(seed, count), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder, "last")
        while first < count:
            some = min(count - first, 20_000)
            run = _decode_apart(seed, first, some, last)
            if run.returncode:
                number = int.from_bytes(last.read_bytes(), "little")
                how = signal.Signals(-run.returncode).name if run.returncode < 0 else run.stderr.strip()[-500:]
                outcome.deaths.append(f"{seed}:{number} {how}")
                some = number - first
                run = _decode_apart(seed, first, some, last)  # those before it, whose results it took along
                first += 1
            said = json.loads(run.stdout)
            outcome.results.update(said["results"])
            outcome.wrong += said["wrong"]
            outcome.peak_mb = max(outcome.peak_mb, said["peak_mb"])
            first += some
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def _decode_apart(seed: int, first: int, count: int, last: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", __file__, "decode", *map(str, (seed, first, count, last))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _versions() -> dict[str, str]:
    import cv2

    return {"python": sys.version.split()[0], "opencv": cv2.__version__}


def main(arguments: Sequence[str]) -> None:
    """Decodes mutants of several seeds, and says what became of them."""
    if arguments[0] == "decode":
        decode_mutants(*map(int, arguments[1:4]), Path(arguments[4]))
        return
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("what", choices=["images"])
    parser.add_argument("--count", type=int, default=20_000, help="mutants of all seeds together")
    parser.add_argument("--seed", type=int, action="append", help="repeatable (default: 1)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    seeds = args.seed or [1]
    outcomes = [decode_images(args.count // len(seeds), seed) for seed in seeds]
    report: dict[str, Any] = {
        "command": "python -m tests.fuzz " + " ".join(arguments),
        "mutants": sum(outcome.count for outcome in outcomes),
        "deaths": sum(len(outcome.deaths) for outcome in outcomes),
        "wrong": sum(len(outcome.wrong) for outcome in outcomes),
        "versions": _versions(),
        "seeds": [vars(outcome) for outcome in outcomes],
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
