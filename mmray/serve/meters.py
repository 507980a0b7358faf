"""What a replica counts. Every Ray node exports it for Prometheus, beside Serve's own counts of requests."""

from collections import Counter as Tally
from collections.abc import Sequence

from ray.serve.metrics import Counter, Gauge, Histogram

from mmray.serve.schema import Result


class Meters:
    """The counters of one replica; Serve adds its deployment and replica to each as tags."""

    def __init__(self) -> None:
        self._items = Counter("mmray_items", "Items answered.", tag_keys=("status", "reason"))  # type: ignore[arg-type]
        self._size = Histogram("mmray_batch_items", "Items of a forward pass.", [1, 2, 4, 8, 16, 32, 64, 128])
        self._seconds = Histogram(
            "mmray_batch_seconds", "Seconds of a forward pass.", [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5]
        )
        self._model = Gauge("mmray_model", "1 for the bundle that answers, 0 for others.", tag_keys=("fingerprint",))
        self._fingerprint = ""

    def batch(self, results: Sequence[Result], seconds: float) -> None:
        """Counts a forward pass."""
        for (status, reason), items in Tally((result.status, result.reason or "") for result in results).items():
            self._items.inc(items, {"status": status, "reason": reason})
        self._size.observe(len(results))
        self._seconds.observe(seconds)

    def model(self, fingerprint: str) -> None:
        """Says which bundle answers from now on."""
        if self._fingerprint:
            self._model.set(0, {"fingerprint": self._fingerprint})
        self._model.set(1, {"fingerprint": fingerprint})
        self._fingerprint = fingerprint
