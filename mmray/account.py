"""The account of a scored table, as sections of the report page: every row, reasons with examples, scores, what holds.

Reads a finished run -> gives a `Report`.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mmray.bundle_info import BundleInfo, read_info
from mmray.errors import BundleError, ConfigError, TableError
from mmray.histogram import HISTOGRAM_BINS, stability_index
from mmray.profile import Profile
from mmray.report.sections import Headline, Histogram, ReasonCount, Report, Scoring
from mmray.score.commit import Output
from mmray.score.ledger import Ledger
from mmray.score.problems import problems
from mmray.score.verify import VerifyReport, verify_output
from mmray.table import Reason

MAX_EXAMPLES = 3  # of each reason


def scoring_report(output: str, bundle: str | None = None, before: str | None = None) -> Report:
    """Returns the report page of a run that is complete.

    Args:
        output: scored folder.
        bundle: where the bundle is now; by default where the run had it.
        before: scored folder to compare with.

    Raises:
        TableError: one of the outputs is not complete.
        BundleError: there is no bundle, or it is another.
        ConfigError: the scores of the two cannot be compared.
    """
    success, owner = _completed(output)
    uri = bundle or owner["bundle"]
    info, ledger = read_info(uri), Ledger.from_dict(success["ledger"])
    if info.fingerprint != success["fingerprint"]:
        raise BundleError(f"the bundle at {uri} is not the one that scored this; give that one with --bundle")
    others = {"in training": Profile.from_dict(info.metrics["inputs"]).histogram} if "inputs" in info.metrics else {}
    if before is not None:
        others["before"] = _scores_before(before, info)
    verified = verify_output(output)
    return {
        "title": f"Scores of a {info.config.task.kind} model",
        "subtitle": f"{ledger.rows:,} rows of {owner['table']}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": _scoring_tiles(ledger, others),
        "scoring": scoring_section(
            ledger, success["slices"], info.score_range, verified, examples=_examples(output, ledger, verified)
        ),
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
        about: ReasonCount = {"status": status, "reason": reason, "count": count, "meaning": Reason[reason].meaning}
        counts.append({**about, "examples": examples[key]} if key in examples else about)
    return counts
