"""The class that Ray Data makes actors of: a scoring actor, whose model and torch the driver does without."""

from typing import Any

import pyarrow as pa


class Placed:
    """A `ScoringActor`, loaded where it runs."""

    def __init__(self, *arguments: Any) -> None:
        from mmray.score.actor import ScoringActor

        self._actor = ScoringActor(*arguments)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Scores slices."""
        return self._actor(rows)
