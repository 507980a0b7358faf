"""Ten mistakes of a first hour: what each is answered with, word for word."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import colour_table, score_in_process

from mmray.cli import main
from mmray.options import ScoreConfig


def told(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> str:
    """What a command answers on the terminal, in its last line."""
    assert main([str(word) for word in argv]) == code
    captured = capsys.readouterr()
    return (captured.err if code else captured.out).splitlines()[-1]


def with_images(rows: Path, folder: Path, paths: list[object]) -> Path:
    """A table of the first rows with other image cells."""
    table = pq.read_table(rows / "part-0.parquet").slice(0, len(paths))
    pq.write_table(table.set_column(1, "image_path", pa.array(paths)), folder / "other.parquet")
    return folder / "other.parquet"


def test_a_wrong_column(rows: Path, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, 2, "plan", bundle, rows, "--image-column", "img_path") == (
        f"mmray: error: {rows}/part-0.parquet has no column 'img_path'; did you mean 'image_path'? "
        "It has: id, image_path, text, label, value, both, is_red; "
        "name the right one with --image-column or --text-column"
    )


def test_a_wrong_column_to_train_on(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(f'[table]\ntrain = "{rows}"\nimage_column = "photo"\n')
    assert told(capsys, 2, "train", tmp_path / "run.toml") == (
        f"mmray: error: {rows}/part-0.parquet has no column 'photo'. "
        "It has: id, image_path, text, label, value, both, is_red; "
        "name the right one as table.image_column, text_column, label_column or split_column"
    )


def test_a_csv_becomes_a_table_by_the_command_that_its_refusal_names(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.read_table(rows / "part-0.parquet").drop_columns("both").to_pandas().to_csv(tmp_path / "mü rows 😀.csv")
    command = told(capsys, 2, "score", bundle, tmp_path / "mü rows 😀.csv", tmp_path / "out")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command.removeprefix("make it parquet: "), shell=True, check=True, env={"PATH": path})
    ledger = score_in_process(
        bundle, str(tmp_path / "mü rows 😀.parquet"), str(tmp_path / "out"), ScoreConfig(image_roots=(str(rows),))
    )
    assert ledger.statuses == {"ok": 20}


def test_a_wrong_root(rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, 5, "plan", bundle, rows, "--image-root", "/nowhere") == (
        "mmray: error: cannot open the image root /nowhere: No such file or directory; "
        "mount it here, or correct the root"
    )
    assert told(capsys, 0, "plan", bundle, rows, "--image-root", tmp_path) == (
        f"hint         most images are not where they are looked for, relative paths beneath {tmp_path}; "
        "give the folder that they are relative to with --image-root"
    )


@pytest.mark.slow
def test_paths_that_are_relative_to_another_folder(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = pq.read_table(rows / "part-0.parquet")["image_path"].to_pylist()
    table = with_images(rows, tmp_path, [f"rows/{path}" for path in paths])
    assert main(["score", bundle, str(table), str(tmp_path / "out")]) == 0
    assert (
        f"hint: most images are not where they are looked for, relative paths beneath {tmp_path}; "
        "give the folder that they are relative to with --image-root"
    ) in capsys.readouterr().out.splitlines()


def test_urls_without_permission(rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = with_images(rows, tmp_path, [f"https://example.org/{k}.jpg" for k in range(4)])
    assert told(capsys, 0, "plan", bundle, table) == (
        f"hint         most images lie outside of {tmp_path} or may not be opened; allow where they lie with "
        "--image-root, a folder, s3://BUCKET or https://HOST, or give the right to read them"
    )


def test_a_folder_of_pngs_named_jpg(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import cv2

    for k in range(4):
        _, data = cv2.imencode(".png", cv2.imread(str(rows / "images" / f"{k}.jpg")))
        (tmp_path / f"{k}.jpg").write_bytes(data.tobytes())
    table = with_images(rows, tmp_path, [f"{k}.jpg" for k in range(4)])
    assert main(["plan", bundle, str(table)]) == 0
    assert "sample       4 of 4 rows ok" in capsys.readouterr().out.splitlines()


def test_numbers_as_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = colour_table(tmp_path / "many", rows=120)
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f'[table]\ntrain = "{many}"\nlabel_column = "value"\n[task]\nkind = "multiclass"\n'
        f'[train]\nstorage = "{tmp_path}/runs"\n'
    )
    assert re.fullmatch(
        r"mmray: error: the label column 'value' holds (\d+) different labels in \1 rows, too many to learn any; for "
        r"numbers set task\.kind = 'regression', else name the right column with table\.label_column",
        told(capsys, 2, "train", recipe),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there(rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'[table]\ntrain = "{rows}"\n[train]\nuse_gpu = true\nstorage = "{tmp_path}/runs"\n')
    assert told(capsys, 2, "train", recipe) == (
        "mmray: error: train.use_gpu = true, and this machine has no GPU that torch can use; set it to false"
    )
    assert told(capsys, 2, "score", bundle, rows, tmp_path / "out", "--gpus", 1) == (
        "mmray: error: 1 GPUs for each process were asked for, and this machine has 0; leave --gpus out, or run where "
        "there are some"
    )


def test_too_little_memory(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = colour_table(tmp_path / "rows", rows=2000)
    assert re.fullmatch(
        r"mmray: error: 2000 processes of [\d,]+ MiB need [\d,]+ MiB, and this machine has [\d,]+ MiB to spare; give "
        r"--actors \d+",
        told(capsys, 2, "plan", bundle, rows, "--slice-rows", 1, "--actors", 2000),
    )


def test_an_output_that_is_finished_or_anothers(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_in_process(bundle, str(rows), str(tmp_path / "out"), ScoreConfig())
    assert main(["score", bundle, str(rows), str(tmp_path / "out")]) == 0
    assert "the run was complete already; nothing was scored" in capsys.readouterr().out.splitlines()
    assert told(capsys, 3, "score", bundle, rows, tmp_path / "out", "--probabilities") == (
        f"mmray: error: {tmp_path}/out belongs to another run (other options); give another output folder"
    )


def test_a_bundle_of_another_version(
    rows: Path, bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle, tmp_path / "old")
    manifest = tmp_path / "old" / "bundle.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    assert told(capsys, 2, "score", tmp_path / "old", rows, tmp_path / "out") == (
        f"mmray: error: {tmp_path}/old is a bundle of format 2; this mmray reads format 3: train it again, or use the "
        "mmray version that made it"
    )
