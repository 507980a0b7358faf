"""Hostile input by the thousand: each gives what it should or a reason; no crash, no escape, no wrong value."""

import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import decode_images
from hostile_server import IMAGE, hostile_server
from models import colour_table, saved_bundle, score_in_process, small_bundle, small_config
from vectors import INSIDE, PRIVATE, paths, tree, urls

from mmray import url
from mmray.bundle import load_bundle
from mmray.errors import BundleError, EnvironmentFaultError, TableError
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.slices import cut, open_table, read_slice
from mmray.source import ImageSource
from mmray.table import Fault, Reason, cells

pytestmark = pytest.mark.slow


def test_twenty_thousand_damaged_images_give_pixels_or_a_reason_and_kill_no_process() -> None:
    outcome = decode_images(count=20_000, seed=1)
    assert outcome.deaths == []
    assert outcome.wrong == []
    assert sum(outcome.results.values()) == 20_000
    assert outcome.results["ok"] > 2_000, "mutants that decode are those that go deep"
    assert outcome.peak_mb < 600


def test_every_flipped_bit_of_a_bundle_is_refused(tmp_path: Path) -> None:
    saved = Path(saved_bundle(tmp_path / "bundle", colour_table(tmp_path / "rows", rows=20)))
    names, generator = sorted(path.name for path in saved.iterdir()), random.Random(0)
    for k in range(1000):
        path = saved / names[k % len(names)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        at, bit = generator.randrange(len(damaged)), generator.randrange(8)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(BundleError):
            pytest.fail(f"bit {bit} of byte {at} of {path.name}: {load_bundle(str(saved)).fingerprint}")
        path.write_bytes(whole)
    assert load_bundle(str(saved)).fingerprint, "whole again"


def test_paths_that_try_to_lead_out_read_nothing_outside(tmp_path: Path) -> None:
    root = tree(tmp_path)
    source, vectors = ImageSource([str(root)], 10_000), paths(root)
    assert len(set(vectors)) >= 500
    for name in vectors:
        found = source.read(name)
        assert isinstance(found, Fault) or found == INSIDE, f"{name[:200]!r} gave {found[:20]!r}"
        if isinstance(found, Fault):
            expected = (Reason.NOT_ALLOWED, Reason.MISSING, Reason.NOT_REGULAR, Reason.IMAGE_NULL)
            assert found.reason in expected, f"{name[:200]!r} gave {found}"
            assert found.detail.isprintable()
            assert "secret" not in found.detail


def test_urls_that_try_to_lead_out_connect_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    connected, connect = Counter[tuple[str, int]](), socket.socket.connect

    def recorded(self: socket.socket, address: tuple[str, int]) -> None:
        connected[address[0], address[1]] += 1
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    with hostile_server() as server, hostile_server() as canary:
        server.elsewhere = f"{canary.url}/photos/a.jpg"
        source, vectors = ImageSource([f"{server.url}/photos"], 10_000), [*urls(server.server_port, canary.server_port)]
        assert len(set(vectors)) >= 200
        for name in vectors:
            found = source.read(name)
            assert isinstance(found, Fault) or found == IMAGE
            assert not isinstance(found, Fault) or found.reason in (Reason.NOT_ALLOWED, Reason.MISSING), name[:200]
        assert canary.seen == []
        assert set(connected) == {("127.0.0.1", server.server_port)}
        assert all(target.startswith("/photos/") for target in server.seen)
        assert not any(".." in unquote(unquote(target)).split("/") for target in server.seen)
        assert len(server.seen) < len(vectors) / 10, "few of these are URLs beneath the root after all"


def test_names_whose_address_changes_or_is_private_connect_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    public, answers, connected = "93.184.215.14", list[str](), list[str]()

    def lookup(host: str, port: int, **_: int) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]

    def refused(address: tuple[str, int], **_: float) -> socket.socket:
        connected.append(address[0])
        answers[:] = ["127.0.0.1"]  # from now on
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(url, "FIRST_PAUSE_S", 0.0)
    for scheme in ("http", "https"):
        source = ImageSource([f"{scheme}://images.example.com"], 10_000)
        for address in PRIVATE:
            for answers[:] in ([address], [public, address], [address, public]):
                found = source.read("a.jpg")
                assert isinstance(found, Fault), address
                assert found.reason is Reason.NOT_ALLOWED, address
        assert connected == []
        answers[:] = [public]
        found = source.read("a.jpg")
        assert isinstance(found, Fault), "looked up again, it is private"
        assert connected == [public]
        connected.clear()


WRITTEN: tuple[dict[str, Any], ...] = (
    {"compression": "snappy"},
    {"compression": "none", "use_dictionary": False},
    {"compression": "none", "write_page_checksum": True},
    {"compression": "zstd", "write_page_checksum": True, "data_page_version": "2.0"},
)


@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_damaged_parquet_names_its_file_or_gives_every_row_its_own_value(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    generator, path = random.Random(0), tmp_path / "rows.parquet"
    texts = [generator.randbytes(12 + k % 30).hex() for k in range(150)]
    rows = pa.table({"text": texts, "image": [generator.randbytes(k % 60 + 1) for k in range(150)], "n": range(150)})
    pq.write_table(rows, path, row_group_size=60, **options)
    whole, outcomes = path.read_bytes(), Counter[str]()
    for k in range(300):
        damaged = bytearray(whole)
        start = generator.choice((0, max(len(whole) - 1500, 0)))  # the footer has more to say in fewer bytes
        for _ in range(generator.choice((1, 1, 1, 5))):
            damaged[generator.randrange(start, len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged[: generator.randrange(len(damaged))] if k % 20 == 0 else damaged)
        try:
            table = open_table(str(path), ["text", "image"])
            found = pa.concat_tables([read_slice(piece, ["text", "image"]) for piece in cut(table, 50)])
            got = list(zip(cells(found["text"]), cells(found["image"]), strict=True))
        except (TableError, EnvironmentFaultError) as error:
            outcomes["refused" if "rows.parquet" in str(error) else "refused without a name"] += 1
            continue
        assert len(got) == rows.num_rows
        wanted = list(zip(texts, rows["image"].to_pylist(), strict=True))
        outcomes["whole" if got == wanted else "altered"] += 1
    assert outcomes["refused"] > 90
    assert "refused without a name" not in outcomes
    if "write_page_checksum" in options:  # without, nobody can tell one value from another
        assert outcomes["altered"] == 0


def hostile_texts(count: int, seed: int) -> list[bytes]:
    """Texts of any code points and sizes, some of them no UTF-8."""
    generator = random.Random(seed)
    ranges = ((0, 0x20), (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x590, 0x700), (0xE00, 0xE80), (0x2000, 0x2070))
    ranges += ((0x3000, 0x3100), (0xD800, 0xE000), (0xFE00, 0x10000), (0x1F300, 0x1FA00), (0xE0000, 0xE0100))
    pieces = (
        "[SEP]",
        "<image>",
        "<|endoftext|>",
        "\0",
        "\u202e",
        "\u200d",
        "a\u0301" * 50,
        "\ud83d",
        "http://x/" + "y" * 99,
    )
    found = []
    for _ in range(count):
        some = [generator.choice(ranges) for _ in range(generator.randint(1, 3))]
        chars = [chr(generator.randrange(*generator.choice(some))) for _ in range(generator.choice((0, 1, 5, 50, 500)))]
        text = "".join(chars) + generator.choice(("", "", *pieces))
        data = bytearray(text.encode("utf-8", generator.choice(("surrogatepass", "replace"))))
        if data and generator.random() < 0.2:
            data[generator.randrange(len(data))] = generator.randrange(256)
        found.append(bytes(data))
    large = ("a" * 10**7, "\u0301" * 10**6, "a " * 10**6, "\u4e00" * 10**6, "." * 10**6, "\0" * 10**6, "'" * 10**6)
    return [*found, *(text.encode() for text in large), b"\xff" * 10**6]


def test_a_text_of_any_size_and_signs_is_scored_or_has_a_reason_and_its_neighbours_are_what_they_were() -> None:
    texts = hostile_texts(2000, seed=1)
    between = [text for k, bad in enumerate(texts) for text in (bad, (b"the red square", b"a blue one")[k % 2])]
    bundle = small_bundle(small_config(table={"image_column": None}, model={"fusion": {"kind": "concat"}}))
    predictor = Predictor(bundle, ImageSource([], 1), ScoreConfig())
    # As a file may have them: nobody has looked whether they are UTF-8.
    column = pa.Array.from_buffers(pa.large_string(), len(between), pa.array(between, pa.large_binary()).buffers())
    scored = predictor.score(pa.table({"text": column}))
    assert scored.num_rows == len(between)
    statuses, reasons = scored["status"].to_pylist(), scored["reason"].to_pylist()
    assert set(statuses) == {"ok", "failed"}
    assert set(reasons) == {None, "TEXT_EMPTY", "TEXT_INVALID"}
    alone = predictor.score(pa.table({"text": ["the red square", "a blue one"]}))["score"].to_pylist()
    assert scored["score"].to_pylist()[1::2] == pytest.approx((alone * len(texts))[: len(texts)], abs=1e-5)
    some = random.Random(2).sample(range(0, len(between), 2), 100)
    one_by_one = [predictor.score(pa.table({"text": column.slice(k, 1)})).select(["status", "reason"]) for k in some]
    assert [row.to_pylist()[0] for row in one_by_one] == [{"status": statuses[k], "reason": reasons[k]} for k in some]


def test_files_of_one_table_may_differ_in_type_and_order_but_not_lack_a_column(tmp_path: Path) -> None:
    rows = colour_table(tmp_path / "rows", rows=12, files=1)
    bundle = saved_bundle(tmp_path / "bundle", rows)
    table = pq.read_table(rows / "part-0.parquet").select(["id", "image_path", "text"])
    pictures = [(rows / path).read_bytes() for path in table["image_path"].to_pylist()]
    struct = pa.array([{"bytes": data, "path": None} for data in pictures])
    kept = tmp_path / "kept"
    drifted = {
        "plain": table,
        "large": table.cast(pa.schema([("id", pa.int16()), ("image_path", "large_string"), ("text", "large_string")])),
        "dictionary": table.set_column(2, "text", table["text"].dictionary_encode()),
        "bytes": table.set_column(1, "image_path", pa.array(pictures)),
        "struct": table.set_column(1, "image_path", struct),
        "order": table.select(["text", "id", "image_path"]).append_column("more", pa.array(range(12))),
        "none": table.set_column(2, "text", pa.nulls(12)),
    }
    kept.mkdir()
    for name, part in drifted.items():
        pq.write_table(part, kept / f"{name}.parquet", store_schema=name != "large")
    options = ScoreConfig(image_roots=(str(rows),), slice_rows=5)
    ledger = score_in_process(bundle, str(kept), str(tmp_path / "out"), options)
    assert ledger.rows == 12 * len(drifted)
    assert ledger.reasons == {"degraded/TEXT_NULL": 12}
    scores: dict[int, set[float]] = {}
    for path in (tmp_path / "out" / "data").iterdir():
        part = pq.read_table(path, columns=["id", "score", "status"]).to_pylist()
        for row in part:
            scores.setdefault(row["id"], set()).update({round(row["score"], 4)} if row["status"] == "ok" else ())
    assert [len(of_one_row) for of_one_row in scores.values()] == [1] * 12
    wrong = {"lacks": table.drop_columns("text"), "numbers": table.set_column(2, "text", table["id"])}
    for name, part in wrong.items():
        pq.write_table(part, kept / f"{name}.parquet")
        with pytest.raises(TableError, match=rf"{name}\.parquet.*text"):
            score_in_process(bundle, str(kept), str(tmp_path / "out-2"), options)
        (kept / f"{name}.parquet").unlink()
