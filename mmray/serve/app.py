"""Places the endpoint on Ray Serve: replicas, their queue, their health, and a new bundle without a pause.

`build_app` is what a Serve config file names, as `import_path: mmray.serve.app:build_app`; `serve_forever` is the
command line's.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions

from mmray.bundle import read_info
from mmray.cluster import cluster, unwrap
from mmray.config import Section
from mmray.errors import MmrayError
from mmray.serve.api import RETRY_AFTER_S, build_api
from mmray.serve.scorer import ItemScorer
from mmray.serve.settings import ServeConfig

NAME = "mmray"
STUCK_AFTER_S = 60.0  # of one batch: then the replica is replaced
GRACE_S = 20.0  # for requests in flight when a replica ends
logger = logging.getLogger("ray.serve")


class ServeArgs(Section):
    """The arguments of a Serve config file."""

    bundle: str
    """Folder or URI of the bundle."""
    settings: ServeConfig = ServeConfig()
    """How the endpoint runs."""


@serve.ingress()
class Endpoint:
    """One replica: a scorer and the routes that ask it."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self._scorer: ItemScorer | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the bundle that a `user_config` names and swaps it in; a bad one leaves the old one answering."""
        if self._scorer is not None and self._scorer.bundle_uri == config["bundle"]:
            return
        try:
            self._scorer = await asyncio.to_thread(ItemScorer, config["bundle"], self._settings)
        except MmrayError as error:
            if self._scorer is None:
                raise
            logger.error("%s; %s keeps answering", error, self._scorer.bundle_uri)

    def check_health(self) -> None:
        """Tells Serve to replace a replica whose model hangs."""
        if self._scorer is not None and self._scorer.running_s > STUCK_AFTER_S:
            raise RuntimeError(f"one batch has been running for {self._scorer.running_s:.0f} s")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._current, self._settings)

    def _current(self) -> ItemScorer:
        assert self._scorer is not None, "Serve routes no request before the first reconfigure"
        return self._scorer


def build_app(args: ServeArgs) -> serve.Application:
    """Returns the application that a Serve config file or `serve_forever` runs."""
    settings = args.settings
    deployment = serve.deployment(
        name=NAME,
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.gpus_per_replica},
        user_config={"bundle": args.bundle},
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        max_constructor_retry_count=3,
        max_surge_percent=100,  # new replicas answer before the old ones go
        graceful_shutdown_timeout_s=GRACE_S,
    )
    return deployment(Endpoint).bind(settings)


def serve_forever(bundle: str, settings: ServeConfig, *, on_ready: Callable[[str], None]) -> None:
    """Answers until the process is told to end.

    Raises:
        MmrayError: the bundle cannot be used, or Ray or the port cannot be had.
    """
    read_info(bundle)  # a mistake is answered before anything starts
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with cluster(settings.num_replicas), endpoint(bundle, settings) as url:
        on_ready(url)
        ended.wait()


@contextmanager
def endpoint(bundle: str, settings: ServeConfig) -> Iterator[str]:
    """Runs the endpoint on the cluster for the duration of a `with` block, and yields its URL."""
    try:
        _start(bundle, settings)
        yield f"http://{settings.host}:{settings.port}"
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def _start(bundle: str, settings: ServeConfig) -> None:
    logger.setLevel(logging.ERROR)  # what Serve has to say of its start is no news to a user
    timeout_s = settings.request_timeout_s + GRACE_S  # ours comes first, and says why
    options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=timeout_s)
    try:
        serve.start(http_options=options, logging_config={"log_level": "ERROR"})
        serve.run(build_app(ServeArgs(bundle=bundle, settings=settings)), name=NAME, route_prefix="/")
    except (RuntimeError, ValueError, OSError) as error:
        applications = serve.status().applications
        deployments = applications[NAME].deployments.values() if NAME in applications else ()
        said = "\n".join([*(deployment.message for deployment in deployments), str(error)])
        raise unwrap(RuntimeError(said), "the endpoint") from error
