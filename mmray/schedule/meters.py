"""When the holder of a lease last showed that it lives; `time()` minus it is the lease's age."""

import time
from functools import cache

import ray
from ray.util.metrics import Gauge


def beat() -> None:
    """Exports the time of a beat for Prometheus, where this process is connected to a cluster."""
    if ray.is_initialized():
        _last_beat().set(time.time())


@cache
def _last_beat() -> Gauge:
    return Gauge("mmray_lease_beat_timestamp_seconds", "When the holder of the lease last showed that it lives.")
