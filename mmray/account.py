"""The account of a scored table, as sections of the report page: every row, reasons with examples, scores, what holds.

Reads a finished run -> gives a `Report`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmray.bundle_info import BundleInfo, read_info
from mmray.errors import BundleError, ConfigError, TableError
from mmray.histogram import HISTOGRAM_BINS, stability_index
from mmray.report.sections import (
    Curve,
    Headline,
    Histogram,
    ReasonCount,
    Report,
    ScoredGroup,
    Scoring,
    Speed,
    histogram,
)
from mmray.score.commit import Output
from mmray.score.ledger import Ledger
from mmray.score.pace import STAGES
from mmray.score.problems import problems
from mmray.score.scored import MAX_GROUPS, OTHERS, Group, grouped, image_weights
from mmray.score.verify import VerifyReport, verify_output
from mmray.table import Reason

MAX_EXAMPLES = 3  # of each reason
RATES = 30  # points of a rate over time


def scoring_report(
    output: str, bundle: str | None = None, before: str | None = None, *, by: str | None = None, samples: int = 0
) -> Report:
    """Returns the report page of a run that is complete.

    Args:
        output: scored folder.
        bundle: where the bundle is now; by default where the run had it.
        before: scored folder to compare with.
        by: column whose values group the rows.
        samples: rows to show with picture and text; none of either leaves the table otherwise.

    Raises:
        TableError: one of the outputs is not complete, or has no such column.
        BundleError: there is no bundle, or it is another.
        ConfigError: the scores of the two cannot be compared.
    """
    success, owner = _completed(output)
    uri = bundle or owner["bundle"]
    info, ledger = read_info(uri), Ledger.from_dict(success["ledger"])
    if info.fingerprint != success["fingerprint"]:
        raise BundleError(f"the bundle at {uri} is not the one that scored this; give that one with --bundle")
    others = {"in training": tuple(info.metrics["inputs"]["histogram"])} if "inputs" in info.metrics else {}
    if before is not None:
        others["before"] = _scores_before(before, info)
    verified = verify_output(output)
    section = scoring_section(
        ledger, success["slices"], info.score_range, verified, examples=_examples(output, ledger, verified)
    )
    if others:
        section["scores_elsewhere"] = _curves({"this run": ledger.histogram, **others}, info.score_range)
    if verified.passed:  # of what is broken, no more is said than that
        section |= _of_rows(output, by)  # type: ignore[typeddict-item]
    if verified.passed and samples:
        from mmray.score.samples import sample_scored  # seconds to load, which only they need

        section["samples"] = sample_scored(output, uri, owner, samples)
    if (pace := Output(output).pace()) is not None:
        section["speed"] = _speed(pace)
    return {
        "title": f"Scores of a {info.config.task.kind} model",
        "subtitle": f"{ledger.rows:,} rows of {owner['table']}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": _scoring_tiles(ledger, others),
        "scoring": section,
        "provenance": {
            "fingerprint": info.fingerprint,
            "bundle": uri,
            "versions": {"mmray": owner["mmray_version"]},
            "config": info.config.model_dump(mode="json"),
        },
    }


def _scoring_tiles(ledger: Ledger, others: Mapping[str, tuple[int, ...]]) -> list[Headline]:
    tiles: list[Headline] = [
        {"label": "rows scored", "value": ledger.count("ok") + ledger.count("degraded")},
        {"label": "rows without a score", "value": ledger.count("failed")},
    ]
    indices = {when: stability_index(other, ledger.histogram) for when, other in others.items()}
    return tiles + [
        {"label": f"stability index, scores {when}", "value": f"{index:.3f}"} for when, index in indices.items()
    ]


def _curves(histograms: Mapping[str, Sequence[int]], score_range: tuple[float, float]) -> list[Curve]:
    """Returns what share of the rows has which score."""
    edges = np.linspace(*score_range, HISTOGRAM_BINS + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    return [
        {"name": name, "points": [(at, count / max(sum(counts), 1)) for at, count in zip(middles, counts, strict=True)]}
        for name, counts in histograms.items()
    ]


def _of_rows(output: str, by: str | None) -> dict[str, Any]:
    """Returns what can only be said after a look at the rows."""
    found: dict[str, Any] = {}
    weights = image_weights(output)
    if len(weights):
        found["image_weight"] = {"value": float(weights.mean()), "rows": histogram(weights, 0.0, 1.0)}
    if by is not None:
        found["groups"] = {by: _groups(grouped(output, by))}
    return found


def _groups(groups: Sequence[Group]) -> list[ScoredGroup]:
    shown = list(groups[:MAX_GROUPS])
    if rest := groups[MAX_GROUPS:]:
        others = Group(OTHERS, score_sum=sum(g.score_sum for g in rest), scored=sum(g.scored for g in rest))
        others.statuses = dict(sum((Counter(group.statuses) for group in rest), Counter[str]()))
        shown.append(others)
    return [
        {
            "name": group.name,
            "rows": group.rows,
            "ok": group.statuses.get("ok", 0),
            "degraded": group.statuses.get("degraded", 0),
            "failed": group.statuses.get("failed", 0),
            "mean_score": group.mean_score,
        }
        for group in shown
    ]


def _speed(pace: Mapping[str, Any]) -> Speed:
    """Returns the rate over time, of rows that were done by some times, and what the time went to."""
    seconds, rows = (np.asarray(values, float) for values in zip(*([(0.0, 0.0), *pace["rows_over_time"]]), strict=True))
    edges = np.linspace(0, max(seconds[-1], 0.01), min(RATES, len(seconds) - 1) + 1)
    rates = np.diff(np.interp(edges, seconds, rows)) / np.diff(edges)
    total = sum(pace["stages"].values()) or 1.0
    return {
        "seconds": pace["seconds"],
        "rate": list(zip(((edges[1:] + edges[:-1]) / 2).round(2).tolist(), rates.round(1).tolist(), strict=True)),
        "stages": [(name, pace["stages"][key] / total) for key, name in STAGES.items() if key in pace["stages"]],
    }


def _scores_before(output: str, info: BundleInfo) -> tuple[int, ...]:
    """Returns the histogram of another run's scores."""
    success, _ = _completed(output)
    if info.config.task.kind == "regression" and success["fingerprint"] != info.fingerprint:
        raise ConfigError(f"{output!r} was scored by another regression, whose values cannot be compared; leave it out")
    return Ledger.from_dict(success["ledger"]).histogram


def _completed(output: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what `_SUCCESS` and `run.json` say."""
    target = Output(output)
    success, owner = target.success(), target.owner()
    if success is None or owner is None:
        raise TableError(f"{output!r} holds no complete run; finish it with the same `mmray score`")
    return success, owner


def _examples(output: str, ledger: Ledger, verified: VerifyReport) -> dict[str, list[str]]:
    """Returns `status/REASON` -> the first such rows: FILE:ROW and what was wrong; none of a broken output."""
    found: dict[str, list[str]] = {reason: [] for reason in ledger.reasons}
    wanted = sum(min(count, MAX_EXAMPLES) for count in ledger.reasons.values()) if verified.passed else 0
    rows = problems(output) if wanted else iter(())
    while wanted and (problem := next(rows, None)):
        examples = found[f"{problem.status}/{problem.reason}"]
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{problem.key}:{problem.row}  {problem.detail}")
            wanted -= 1
    return found


def scoring_section(
    ledger: Ledger,
    num_slices: int,
    score_range: tuple[float, float],
    verified: VerifyReport,
    *,
    seconds: float | None = None,
    rows_per_s: float | None = None,
    examples: Mapping[str, list[str]] | None = None,
) -> Scoring:
    """Returns the report's account of a scored and verified table."""
    edges = np.linspace(*score_range, HISTOGRAM_BINS + 1).tolist()
    scores: Histogram = {"edges": edges, "counts": list(ledger.histogram), "outside": 0}
    section: Scoring = {
        "ledger": {
            "rows": ledger.rows,
            "ok": ledger.count("ok"),
            "degraded": ledger.count("degraded"),
            "failed": ledger.count("failed"),
        },
        "reasons": _reasons(ledger, examples or {}),
        "slices": num_slices,
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
    if seconds is not None:
        section["seconds"] = seconds
    if rows_per_s is not None:
        section["rows_per_second"] = rows_per_s
    return section


def _reasons(ledger: Ledger, examples: Mapping[str, list[str]]) -> list[ReasonCount]:
    counts: list[ReasonCount] = []
    for key, count in ledger.reasons_by_count():
        status, reason = key.split("/")
        meaning = f"{Reason[reason].meaning} {Reason[reason].remedy}"
        about: ReasonCount = {"status": status, "reason": reason, "count": count, "meaning": meaning}
        counts.append({**about, "examples": examples[key]} if key in examples else about)
    return counts
