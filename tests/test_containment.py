"""Rows that kill: each is named, and costs nobody else anything."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from faults import faulty
from models import colour_table, saved_bundle, score_in_process, small_bundle
from processes import ALONE

from mmray.bundle import load_bundle, save_bundle
from mmray.errors import EnvironmentFaultError
from mmray.model import FusionModel
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.score.attempts import MAX_DEATHS, Attempts
from mmray.score.commit import Receipt
from mmray.score.isolate import Isolation
from mmray.score.job import while_few_die
from mmray.score.ledger import Ledger
from mmray.score.verify import verify_output
from mmray.slices import Slice
from mmray.source import ImageSource
from mmray.store import Store, open_store

ROWS, SLICE_ROWS = 10_000, 500
POISON = Path(__file__).parent / "poison"
# In two slices, so that two processes die: of the hang, and of what the model is given.
DEADLY = {
    3333: ("hang", "degraded", "DECODE_TIMEOUT"),
    3350: ("segfault", "degraded", "DECODE_CRASH"),
    3352: ("segfault", "degraded", "DECODE_CRASH"),  # in one batch with the other
    3399: ("devour", "degraded", "DECODE_OOM"),
    7777: (None, "failed", "MODEL_CRASH"),
}
DEADLY_TEXT = "red red red red red red red red"


def many_rows(folder: Path, *, deadly: bool) -> Path:
    """A table of small pictures; with the rows that kill, or with the same rows without a modality."""
    generator = np.random.default_rng(0)
    images = [cv2.imencode(".jpg", generator.integers(0, 255, (12, 16, 3), np.uint8))[1].tobytes() for _ in range(50)]
    texts = [f"the {colour} square, number {k}" for k, colour in enumerate(["red", "green", "blue"] * 30)]
    rows = {
        "id": list(range(ROWS)),
        "image_path": [images[k % 50] for k in range(ROWS)],
        "text": [texts[k % 90] for k in range(ROWS)],
    }
    for k, (death, _, _) in DEADLY.items():
        if death is None:
            rows["text"][k] = DEADLY_TEXT if deadly else None
            rows["image_path"][k] = rows["image_path"][k] if deadly else None
        else:
            rows["image_path"][k] = rows["image_path"][k] + death.encode() if deadly else None
    folder.mkdir()
    for k in range(2):
        part = {name: column[k * ROWS // 2 : (k + 1) * ROWS // 2] for name, column in rows.items()}
        pq.write_table(pa.table(part), folder / f"part-{k}.parquet")
    return folder


def mmray(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**ALONE, "PYTHONPATH": os.pathsep.join([str(POISON), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "mmray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.ray
@pytest.mark.parametrize("where", ["--local", pytest.param("--no-local", marks=pytest.mark.long)])
def test_rows_that_crash_hang_or_devour_memory_are_named_and_the_others_get_their_scores(
    tmp_path: Path, where: str
) -> None:
    bundle = saved_bundle(tmp_path / "bundle", colour_table(tmp_path / "clean", rows=60))
    table = many_rows(tmp_path / "deadly", deadly=True)
    options = ["--slice-rows", SLICE_ROWS, "--actors", 2, "--stuck-after", 3, where]
    run = mmray("score", bundle, table, tmp_path / "out", *options)
    assert run.returncode == 0, run.stderr
    assert verify_output(str(tmp_path / "out"), 2).passed
    scored = pyarrow.dataset.dataset(str(tmp_path / "out" / "data")).to_table().sort_by("id").to_pylist()
    named = {row["id"]: (row["status"], row["reason"]) for row in scored if row["status"] != "ok"}
    assert named == {k: (status, reason) for k, (_, status, reason) in DEADLY.items()}
    without = many_rows(tmp_path / "without", deadly=False)
    score_in_process(bundle, str(without), str(tmp_path / "alone"), ScoreConfig(slice_rows=SLICE_ROWS))
    alone = pyarrow.dataset.dataset(str(tmp_path / "alone" / "data")).to_table().sort_by("id").to_pylist()
    assert [row["score"] for row in scored] == [row["score"] for row in alone]
    assert Attempts(open_store(str(tmp_path / "out"))).left() == 0


@pytest.mark.slow
def test_where_more_rows_kill_than_a_few_it_is_not_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = saved_bundle(tmp_path / "bundle", colour_table(tmp_path / "clean", rows=60))
    table = pq.read_table(many_rows(tmp_path / "table", deadly=False) / "part-0.parquet").slice(0, 64)
    deadly = [cell + b"segfault" for cell in table["image_path"].to_pylist()]
    predictor = Predictor(load_bundle(bundle), ImageSource([], 2**20), ScoreConfig())
    monkeypatch.syspath_prepend(POISON)  # also the path of children
    with Isolation(predictor, bundle, [], lambda stage, seconds: None) as isolation:
        assert isolation.score(table).equals(predictor.score(table))
        with pytest.raises(EnvironmentFaultError, match=r"33 rows of a slice killed .* dies of SIGSEGV"):
            isolation.score(table.set_column(1, "image_path", pa.array(deadly)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=120)


def piece(index: int = 0) -> Slice:
    return Slice(index, "rows.parquet", "1", 0, 10)


def die_at(store: Store) -> None:
    """Begins an attempt in a process that dies."""
    child = os.fork()
    if not child:
        with Attempts(store).begin(piece()):
            os._exit(9)
    os.waitpid(child, 0)


def test_deaths_at_a_slice_are_counted_whoever_comes_next(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for before in range(MAX_DEATHS):
        with pytest.raises(KeyboardInterrupt), Attempts(open_store(str(tmp_path))).begin(piece()) as deaths:
            raise KeyboardInterrupt  # an end of its own, which does not count
        assert deaths == before
        die_at(store)
    with Attempts(store).begin(piece(1)) as deaths, Attempts(store).begin(piece(1)) as beside:
        assert deaths == beside == 0, "who lives has not died"
    with pytest.raises(EnvironmentFaultError, match="10 processes died at rows 0 to 9 of rows"):
        Attempts(store).begin(piece()).__enter__()
    with Attempts(store).begin(piece()) as deaths:
        assert deaths == 0, "the same command has another go"
    assert Attempts(store).left() == 0


def test_an_attempt_elsewhere_counts_as_a_death_unless_it_is_known_to_be_at_work(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.create("_mmray/attempts/000000000-1", b"another-boot pid:[1] 1 1 0123456789abcdef")
    with Attempts(store).begin(piece()) as deaths:
        assert deaths == 1
    with Attempts(store).begin(piece(), beside=1) as deaths:
        assert deaths == 0
    die_at(store)
    with Attempts(store).begin(piece(), beside=1) as deaths:
        assert deaths == 1


def test_an_answer_that_a_store_loses_is_no_death(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(s3_server, share=1 / 4) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        attempts = Attempts(open_store(f"{s3}/out"))
        for index in range(20):
            with attempts.begin(piece(index)) as deaths:
                assert deaths == 0
            assert attempts.left() == 0
        assert store.faults["PUT", "unanswered"]


def test_a_run_ends_where_more_processes_die_than_rows_that_kill_explain() -> None:
    receipts = [Receipt(k, "", 0, Ledger(), deaths=k % 2) for k in range(9)]
    assert list(while_few_die(receipts, allowed=4)) == receipts
    seen: list[Receipt] = []
    with pytest.raises(EnvironmentFaultError, match="the same command continues"):
        seen.extend(while_few_die(receipts, allowed=2))
    assert EnvironmentFaultError.exit_code == 5


def test_a_process_that_hangs_says_where_and_exits_even_where_nothing_else_can_run() -> None:
    code = (
        "import re, time; from mmray.score.watchdog import Watchdog; watchdog = Watchdog(0.5)\n"
        "with watchdog.watching():\n"
        "    with watchdog.paused(): time.sleep(0.6)\n"
        "    print('alive', flush=True); re.match(r'(a+)+$', 'a' * 60 + 'b')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "alive\n"
    assert run.returncode == 1
    assert "Timeout" in run.stderr
    assert 'File "<string>", line 4' in run.stderr


def test_a_batch_that_does_not_fit_in_memory_is_halved_and_so_are_those_after_it(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(rows / "part-0.parquet").slice(0, 30)
    predictor = Predictor(small_bundle(), ImageSource([str(rows)], 2**20), ScoreConfig(batch_size=16))
    want = predictor.score(table)
    encode, tried = FusionModel.encode, list[int]()

    def encode_few(self: FusionModel, arrays: Any) -> Any:
        tried.append(len(arrays["token_ids"]))
        if tried[-1] > room:
            torch.empty(2**50)  # which is how torch says it on a CPU
        return encode(self, arrays)

    room = 5
    monkeypatch.setattr(FusionModel, "encode", encode_few)
    scored = predictor.score(table)
    assert tried == [16, 8, 4, 4, 4, 4, 4, 4, 4, 2]
    assert scored["score"].to_pylist() == pytest.approx(want["score"].to_pylist(), abs=1e-6)
    assert scored.drop_columns(["score", "image_weight"]).equals(want.drop_columns(["score", "image_weight"]))
    room = 0
    with pytest.raises(EnvironmentFaultError, match="does not hold the model at one row"):
        predictor.score(table)


def test_a_few_outputs_that_are_not_finite_are_their_rows_and_most_of_a_slice_the_machines(
    rows: Path, tmp_path: Path
) -> None:
    def score(*words: str) -> dict[str, int]:
        bundle = small_bundle()
        assert bundle.vocabulary is not None
        embedding = bundle.weights["_encoders.text._words.embedding.weight"].clone()
        embedding[bundle.vocabulary.ids(words)] = torch.nan
        name = "-".join(words)
        weights = {**bundle.weights, "_encoders.text._words.embedding.weight": embedding}
        save_bundle(dataclasses.replace(bundle, weights=weights), str(tmp_path / name))
        return score_in_process(str(tmp_path / name), str(rows), str(tmp_path / f"{name}-out")).reasons

    assert score("red") == {"failed/NONFINITE_OUTPUT": 40}, "a third of each slice"
    with pytest.raises(EnvironmentFaultError, match="NaN or infinity for 40 of 60 rows of slice 0"):
        score("red", "green")
