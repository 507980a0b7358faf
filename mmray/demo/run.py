"""Trains, evaluates, scores, verifies and reports on 2,000 and more real images, in a few minutes on two cores.

Reads `clipart.parquet` beside this file -> gives a folder to look around in; nothing is downloaded.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mmray.account import scoring_section
from mmray.config import Config
from mmray.config_file import load_config
from mmray.errors import ConfigError
from mmray.evaluate import Evaluation, evaluate_bundle
from mmray.report import write_report
from mmray.report.sections import Headline, Report
from mmray.score.job import ScoreResult, score_table
from mmray.score.verify import VerifyReport, verify_output
from mmray.summary import evaluation_report
from mmray.train.job import TrainResult, train_model

SCORED_FILES = 4
MARKER = ".mmray-demo"  # a folder without it is not ours to empty


def run_demo(folder: str, settings: Sequence[str] = ()) -> None:
    """Runs every step in a folder, which is emptied first if an earlier demo made it.

    Args:
        folder: to work in.
        settings: of the recipe, in place of its own: `section.key=value`.

    Raises:
        ConfigError: the folder holds something else.
    """
    root, console = _fresh_folder(folder), Console(highlight=False)
    seconds: dict[str, float] = {}
    with _timed("unpack", seconds, console):
        unpack(root)
    with _timed("train", seconds, console):
        trained = _train(demo_config(root, settings), console)
    with _timed("evaluate", seconds, console):
        evaluation = evaluate_bundle(trained.bundle, str(root / "clipart"), split="test")
    with _timed("score", seconds, console):
        scored = score_table(trained.bundle, str(root / "listings"), str(root / "scored"))
    with _timed("verify", seconds, console):
        verified = verify_output(str(root / "scored"), level=2)
    write_report(root, _report(evaluation, trained, scored, verified, seconds))
    _print_summary(console, root, evaluation, trained, scored, verified, seconds)


def unpack(root: Path) -> None:
    """Writes the images, the training table `clipart/` and the table to score `listings/` into a folder."""
    with as_file(files("mmray.demo") / "clipart.parquet") as path:
        table = pq.read_table(path)
    (root / "clipart" / "images").mkdir(parents=True)
    paths = [f"images/{key}.jpg" for key in table["id"].to_pylist()]
    for name, image in zip(paths, table["image"].to_pylist(), strict=True):
        (root / "clipart" / name).write_bytes(image)
    rows = table.drop_columns("image").add_column(1, "image_path", pa.array(paths))
    pq.write_table(rows, root / "clipart" / "clipart.parquet")
    _write_listings(root / "listings", rows.drop_columns("split"), root / "clipart")


def _write_listings(folder: Path, rows: pa.Table, images: Path) -> None:
    """Writes the table to score: several files, the images beside them, and rows that are wrong in every usual way."""
    folder.mkdir()
    shutil.copytree(images / "images", folder / "images", copy_function=os.link)
    shutil.copy(images / "clipart.parquet", folder / "images" / "not-an-image.jpg")
    (folder / "images" / "page.jpg").write_text("<html><body>404 Not Found</body></html>\n")
    whole = (folder / rows["image_path"][0].as_py()).read_bytes()
    (folder / "images" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "empty.jpg").write_bytes(b"")
    planted = [
        {"id": "bad-1", "image_path": "images/no-such-file.jpg", "text": "a cat on a roof"},
        {"id": "bad-2", "image_path": "images/truncated.jpg", "text": "a red car"},
        {"id": "bad-3", "image_path": "images/page.jpg", "text": "a computer screen"},
        {"id": "bad-4", "image_path": "images/empty.jpg", "text": "an apple"},
        {"id": "bad-5", "image_path": "../clipart/clipart.parquet", "text": "outside of the folder"},
        {"id": "bad-6", "image_path": rows["image_path"][0].as_py(), "text": None},
        {"id": "bad-7", "image_path": None, "text": "a yellow bird"},
        {"id": "bad-8", "image_path": None, "text": None},
        {"id": "bad-9", "image_path": "images/not-an-image.jpg", "text": "  "},
    ]
    everything = pa.concat_tables([rows, pa.Table.from_pylist(planted, rows.schema)])
    for k in range(SCORED_FILES):
        part = everything.take(list(range(k, everything.num_rows, SCORED_FILES)))
        pq.write_table(part, folder / f"part-{k}.parquet")


def demo_config(root: Path, settings: Sequence[str] = ()) -> Config:
    """Returns the demo's recipe, for a folder that `unpack` filled."""
    with as_file(files("mmray.demo") / "demo.toml") as recipe:
        overrides = [f"table.train={root / 'clipart'}", f"train.storage={root / 'runs'}", "train.name=demo"]
        return load_config(str(recipe), [*settings, *overrides])


def _fresh_folder(folder: str) -> Path:
    root = Path(folder).resolve()
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; give a folder with --dir")
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).exists():
            raise ConfigError(f"{root} holds files that are not a demo's; give another folder with --dir")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()
    return root


@contextmanager
def _timed(stage: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    started = time.perf_counter()
    console.print(f"[bold]{stage}[/bold] ...")
    yield
    seconds[stage] = time.perf_counter() - started


def _train(config: Config, console: Console) -> TrainResult:
    def show(entry: dict[str, float]) -> None:
        console.print(
            f"  epoch {entry['epoch']:>2}  loss {entry['train_loss']:.3f}  validation accuracy {entry['accuracy']:.3f}"
            f"  image weight {entry['image_weight']:.2f}"
        )

    return train_model(config, on_epoch=show)


def _report(
    evaluation: Evaluation,
    trained: TrainResult,
    scored: ScoreResult,
    verified: VerifyReport,
    seconds: dict[str, float],
) -> Report:
    report = evaluation_report(evaluation, trained.bundle)
    report["title"] = "mmray demo: pictures and their titles, in 13 categories"
    report["subtitle"] = "Open Clip Art, public domain; categories predicted from image and title together"
    tiles: list[Headline] = [
        {"label": "rows scored", "value": scored.ledger.rows},
        {"label": "rows without a score", "value": scored.ledger.count("failed")},
        {"label": "whole demo", "value": f"{sum(seconds.values()):.0f} s"},
    ]
    report["summary"] = [*report["summary"], *tiles]
    report["scoring"] = scoring_section(
        scored.ledger,
        scored.num_slices,
        evaluation.info.score_range,
        verified,
        seconds=scored.pace.seconds,
        rows_per_s=scored.pace.steady_rows_per_s,
    )
    return report


def _print_summary(
    console: Console,
    root: Path,
    evaluation: Evaluation,
    trained: TrainResult,
    scored: ScoreResult,
    verified: VerifyReport,
    seconds: dict[str, float],
) -> None:
    accuracy = {view: metrics["accuracy"] for view, metrics in evaluation.metrics.items()}
    console.print("\n[bold]test accuracy[/bold]  " + "   ".join(f"{view} {a:.3f}" for view, a in accuracy.items()))
    console.print("[bold]scored[/bold]         " + "\n               ".join(scored.lines()))
    state = "every row is there, once and in order" if verified.passed else "; ".join(verified.mismatches)
    console.print(f"[bold]verified[/bold]       {state}")
    console.print("[bold]seconds[/bold]        " + "  ".join(f"{stage} {s:.0f}" for stage, s in seconds.items()))
    here = {
        "bundle": trained.bundle,
        "scores": root / "scored" / "data",
        "report": root / "report.html",
    }
    for name, path in here.items():
        console.print(f"[bold]{name:<14}[/bold] {path}", soft_wrap=True)
