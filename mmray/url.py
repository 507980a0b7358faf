"""Images by URL, beneath roots that are allowed: who is asked, for how long, and what counts as an answer.

Reads a URL -> gives bytes, or why there are none. A root is `https://images.example.com/photos`: scheme, host, port and
the beginning of the path must be its own, so that no row decides who is connected to. The name's addresses are looked
at before one of them is connected to, and a redirect is not followed; proxies of the environment are not used.
"""

import http.client
import io
import ipaddress
import posixpath
import random
import re
import socket
import ssl
import time
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

from mmray import __version__
from mmray.errors import ConfigError, EnvironmentFaultError
from mmray.table import Fault, Reason, fault

PORTS = {"http": 80, "https": 443}
ATTEMPT_S = 20.0  # from looking up the name to the last byte
TOTAL_S = 90.0  # until the server is out of order and not only busy
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
CHUNK = 2**16  # bytes
MAX_CHARS = 8192  # of a URL, as servers have it
MOST_DECODINGS = 4  # of percent signs: so often may servers behind one another do it, and no name needs it
_ROOT = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?((?:/.*)?)", re.ASCII)
_SAFE = "!$%&'()*+,/:;=?@[]~"  # signs that a URL may hold as they are, beside letters, digits, `-`, `.` and `_`
_CARRIERS = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))  # whose last 32 bits are IPv4
_METADATA = (ipaddress.ip_address("168.63.129.16"),)  # Azure's, which is no private address
_BUSY = {408, 425, 429}  # and all of 500 and above: another time it may be otherwise
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_url(name: str) -> bool:
    """Whether a name is a URL of a web server."""
    return name.partition("://")[0].lower() in PORTS


class UrlRoot:
    """What lies beneath a URL; thread-safe."""

    def __init__(self, uri: str) -> None:
        """Takes the root.

        Raises:
            ConfigError: it is malformed, has credentials or a query, or is a link-local address.
        """
        found = _parse(uri)
        if found is None or "?" in found[3] or _leads_up(found[3]):
            raise ConfigError(
                f"an image root is a URL such as https://images.example.com/photos or http://10.0.0.5:8080, without "
                f"user, query and fragment; got {uri.partition('://')[0]}://..."
            )
        self._scheme, self._host, self._port, path = found
        self._path = path.rstrip("/")
        self._named = _literal(self._host)
        if self._named is not None and not _is_allowed(self._named, named=True):
            raise ConfigError(f"{self._host} is no address that images are read from; give a server's")
        port = "" if self._port == PORTS[self._scheme] else f":{self._port}"
        self._authority = self._host + port
        self.uri = f"{self._scheme}://{self._authority}{self._path}"
        """The root in its one spelling."""

    def target(self, name: str) -> str | None:
        """Returns what to ask the server for, of a URL beneath this root; None for any other."""
        found = _parse(name)
        if found is None or found[:3] != (self._scheme, self._host, self._port) or _leads_up(found[3]):
            return None
        return found[3] if found[3].startswith(self._path + "/") else None

    def child(self, name: str) -> str | None:
        """Returns what to ask the server for, of a relative path; None where it leads up or no URL can hold it."""
        if ".." in name.split("/"):
            return None
        path = posixpath.normpath(name).replace("%", "%25").replace("?", "%3F").replace("#", "%23")
        return self.target(f"{self.uri}/{path}")

    def read(self, target: str, limit: int) -> bytes | Fault:
        """Returns the bytes of a target, at most so many, or why there are none.

        Raises:
            EnvironmentFaultError: there was no answer, however often it was asked for.
        """
        end, pause_s = time.monotonic() + TOTAL_S, FIRST_PAUSE_S
        while True:
            try:
                return self._ask(target, limit, min(time.monotonic() + ATTEMPT_S, end))
            except (OSError, http.client.HTTPException) as error:
                wait_s = random.uniform(0, pause_s)  # whoever failed together does not come back together
                if isinstance(error, ssl.SSLCertVerificationError) or time.monotonic() + wait_s >= end:
                    raise self._fault(error) from None
                time.sleep(wait_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _fault(self, error: Exception) -> EnvironmentFaultError:
        # What an HTTPException says, the server has said.
        why = getattr(error, "strerror", None) or (str(error) if isinstance(error, OSError) else type(error).__name__)
        return EnvironmentFaultError(
            f"cannot read images of {self._scheme}://{self._authority}: {why}; mend the server or the network, then "
            "run again"
        )

    def _ask(self, target: str, limit: int, end: float) -> bytes | Fault:
        addresses = self._addresses()
        if addresses is None:
            detail = "the host has a private address; a root that is the address itself allows it"
            return fault(Reason.NOT_ALLOWED, detail)
        with self._connect(addresses, end) as connection:
            lines = (f"GET {target} HTTP/1.1", f"Host: {self._authority}", "Accept-Encoding: identity")
            more = ("Accept: image/*", "Connection: close", f"User-Agent: mmray/{__version__}", "", "")
            connection.sendall("\r\n".join(lines + more).encode("ascii"))
            answering: Any = _Answering(connection, end)
            with http.client.HTTPResponse(answering, method="GET") as answer:
                answer.begin()
                return _refusal(answer.status) or _body(answer, limit)

    def _addresses(self) -> list[str] | None:
        """Returns the addresses of the host, or None where one is not for everyone to connect to."""
        if self._named is not None:
            return [str(self._named)]
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = [str(address[0]) for *_, address in found]
        return addresses if all(_is_allowed(ipaddress.ip_address(a), named=False) for a in addresses) else None

    def _connect(self, addresses: list[str], end: float) -> socket.socket:
        """Connects to an address that was looked at: to the name would be to look it up again."""
        for k, address in enumerate(addresses):
            try:
                connection = socket.create_connection((address, self._port), timeout=_left(end))
                break
            except OSError:
                if k == len(addresses) - 1:
                    raise
        if self._scheme == "http":
            return connection
        try:
            connection.settimeout(_left(end))
            return _tls().wrap_socket(connection, server_hostname=self._host.strip("[]"))
        except BaseException:
            connection.close()
            raise


class _Answering(io.RawIOBase):
    """What a server sends, up to a point in time: a timeout for each byte would let it take forever."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._connection, self._end = connection, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_left(self._end))
        return self._connection.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)


class _Unavailable(OSError):
    """The server has no answer now."""


def _refusal(status: int) -> Fault | None:
    """Returns why a status means that there is no image, or None where it comes with one."""
    if status == 200:
        return None
    if status in _BUSY or status >= 500 or status < 200:
        raise _Unavailable(None, f"status {status}")
    if status in (401, 403):
        return fault(Reason.NOT_ALLOWED, f"the server refuses it with status {status}")
    if status < 400:
        return fault(Reason.NOT_ALLOWED, f"status {status}; redirects are not followed")
    return fault(Reason.MISSING, f"status {status}")


def _body(answer: http.client.HTTPResponse, limit: int) -> bytes | Fault:
    data = bytearray()
    while len(data) <= limit:
        if len(data) + (answer.length or 0) > limit:
            break
        chunk = answer.read(min(CHUNK, limit + 1 - len(data)))
        if not chunk:
            if answer.length:
                raise _Unavailable(None, "the answer broke off")
            return bytes(data)
        data += chunk
    return fault(Reason.TOO_LARGE_BYTES, f"more than the {limit} bytes that are allowed")


def _parse(url: str) -> tuple[str, str, int, str] | None:
    """Splits a URL into scheme, host, port and what to ask for; None where it is none that a root can allow."""
    if len(url) > MAX_CHARS:
        return None
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    found = _ROOT.fullmatch(f"{scheme.lower()}{separator}{host.lower()}")
    path = (slash + path).partition("#")[0]
    if found is None or not path.isprintable() or "\\" in path:
        return None
    port = int(found[3]) if found[3] else PORTS[found[1]]
    labels = found[2].split(".")
    if not 0 < port < 2**16 or len(found[2]) > 253 or max(map(len, labels)) > 63 or "" in labels:
        return None
    return found[1], found[2], port, quote(path, safe=_SAFE)


def _leads_up(target: str) -> bool:
    path = target.partition("?")[0]
    for _ in range(MOST_DECODINGS):
        decoded = unquote(path)
        if decoded == path:
            return ".." in re.split(r"[/\\;]", path)
        path = decoded
    return True


def _literal(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _is_allowed(address: _Address, *, named: bool) -> bool:
    """Whether images may be read from an address; a private one only where a root names it itself."""
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if any(address in network for network in _CARRIERS):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None or address.is_site_local:
            return inner is not None and _is_allowed(inner, named=False)
    if address.is_link_local or address.is_multicast or address.is_unspecified or address in _METADATA:
        return False
    return named or address.is_global


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(None, "it took too long")
    return left


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
