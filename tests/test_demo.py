"""The quick start, as it is typed, but for a smaller model of smaller images and fewer epochs."""

import json
from pathlib import Path

import pytest
from processes import mmray

SMALLER = ("train.epochs=7", "image.size=32", "model.image_encoder.channels=[16, 32, 64, 128]")


@pytest.mark.slow
def test_the_demo_does_what_it_says(tmp_path: Path) -> None:
    run = mmray("demo", "--dir", tmp_path / "demo", *(word for setting in SMALLER for word in ("--set", setting)))
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "demo" / "scored" / "_SUCCESS").exists()
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    accuracy = {view: metrics["accuracy"] for view, metrics in report["evaluation"]["metrics"].items()}
    assert accuracy["all modalities"] >= max(accuracy["image only"], accuracy["text only"]) + 0.04
    ledger = report["scoring"]["ledger"]
    assert ledger["rows"] == ledger["ok"] + ledger["degraded"] + ledger["failed"]
    assert {(r["status"], r["reason"]) for r in report["scoring"]["reasons"]} == {
        ("degraded", "MISSING"),
        ("degraded", "TRUNCATED"),
        ("degraded", "BAD_FORMAT"),
        ("degraded", "EMPTY_FILE"),
        ("degraded", "NOT_ALLOWED"),
        ("degraded", "TEXT_NULL"),
        ("degraded", "IMAGE_NULL"),
        ("failed", "IMAGE_NULL"),
        ("failed", "BAD_FORMAT"),
    }
    assert report["scoring"]["verify"]["passed"]
    assert mmray("demo", "--dir", tmp_path).returncode == 2, "a folder with other files is left alone"
