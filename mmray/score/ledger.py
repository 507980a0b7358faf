"""The account of a run: how many rows went which way. Ledgers of slices add up to the ledger of the run.

rows = ok + degraded + failed, always.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mmray.histogram import HISTOGRAM_BINS, histogram_of


@dataclass(frozen=True)
class Ledger:
    """Counts over some rows of a scored table."""

    rows: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    """Status -> rows."""
    reasons: dict[str, int] = field(default_factory=dict)
    """`status/REASON` -> rows, for rows that are not ok."""
    modalities: dict[str, int] = field(default_factory=dict)
    """Modalities used -> rows."""
    histogram: tuple[int, ...] = (0,) * HISTOGRAM_BINS
    """Scored rows by score, in equal bins over the bundle's score range; what lies outside counts at the ends."""
    carried: int = 0
    """Rows that took over what they had been given before."""

    @classmethod
    def of(cls, table: pa.Table, score_range: tuple[float, float], carried: int = 0) -> "Ledger":
        """Counts a scored table, `carried` rows of which were not scored now."""
        statuses = table["status"].to_pylist()
        reasons = table["reason"].to_pylist()
        return cls(
            rows=table.num_rows,
            statuses=dict(Counter(statuses)),
            reasons=dict(Counter(f"{s}/{r}" for s, r in zip(statuses, reasons, strict=True) if r)),
            modalities=dict(Counter(table["modalities_used"].to_pylist())),
            histogram=histogram_of(table["score"].drop_null().to_numpy(), score_range),
            carried=carried,
        )

    @classmethod
    def total(cls, ledgers: Iterable["Ledger"]) -> "Ledger":
        """Adds ledgers up."""
        rows, carried, statuses, reasons, modalities = 0, 0, Counter[str](), Counter[str](), Counter[str]()
        histogram: tuple[int, ...] = (0,) * HISTOGRAM_BINS
        for ledger in ledgers:
            rows += ledger.rows
            carried += ledger.carried
            statuses.update(ledger.statuses)
            reasons.update(ledger.reasons)
            modalities.update(ledger.modalities)
            histogram = tuple(a + b for a, b in zip(histogram, ledger.histogram, strict=True))
        assert rows == statuses.total() == modalities.total(), "a ledger balances"
        return cls(rows, dict(statuses), dict(reasons), dict(modalities), histogram, carried)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Ledger":
        """Reads what `to_dict` wrote."""
        return cls(**{**raw, "histogram": tuple(raw["histogram"])})

    def to_dict(self) -> dict[str, Any]:
        """Returns a mapping for JSON."""
        return {**vars(self)}

    def count(self, status: str) -> int:
        """Returns the rows of a status."""
        return self.statuses.get(status, 0)

    def reasons_by_count(self) -> list[tuple[str, int]]:
        """Returns `status/REASON` and rows, the most frequent first."""
        return sorted(self.reasons.items(), key=lambda item: -item[1])
