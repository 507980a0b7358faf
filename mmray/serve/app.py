"""Places the endpoint on Ray Serve: replicas, their queue, their health, and a new bundle without a pause.

`build_app` is what a Serve config file names, as `import_path: mmray.serve.app:build_app`; `serve_forever` is the
command line's, on the cluster that `RAY_ADDRESS` names or on one of its own, with HAProxy before the replicas.
"""

import asyncio
import logging
import os
import signal
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.request import HTTPSHandler, ProxyHandler

import ray
from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions

from mmray.bundle_info import read_info
from mmray.cluster import cluster, environment, unwrap
from mmray.config import Section
from mmray.errors import ConfigError, EnvironmentFaultError
from mmray.machine import given_address
from mmray.serve.api import build_api
from mmray.serve.haproxy import INSIDE, haproxy, said
from mmray.serve.meters import Meters
from mmray.serve.schema import RETRY_AFTER_S
from mmray.serve.scorer import ItemScorer
from mmray.serve.settings import ServeConfig

NAME = "mmray"
STUCK_AFTER_S = 60.0  # of one batch: then the replica is replaced
GRACE_S = 20.0  # for requests in flight when a replica ends
READY_WITHIN_S = 60.0  # of its replicas
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
        self._settings, self._meters = settings, Meters()
        self._scorer: ItemScorer | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Loads the bundle that a `user_config` names and swaps it in; a bad one leaves the old one answering."""
        if self._scorer is not None and self._scorer.bundle_uri == config["bundle"]:
            return
        try:
            scorer = await asyncio.to_thread(ItemScorer, config["bundle"], self._settings, self._meters.batch)
        except Exception as error:  # whatever it is: two models may not fit, say
            if self._scorer is None:
                raise
            logger.error("%s: %s; %s keeps answering", type(error).__name__, error, self._scorer.bundle_uri)
            return
        self._scorer = scorer
        self._meters.model(scorer.bundle.fingerprint)

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
    """Returns the application that a Serve config file names; `MMRAY_TOKEN` is its token where the file has none.

    Raises:
        ConfigError: a setting is given that is not the application's own.
    """
    if wrong := args.settings.of_the_listener:
        raise ConfigError(f"{', '.join(sorted(wrong))}: not here; http_options of the Serve config has host and port")
    given = os.environ.get("MMRAY_TOKEN")
    token = args.settings.token or (SecretStr(given) if given else None)
    return application(args.bundle, args.settings.model_copy(update={"token": token}))


def application(bundle: str, settings: ServeConfig) -> serve.Application:
    """Returns what runs on Serve, whoever started it."""
    deployment = serve.deployment(
        name=NAME,
        num_replicas=settings.num_replicas,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": environment(settings.gpus_per_replica) or {},
        },
        user_config={"bundle": bundle},
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        logging_config={"enable_access_log": False},  # a line for each request costs as much as parsing it
        max_constructor_retry_count=3,
        max_surge_percent=100,  # new replicas answer before the old ones go
        graceful_shutdown_timeout_s=GRACE_S,
    )
    return deployment(Endpoint).bind(settings)


def serve_forever(bundle: str, settings: ServeConfig, *, on_ready: Callable[[str, str], None]) -> None:
    """Answers until the process is told to end.

    Args:
        bundle: folder or URI of the bundle.
        settings: how the endpoint runs.
        on_ready: called once it answers, with its URL and the URL of the metrics of this machine.

    Raises:
        MmrayError: the bundle cannot be used, or Ray or the address cannot be had.
    """
    ended = threading.Event()
    with endpoint(bundle, settings) as url:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())  # here: Ray sets one of its own as it starts
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)  # type: ignore[no-untyped-call]
        on_ready(url, f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
        ended.wait()


@contextmanager
def endpoint(bundle: str, settings: ServeConfig) -> Iterator[str]:
    """Runs the endpoint for the duration of a `with` block, and yields its URL.

    Raises:
        MmrayError: see `serve_forever`.
    """
    read_info(bundle)  # a mistake is answered before anything starts
    given = ray.is_initialized() or given_address() is not None
    if given and settings.tls_cert:
        raise ConfigError("a cluster that is running already answers without TLS; leave TLS to the gateway before it")
    with nullcontext("") if given else haproxy(settings) as folder, cluster(settings.num_replicas):
        logger.setLevel(logging.ERROR)  # what Serve has to say of its start is no news to a user
        timeout_s = settings.request_timeout_s + GRACE_S  # ours comes first, and says why
        options = HTTPOptions(host=settings.host if given else INSIDE, port=settings.port, request_timeout_s=timeout_s)
        serve.start(http_options=options, logging_config={"log_level": "ERROR"})
        if NAME in serve.status().applications:
            raise ConfigError(f"an application {NAME!r} is on this cluster already; a Serve config file changes it")
        try:
            _deploy(bundle, settings)
            _await_answer(settings.url, folder)
            yield settings.url
        finally:
            serve.delete(NAME)  # and not all of Serve: on a cluster that was given, others may answer too


def _deploy(bundle: str, settings: ServeConfig) -> None:
    try:
        serve.run(application(bundle, settings), name=NAME, route_prefix="/")
    except (RuntimeError, ValueError, OSError) as error:
        applications = serve.status().applications
        deployments = applications[NAME].deployments.values() if NAME in applications else ()
        reasons = "\n".join([*(deployment.message for deployment in deployments), str(error)])
        raise unwrap(RuntimeError(reasons), "the endpoint") from error


def _await_answer(url: str, haproxy_folder: str) -> None:
    """Waits until the proxy knows the replicas, which it hears of a moment after they are there."""
    # Nothing is sent but this question: whose certificate it is does not matter.
    context = ssl._create_unverified_context()
    # Nor is it a question for a proxy that the environment names.
    opener = urllib.request.build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    cause = said(haproxy_folder) if haproxy_folder else "Serve may run there already, with another host and port"
    raise EnvironmentFaultError(f"the endpoint did not answer at {url} within {READY_WITHIN_S:g} s: {cause}")
