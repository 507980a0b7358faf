"""A report is two files that say the same: one for programs, one for people."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mmray.errors import EnvironmentFaultError
from mmray.report import write_report
from mmray.report.sections import Evaluation, Ledger, Report, Scoring, histogram


def evaluation() -> Evaluation:
    return {
        "task": "multiclass",
        "rows": 959,
        "metrics": {
            "image and text": {"accuracy": 0.7123, "macro_f1": 0.604},
            "text only": {"accuracy": 0.628},
        },
        "confusion": {"labels": ["animals", "<script>alert(1)</script>"], "counts": [[27, 3], [0, 41]]},
        "per_label": [{"label": "plants", "support": 17, "precision": None, "recall": 0.471, "f1": 0.219}],
        "alpha": {"value": 0.374, "rows": histogram(np.array([0.2, 0.4, 0.41]), 0, 1)},
        "training": [
            {
                "epoch": epoch,
                "train_loss": 2.1 / epoch,
                "validation_loss": 1.9 / epoch,
                "validation_metric": 0.41 * epoch,
                "image_weight": 0.48 / epoch,
            }
            for epoch in (1, 2)
        ],
        "training_metric": "validation_accuracy",
    }


def scoring() -> Scoring:
    return {
        "ledger": {"rows": 3000, "ok": 2913, "degraded": 62, "failed": 25},
        "reasons": [
            {"status": "degraded", "reason": "MISSING", "count": 62, "meaning": "No file at the image path."},
            {"status": "failed", "reason": "BAD_FORMAT", "count": 25, "meaning": "Of no supported format."},
        ],
        "slices": 12,
        "seconds": 7.27,
        "rows_per_second": 412.7,
        "scores": histogram(np.linspace(0, 1, 2975), 0, 1),
        "modalities": {"image+text": 2913, "text": 62, "": 25},
        "verify": {
            "level": 2,
            "passed": True,
            "checks": [{"name": "rows", "passed": True, "detail": "in order"}],
        },
    }


def report() -> Report:
    return {
        "title": "openclipart & friends",
        "subtitle": "13 labels",
        "created": "2025-11-24T15:32:10+00:00",
        "summary": [{"label": "rows", "value": 3000}, {"label": "accuracy", "value": 0.7123}],
        "evaluation": evaluation(),
        "scoring": scoring(),
        "provenance": {
            "fingerprint": "9f2c4a7b",
            "bundle": "https://store/bundle",
            "command": "mmray score a b",
            "machine": {"cores": 2},
            "versions": {"numpy": "2.4.0"},
            "config": {"train": {"epochs": 10}},
        },
    }


class Page(HTMLParser):
    """What a browser would find: elements, the words of each, and every address."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.unnamed_images = 0
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.unnamed_images += attributes.get("role") == "img" and not attributes.get("aria-label")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def written(folder: Path, content: Report) -> Page:
    write_report(folder, content)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_shows_each_section(tmp_path: Path) -> None:
    text = written(tmp_path, report()).text
    for words in (
        "openclipart & friends", "2025-11-24 15:32 UTC", "rows 3,000", "accuracy 0.712",
        "Evaluation", "Multiclass on 959 labelled rows", "What each view is worth", "macro F1", "Confusion",
        "plants 17 0.219 \N{EN DASH} 0.471", "image 0.374", "Loss", "Validation accuracy", "Epochs",
        "Scoring", "3,000 rows in 12 slices, 7.3 s, 413 rows per second", "No file at the image path.",
        "Scores", "image+text 2,913 97.1 %", "none 25", "Level 2 passed",
        "Provenance", "9f2c4a7b", "https://store/bundle", "mmray score a b", "cores 2", '"epochs": 10',
    ):  # fmt: skip
        assert words in text


def test_sections_that_are_missing_are_left_out(tmp_path: Path) -> None:
    text = written(tmp_path, {"title": "only a title"}).text
    assert "only a title" in text
    for heading in ("Evaluation", "Scoring", "Provenance"):
        assert heading not in text


def test_optional_parts_of_a_section_are_left_out(tmp_path: Path) -> None:
    content: Report = {
        "evaluation": {"task": "regression", "rows": 5, "metrics": {"text only": {"rmse": 1.25}}},
        "scoring": {"ledger": {"rows": 1, "ok": 1, "degraded": 0, "failed": 0}},
    }
    page = written(tmp_path, content)
    assert "1.250" in page.text
    for heading in ("Confusion", "Labels", "Loss", "Epochs", "Scores", "Verification", "Why rows are not ok"):
        assert heading not in page.text


def test_labels_are_text_and_never_markup(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") == 2  # the label heads a row and a column


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    assert page.addresses == ["data:,"]  # an empty icon, so that browsers do not ask for one
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html


def test_every_chart_has_a_name_and_every_table_a_caption(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    assert page.unnamed_images == 0
    assert page.tags.count("caption") == page.tags.count("table") == 7


def test_the_json_gives_the_report_back(tmp_path: Path) -> None:
    write_report(tmp_path, report())
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report()


def test_the_order_of_the_sections_changes_no_byte(tmp_path: Path) -> None:
    write_report(tmp_path / "a", report())
    write_report(tmp_path / "b", cast(Report, dict(reversed(report().items()))))
    for name in ("report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_numpy_numbers_are_numbers_and_nan_is_null_and_a_dash(tmp_path: Path) -> None:
    metrics = {"text only": {"auroc": float("nan"), "accuracy": np.float32(0.5)}}
    section: Any = {"task": "binary", "rows": np.int64(4), "metrics": metrics}
    page = written(tmp_path, {"evaluation": section})
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["evaluation"]
    assert stored == {"task": "binary", "rows": 4, "metrics": {"text only": {"auroc": None, "accuracy": 0.5}}}
    assert "text only \N{EN DASH} 0.500" in page.text


def test_a_command_with_bytes_that_are_not_utf8_comes_back(tmp_path: Path) -> None:
    write_report(tmp_path, {"provenance": {"command": "mmray score caf\udce9"}})
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["provenance"]["command"] == "mmray score caf\udce9"


def test_a_ledger_that_loses_a_row_is_our_bug(tmp_path: Path) -> None:
    content: Report = {"scoring": {"ledger": {"rows": 10, "ok": 7, "degraded": 1, "failed": 1}}}
    with pytest.raises(AssertionError, match="rows are lost"):
        write_report(tmp_path, content)
    assert list(tmp_path.iterdir()) == []


def test_reasons_that_do_not_explain_every_failed_row_are_our_bug(tmp_path: Path) -> None:
    section = scoring()
    section["reasons"][1]["count"] = 24
    with pytest.raises(AssertionError, match="25 rows are failed, reasons explain 24"):
        write_report(tmp_path, {"scoring": section})


def test_shares_never_round_to_nothing_or_to_everything(tmp_path: Path) -> None:
    ledger: Ledger = {"rows": 4_312_553_201, "ok": 4_312_553_200, "degraded": 0, "failed": 1}
    text = written(tmp_path, {"scoring": {"ledger": ledger}}).text
    for words in ("4,312,553,201", "ok, > 99.9 %", "degraded, 0.0 %", "failed, < 0.1 %"):
        assert words in text


@pytest.mark.parametrize("size", [2, 30])
def test_a_confusion_matrix_of_any_size_has_a_cell_for_each_pair(tmp_path: Path, size: int) -> None:
    labels = [f"label {index}" for index in range(size)]
    content: Report = {
        "evaluation": {
            "task": "multiclass",
            "rows": size,
            "metrics": {"text only": {"accuracy": 1.0}},
            "confusion": {"labels": labels, "counts": np.eye(size, dtype=int).tolist()},
        }
    }
    page = written(tmp_path, content)
    assert page.tags.count("td") == size * size + 1  # and the one metric


def test_a_label_without_rows_has_an_empty_row_of_counts(tmp_path: Path) -> None:
    section = evaluation()
    section["confusion"] = {"labels": ["seen", "unseen"], "counts": [[3, 0], [0, 0]]}
    assert "unseen 0 0" in written(tmp_path, {"evaluation": section}).text


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5], [None, 0.0], [-3.0, 4e9], [float("nan")] * 2])
def test_any_course_of_training_can_be_shown(tmp_path: Path, losses: list[float | None]) -> None:
    section = evaluation()
    section["training"] = [{"epoch": index, "train_loss": loss} for index, loss in enumerate(losses)]
    assert "Epochs" in written(tmp_path, {"evaluation": section}).text


def test_a_score_histogram_marks_its_axes_in_round_numbers(tmp_path: Path) -> None:
    content: Report = {"scoring": scoring()}
    text = written(tmp_path, content).text
    assert "0 50 100 150 0 0.2 0.4 0.6 0.8 1.0" in text
    assert "0.95 to 1: 149 rows" in text


def test_a_histogram_counts_what_lies_outside_it() -> None:
    result = histogram(np.array([-1.0, 0.0, 0.5, 1.0, 1.5, np.nan, np.inf]), 0, 1, bins=2)
    assert result == {"edges": [0.0, 0.5, 1.0], "counts": [1, 2], "outside": 4}


def test_values_outside_a_histogram_are_told(tmp_path: Path) -> None:
    section = scoring()
    section["scores"] = histogram(np.array([0.5, 7.0, 8.0]), 0, 1)
    assert "2 rows lie outside this range" in written(tmp_path, {"scoring": section}).text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(EnvironmentFaultError, match=r"cannot write the report to '.*taken'.*name a folder"):
        write_report(tmp_path / "taken", report())


def test_curves_groups_and_mistakes_are_drawn_and_still_nothing_is_fetched(tmp_path: Path) -> None:
    section = evaluation()
    section["groups"] = {"shop": [{"name": "<b>north", "rows": 7, "metrics": {"accuracy": 0.25}},
                                  {"name": "south", "rows": 1, "metrics": {}}]}  # fmt: skip
    section["alpha"]["sweep"] = [{"alpha": 0.0, "accuracy": 0.6}, {"alpha": 1.0, "accuracy": None}]
    section["alpha"]["sweep_metric"] = "accuracy"
    section["roc"] = section["precision_recall"] = [{"name": "text only", "points": [(0, 0), (0.5, 1), (1, 1)]}]
    section["reliability"] = [{"confidence": 0.9, "accuracy": 0.6, "rows": 12}]
    section["scatter"] = [(1.0, 2.0), (3.0, 3.0)]
    section["facts"] = {"rows skipped": 1234}
    section["mistakes"] = [
        {"row": "part-0.parquet:5", "wrongness": 4.0, "label": "animals", "predicted": "<i>tools", "probability": 0.966,
         "text": "<img src=x>", "thumbnail": "data:image/jpeg;base64,AAAA"},
        {"row": "part-0.parquet:6", "wrongness": 3.0, "label": "a", "predicted": "b", "probability": None,
         "text": None, "thumbnail": None},
    ]  # fmt: skip
    page = written(tmp_path, {"evaluation": section})
    for words in (
        "By shop", "<b>north 7 0.250", "south 1 \N{EN DASH}", "Accuracy at other weights", "the model's own: 0.374",
        "ROC", "Precision and recall", "predicted 0.900, came true 0.600, 12 predictions", "Prediction by target",
        "rows skipped 1,234", "<img src=x>", "animals predicted as <i>tools 0.966", "no image", "no text",
    ):  # fmt: skip
        assert words in page.text
    assert page.tags.count("img") == 1
    assert page.addresses == ["data:,", "data:image/jpeg;base64,AAAA"]
    assert page.unnamed_images == 0
    assert page.tags.count("caption") == page.tags.count("table")
