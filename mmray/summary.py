"""What a step did, in lines for a terminal and in sections for the report page."""

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmray import __version__
from mmray.evaluate import Evaluation
from mmray.metrics import PRIMARY, per_label
from mmray.report import Epoch, Headline, Histogram, Provenance, ReasonCount, Report, Scoring, histogram
from mmray.score.job import ScoreResult
from mmray.score.ledger import HISTOGRAM_BINS, Ledger
from mmray.score.verify import VerifyReport
from mmray.table import Reason


def metrics_table(evaluation: Evaluation) -> str:
    """Returns the metrics of each view as aligned text."""
    names = list(next(iter(evaluation.metrics.values())))
    lines = [" " * 16 + "".join(f"{name:>20}" for name in names)]
    for view, metrics in evaluation.metrics.items():
        lines.append(f"{view:<16}" + "".join(f"{_number(metrics[name]):>20}" for name in names))
    return "\n".join(
        [*lines, f"{evaluation.rows:,} rows, {evaluation.skipped:,} skipped (no known label or no prediction)"]
    )


def evaluation_report(evaluation: Evaluation, bundle: str) -> Report:
    """Returns the report page of an evaluation."""
    task = evaluation.info.config.task.kind
    report: Report = {
        "title": f"Evaluation of a {task} model",
        "subtitle": f"{evaluation.rows:,} labelled rows",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": evaluation_tiles(evaluation),
        "evaluation": {"task": task, "rows": evaluation.rows, "metrics": evaluation.metrics},
        "provenance": provenance(evaluation, bundle),
    }
    section, labels = report["evaluation"], list(evaluation.info.labels)
    if evaluation.confusion is not None:
        section["confusion"] = {"labels": labels, "counts": evaluation.confusion}
        section["per_label"] = [{**quality} for quality in per_label(evaluation.confusion, labels)]
    weights = evaluation.image_weight
    if len(weights):
        section["alpha"] = {"value": float(weights.mean()), "rows": histogram(weights, 0.0, 1.0)}
    section["training"] = [_epoch(entry, task) for entry in evaluation.info.metrics.get("history", [])]
    section["training_metric"] = PRIMARY[task]
    return report


def evaluation_tiles(evaluation: Evaluation) -> list[Headline]:
    """Returns the headline numbers of an evaluation: the main metric of each view."""
    metric = PRIMARY[evaluation.info.config.task.kind]
    return [
        {"label": f"{metric.replace('_', ' ')}, {view}", "value": _number(values[metric])}
        for view, values in evaluation.metrics.items()
    ]


def scoring_section(result: ScoreResult, score_range: tuple[float, float], verified: VerifyReport) -> Scoring:
    """Returns the report's account of a scored and verified table."""
    ledger = result.ledger
    edges = np.linspace(*score_range, HISTOGRAM_BINS + 1).tolist()
    scores: Histogram = {"edges": edges, "counts": list(ledger.histogram), "outside": 0}
    section: Scoring = {
        "ledger": {
            "rows": ledger.rows,
            "ok": ledger.count("ok"),
            "degraded": ledger.count("degraded"),
            "failed": ledger.count("failed"),
        },
        "reasons": _reasons(ledger),
        "slices": result.num_slices,
        "seconds": result.seconds,
        "scores": scores,
        "modalities": ledger.modalities,
        "verify": {
            "level": verified.level,
            "passed": verified.passed,
            "checks": [
                {"name": name, "passed": verified.passed, "detail": f"{count:,} checked"}
                for name, count in verified.checks.items()
            ],
        },
    }
    if result.steady_rows_per_s:
        section["rows_per_second"] = result.steady_rows_per_s
    return section


def provenance(evaluation: Evaluation, bundle: str) -> Provenance:
    """Returns what it takes to get the same numbers again."""
    return {
        "fingerprint": evaluation.info.fingerprint,
        "bundle": bundle,
        "command": " ".join(sys.argv),
        "versions": {"mmray": __version__, "python": platform.python_version()},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count() or 0},
        "config": evaluation.info.config.model_dump(mode="json"),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _epoch(entry: Mapping[str, Any], task: str) -> Epoch:
    epoch: Epoch = {"epoch": entry["epoch"], "train_loss": entry["train_loss"]}
    epoch["validation_loss"] = entry["validation_loss"]
    epoch["validation_metric"] = entry[PRIMARY[task]]
    epoch["image_weight"] = entry["image_weight"]
    return epoch


def _reasons(ledger: Ledger) -> list[ReasonCount]:
    counts: list[ReasonCount] = []
    for key, count in ledger.reasons_by_count():
        status, reason = key.split("/")
        counts.append({"status": status, "reason": reason, "count": count, "meaning": Reason[reason].meaning})
    return counts
