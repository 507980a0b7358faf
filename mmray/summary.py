"""What a step did, in lines for a terminal and in sections for the report page."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmray import __version__
from mmray.curves import against_the_rest, precision_recall, reliability, roc, scatter
from mmray.evaluate import LATE, Evaluation
from mmray.labelled import FUSED, USED
from mmray.metrics import CALIBRATION_BINS, PRIMARY, confusion_matrix, per_label
from mmray.report.render import metric_title
from mmray.report.sections import Epoch, Headline, Provenance, Report, histogram
from mmray.report.sections import Evaluation as Section

TRAINED_ON = ("train_rows", "unlabelled_rows", "validation_rows", "unlabelled_validation_rows")
MAX_CONFUSED = 60  # labels: a larger matrix cannot be read


def evaluation_text(evaluation: Evaluation) -> str:
    """Returns what was measured as aligned tables: each view, groups of rows, and the sweep of alpha."""
    tables = [
        _table("view", list(evaluation.metrics.items())),
        f"{evaluation.rows:,} rows, {evaluation.skipped:,} skipped (no known label or no prediction)",
    ]
    for by, groups in evaluation.groups.items():
        if by != USED or len(groups) > 1:
            tables += ["", _table(by, [(group.name, group.metrics) for group in groups], [g.rows for g in groups])]
    if evaluation.sweep:
        metric = PRIMARY[evaluation.info.config.task.kind]
        alphas = "".join(f"{alpha:>8.1f}" for alpha in evaluation.sweep)
        values = "".join(f"{_number(metrics.get(metric)):>8}" for metrics in evaluation.sweep.values())
        own = float(evaluation.image_weight.mean())
        tables += ["", f"{'alpha':<18}{alphas}", f"{metric:<18}{values}   the model's own alpha: {own:.3f}"]
    return "\n".join(tables)


def _table(
    what: str, lines: Sequence[tuple[str, Mapping[str, float | None]]], rows: Sequence[int] | None = None
) -> str:
    names = list(dict.fromkeys(name for _, metrics in lines for name in metrics))
    widths = [max(len(name), 7) + 2 for name in names]
    first = max(18, *(len(name) + 2 for name, _ in lines))
    heads = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    texts = [f"{what:<{first}}{'rows':>8}{heads}" if rows else f"{what:<{first}}{heads}"]
    for k, (name, metrics) in enumerate(lines):
        values = "".join(f"{_number(metrics.get(n)):>{width}}" for n, width in zip(names, widths, strict=True))
        texts.append(f"{name:<{first}}{rows[k]:>8,}{values}" if rows else f"{name:<{first}}{values}")
    return "\n".join(texts)


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the numbers of an evaluation for `metrics.json`."""
    return {
        "fingerprint": evaluation.info.fingerprint,
        "table": evaluation.table,
        "split": evaluation.split,
        "rows": evaluation.rows,
        "skipped": evaluation.skipped,
        "metrics": evaluation.metrics,
        "groups": {by: [asdict(group) for group in groups] for by, groups in evaluation.groups.items()},
        "alpha_sweep": [{"alpha": alpha, **metrics} for alpha, metrics in evaluation.sweep.items()],
    }


def evaluation_report(evaluation: Evaluation, bundle: str) -> Report:
    """Returns the report page of an evaluation."""
    task = evaluation.info.config.task.kind
    return {
        "title": f"Evaluation of a {task} model",
        "subtitle": f"{evaluation.rows:,} labelled rows",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": evaluation_tiles(evaluation),
        "evaluation": _evaluation_section(evaluation, task),
        "provenance": provenance(evaluation, bundle),
    }


def _evaluation_section(evaluation: Evaluation, task: str) -> Section:
    section: Section = {"task": task, "rows": evaluation.rows, "metrics": evaluation.metrics}
    section["groups"] = {
        by: [{"name": group.name, "rows": group.rows, "metrics": group.metrics} for group in groups]
        for by, groups in evaluation.groups.items()
        if by != USED or len(groups) > 1
    }
    weights = evaluation.image_weight
    if len(weights):
        section["alpha"] = {"value": float(weights.mean()), "rows": histogram(weights, 0.0, 1.0)}
        section["alpha"]["sweep"] = [{"alpha": alpha, **metrics} for alpha, metrics in evaluation.sweep.items()]
        section["alpha"]["sweep_metric"] = PRIMARY[task]
    if task == "regression":
        section["scatter"] = scatter(evaluation.outputs[FUSED][:, 0], evaluation.targets)
    else:
        _add_labels(section, evaluation, task)
    section["mistakes"] = [{**mistake} for mistake in evaluation.mistakes]
    if history := evaluation.info.metrics.get("history"):
        section["training"] = [_epoch(entry, task) for entry in history]
        section["training_metric"] = PRIMARY[task]
    section["facts"] = _facts(evaluation)
    return section


def _add_labels(section: Section, evaluation: Evaluation, task: str) -> None:
    labels = list(evaluation.info.labels)
    known = {name: np.isfinite(view).all(axis=1) for name, view in evaluation.outputs.items()}
    seen = {name: (view[known[name]], evaluation.targets[known[name]]) for name, view in evaluation.outputs.items()}
    pooled = {name: against_the_rest(task, *view) for name, view in seen.items() if name != LATE and len(view[0])}
    outputs, targets = seen[FUSED]
    if task != "multilabel" and len(labels) <= MAX_CONFUSED:
        section["confusion"] = {"labels": labels, "counts": confusion_matrix(outputs, targets)}
    section["per_label"] = [{**quality} for quality in per_label(task, outputs, targets, labels)]
    section["roc"] = [{"name": name, "points": roc(pairs)} for name, pairs in pooled.items()]
    section["precision_recall"] = [{"name": n, "points": precision_recall(pairs)} for n, pairs in pooled.items()]
    section["reliability"] = reliability(task, outputs, targets, CALIBRATION_BINS)


def _facts(evaluation: Evaluation) -> dict[str, str | int | float]:
    """Returns what was measured, in a few words each; the whole configuration stands below it."""
    config, trained = evaluation.info.config, evaluation.info.metrics
    model, modalities = config.model, config.table.modalities
    facts: dict[str, str | int | float] = {"table": evaluation.table}
    if evaluation.split is not None:
        facts["split"] = evaluation.split
    facts |= {"rows measured": evaluation.rows, "rows skipped": evaluation.skipped}
    facts |= {name.replace("_", " "): trained[name] for name in TRAINED_ON if trained.get(name)}
    if evaluation.info.labels:
        facts["labels"] = len(evaluation.info.labels)
    encoders = {"image": model.image_encoder, "text": model.text_encoder}
    facts |= {f"{name} encoder": str(getattr(encoders[name], "name", encoders[name].kind)) for name in modalities}
    alpha = getattr(model.fusion, "alpha", None)
    facts["fusion"] = model.fusion.kind.replace("_", " ") + (f", alpha {alpha}" if alpha else "")
    facts["loss"] = str(getattr(config.task, "loss", "binary cross-entropy")).replace("_", " ")
    if getattr(config.task, "calibrate", False):
        facts["temperature"] = trained["validation"]["temperature"]
    return facts


def evaluation_tiles(evaluation: Evaluation) -> list[Headline]:
    """Returns the headline numbers of an evaluation: the main metric of each view."""
    metric = PRIMARY[evaluation.info.config.task.kind]
    return [
        {"label": f"{metric_title(metric)}, {view}", "value": _number(values[metric])}
        for view, values in evaluation.metrics.items()
    ]


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
