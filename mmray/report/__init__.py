"""A run as one page: `report.json` for programs, `report.html` for people.

Reads a `Report` (a mapping, every section optional) -> gives both in one folder.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmray.errors import EnvironmentFaultError
from mmray.report.render import render
from mmray.report.sections import Report, Scoring


def write_report(folder: Path | str, report: Report) -> None:
    """Writes `report.json` and `report.html` into a folder, which is made where it is missing.

    Numbers that are not finite become `null` in the JSON and a dash on the page: JSON has no word for them.

    Raises:
        EnvironmentFaultError: the folder cannot be written.
    """
    if "scoring" in report:
        _assert_balance(report["scoring"])
    plain = _plain(report)
    pages = {
        "report.json": json.dumps(plain, ensure_ascii=False, indent=2, sort_keys=True) + "\n",
        "report.html": render(plain),
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            # A command line may hold bytes that are not UTF-8; as \udcXX escapes they are valid JSON.
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise EnvironmentFaultError(
            f"cannot write the report to {str(folder)!r}: {error}; name a folder that can be written"
        ) from error


def _assert_balance(scoring: Scoring) -> None:
    ledger = scoring["ledger"]
    assert ledger["rows"] == ledger["ok"] + ledger["degraded"] + ledger["failed"], f"rows are lost: {ledger}"
    if "reasons" in scoring:
        for status, rows in (("degraded", ledger["degraded"]), ("failed", ledger["failed"])):
            explained = sum(item["count"] for item in scoring["reasons"] if item["status"] == status)
            assert explained == rows, f"{rows} rows are {status}, reasons explain {explained}"


def _plain(value: Any) -> Any:
    """Returns the value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
