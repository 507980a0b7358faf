"""A report as one HTML page, from the templates beside this file; numbers as people read them.

Reads a `Report` in JSON's own types -> gives text. The page fetches nothing and runs nothing: it can be mailed,
printed and kept.
"""

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2

from mmray.report.axes import Line, axis, lines


def render(report: Mapping[str, Any]) -> str:
    """Returns the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmray", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "fixed": _fixed,
        "percent": _percent,
        "duration": _duration,
        "moment": _moment,
        "metric_title": metric_title,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "line": lambda curve: Line(curve["name"], curve["points"]),
        "metric_names": lambda metrics: list(dict.fromkeys(name for values in metrics for name in values)),
        "with_rows": lambda views: [(name, None, metrics) for name, metrics in views.items()],
        "group_lines": lambda groups: [(group["name"], group["rows"], group["metrics"]) for group in groups],
        "indented": lambda value: json.dumps(value, ensure_ascii=False, indent=2),
    }
    environment.globals |= {"axis": axis, "lines": lines}
    return environment.get_template("page.html.j2").render(report=report)


_NOTHING = "\u2013"  # en dash: no number, which is not the number zero


_SPELLED = {"auroc": "AUROC", "mae": "MAE", "rmse": "RMSE", "r2": "R\N{SUPERSCRIPT TWO}"}


def metric_title(name: str) -> str:
    """Returns the name of a metric as people write it."""
    return _SPELLED.get(name, name.replace("_", " ").replace("f1", "F1"))


def _number(value: str | float | None) -> str:
    """Thousands separators for whole numbers, about three digits for others; text stays as it is."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int):
        return _NOTHING if value is None else f"{value:,}"
    digits = 0 if value == 0 or abs(value) >= 100 else min(6, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _fixed(value: float | None) -> str:
    """Three decimals, so that a column of them lines up."""
    return _NOTHING if value is None else f"{value:,.3f}"


def _percent(part: int, whole: int) -> str:
    """One decimal, but never 0.0 % of some rows or 100.0 % of not quite all."""
    if whole == 0:
        return _NOTHING
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= share < 100 else f"{share:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _moment(iso: str) -> str:
    return datetime.fromisoformat(iso).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC")
