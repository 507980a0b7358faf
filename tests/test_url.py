"""Images by URL: only beneath roots that were allowed, only from addresses that were looked at, and not forever."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hostile_server import IMAGE, HostileServer, hostile_server
from models import colour_table, saved_bundle, score_in_process

from mmray import url
from mmray.errors import ConfigError, EnvironmentFaultError, MmrayError
from mmray.options import ScoreConfig
from mmray.score.verify import verify_output
from mmray.slices import open_table
from mmray.source import ImageSource
from mmray.table import Fault, Reason

CAP = 5000
PUBLIC = "93.184.215.14"


@pytest.fixture(scope="module")
def _server() -> Iterator[HostileServer]:
    with hostile_server() as server:
        yield server


@pytest.fixture
def server(_server: HostileServer) -> HostileServer:
    _server.seen.clear()
    return _server


class Network:
    """A resolver that says what it is told, and a public address that is the server of this test."""

    def __init__(self, server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[list[str]] = []
        self.connected: list[str] = []
        connect, look_up = socket.create_connection, socket.getaddrinfo

        def lookup(host: str, port: int, *rest: int, **more: int) -> list[object]:
            if not host.endswith("example.com"):
                return [*look_up(host, port, *rest, **more)]
            addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        def connected(address: tuple[str, int], **more: float) -> socket.socket:
            self.connected.append(address[0])
            return connect(("127.0.0.1", server.server_port), **more)

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        monkeypatch.setattr(socket, "create_connection", connected)


@pytest.fixture
def network(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(server, monkeypatch)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url, "ATTEMPT_S", 0.3)
    monkeypatch.setattr(url, "TOTAL_S", 0.6)


def reason(result: bytes | Fault) -> Reason | bytes:
    return result.reason if isinstance(result, Fault) else result


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("{url}/photos/a.jpg", "/photos/a.jpg"),
        ("HTTP://127.0.0.1:{port}/photos/a.jpg#top", "/photos/a.jpg"),
        ("{url}/photos/a.jpg?width=3&sign=%2F", "/photos/a.jpg?width=3&sign=%2F"),
        ("{url}/photos/ein Bär.jpg", "/photos/ein%20B%C3%A4r.jpg"),
        ("a.jpg", "/photos/a.jpg"),
        ("./x//50%?.jpg", "/photos/x/50%25%3F.jpg"),
    ],
)
def test_an_image_beneath_a_root_is_read(server: HostileServer, name: str, asked: str) -> None:
    source = ImageSource([f"{server.url}/photos"], CAP)
    assert source.read(name.format(url=server.url, port=server.server_port)) == IMAGE
    assert server.seen == [asked]
    assert source.is_remote


@pytest.mark.parametrize(
    "name",
    [
        "{url}/a.jpg",
        "{url}/photos",
        "{url}/photos-of-others/a.jpg",
        "{url}/photos/../a.jpg",
        "{url}/photos/%2e%2e/a.jpg",
        "{url}/photos/%252e%252e/a.jpg",
        "{url}/photos/..\\a.jpg",
        "{url}/photos/..;/a.jpg",
        "{url}/photos/a.jpg\r\nX: y",
        "http://user:secret@127.0.0.1:{port}/photos/a.jpg",
        "http://127.0.0.1:{port}@169.254.169.254/photos/a.jpg",
        "http://localhost:{port}/photos/a.jpg",
        "http://2130706433:{port}/photos/a.jpg",
        "http://0x7f.1:{port}/photos/a.jpg",
        "http://[::ffff:127.0.0.1]:{port}/photos/a.jpg",
        "http://127.0.0.1/photos/a.jpg",
        "https://127.0.0.1:{port}/photos/a.jpg",
        "ftp://127.0.0.1:{port}/photos/a.jpg",
        "../a.jpg",
        "/photos/a.jpg",
    ],
)
def test_nothing_else_is_asked_for(server: HostileServer, name: str) -> None:
    source = ImageSource([f"{server.url}/photos"], CAP)
    result = source.read(name.format(url=server.url, port=server.server_port))
    assert reason(result) in (Reason.NOT_ALLOWED, Reason.MISSING)
    assert server.seen == []


def test_without_a_root_that_is_a_url_none_is_asked(server: HostileServer, tmp_path: Path) -> None:
    assert reason(ImageSource([str(tmp_path)], CAP).read(f"{server.url}/a.jpg")) is Reason.NOT_ALLOWED
    assert server.seen == []


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("404", Reason.MISSING),
        ("410", Reason.MISSING),
        ("403", Reason.NOT_ALLOWED),
        ("301", Reason.NOT_ALLOWED),
        ("302", Reason.NOT_ALLOWED),
        ("307", Reason.NOT_ALLOWED),
        ("204", Reason.NOT_ALLOWED),
        ("huge", Reason.TOO_LARGE_BYTES),
        ("endless", Reason.TOO_LARGE_BYTES),
        ("gzip", b"\x1f\x8b"),
    ],
)
def test_an_answer_that_is_no_image_is_a_reason(server: HostileServer, what: str, expected: object) -> None:
    result = ImageSource([server.url], CAP).read(f"{server.url}/{what}?sign=secret")
    assert reason(result) == expected
    assert len(server.seen) == 1, "a redirect is not followed, and what is certain is not asked for again"
    assert not isinstance(result, Fault) or "secret" not in result.detail


def test_a_server_that_fails_sometimes_is_asked_again(server: HostileServer) -> None:
    server.failures = 3
    assert ImageSource([server.url], CAP).read("sometimes") == IMAGE
    assert len(server.seen) == 4


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ["503", "429", "short", "drip", "headers", "nonsense"])
def test_a_server_that_goes_on_failing_is_no_fault_of_the_row(server: HostileServer, what: str) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"cannot read images of http://127\.0\.0\.1") as raised:
        ImageSource([server.url], CAP).read(f"{server.url}/{what}?sign=secret")
    assert "secret" not in str(raised.value)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_goes_on_failing_is_recorded_where_that_is_asked_for(
    server: HostileServer, tmp_path: Path
) -> None:
    rows = colour_table(tmp_path / "rows", rows=12, files=1)
    bundle = saved_bundle(tmp_path / "bundle", rows)
    table = pq.read_table(rows / "part-0.parquet")
    paths = ["503" if k % 3 == 0 else path for k, path in enumerate(table["image_path"].to_pylist())]
    pq.write_table(table.set_column(1, "image_path", pa.array(paths)), rows / "part-0.parquet")
    options = ScoreConfig(image_roots=(str(rows), server.url))
    with pytest.raises(EnvironmentFaultError, match="cannot read images of"):
        score_in_process(bundle, str(rows), str(tmp_path / "out"), options)
    record = options.model_copy(update={"on_unavailable": "record"})
    ledger = score_in_process(bundle, str(rows), str(tmp_path / "out"), record)
    assert ledger.reasons == {"degraded/UNAVAILABLE": 4}
    assert verify_output(str(tmp_path / "out"), 3).passed, "the rows without an image then are not scored again"


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_no_fault_of_the_row() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(EnvironmentFaultError, match="refused"):
            ImageSource([f"http://127.0.0.1:{nobody.getsockname()[1]}"], CAP).read("a.jpg")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00:ec2::254",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
    ],
)
def test_a_name_with_a_private_address_is_not_connected_to(network: Network, address: str) -> None:
    source = ImageSource(["http://images.example.com"], CAP)
    for answer in ([address], [PUBLIC, address]):
        network.answers = [answer]
        assert reason(source.read("a.jpg")) is Reason.NOT_ALLOWED
    assert network.connected == []


def test_the_address_that_was_looked_at_is_the_one_connected_to(network: Network) -> None:
    network.answers = [[PUBLIC], ["127.0.0.1"]]  # as a name server says that changes its mind
    source = ImageSource(["http://images.example.com"], CAP)
    assert source.read("http://images.example.com/a.jpg") == IMAGE
    assert network.connected == [PUBLIC]
    assert reason(source.read("a.jpg")) is Reason.NOT_ALLOWED
    assert network.connected == [PUBLIC]


@pytest.mark.parametrize(
    "root",
    [
        "https://user:secret@images.example.com",
        "https://images.example.com/?sign=secret",
        "https://images.example.com/a/../b",
        "http://169.254.169.254/latest",
        "http://[fe80::1]/",
        "http://0.0.0.0:80",
        "https://",
        "https://exa mple.com",
        "https://images.example.com:99999",
    ],
)
def test_a_root_that_allows_what_none_should_is_refused(root: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ImageSource([root], CAP)
    assert "secret" not in str(raised.value)


def test_a_certificate_must_be_vouched_for(certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with hostile_server() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        root = server.url.replace("http", "https")
        with pytest.raises(EnvironmentFaultError, match="certificate"):
            ImageSource([root], CAP).read("a.jpg")
        assert server.seen == []
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        url._tls.cache_clear()
        assert ImageSource([root], CAP).read(f"{root}/a.jpg") == IMAGE
    url._tls.cache_clear()


def test_rows_name_images_by_url_and_a_server_in_trouble_fails_the_slice(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = colour_table(tmp_path / "rows", rows=20, files=1)
    bundle = saved_bundle(tmp_path / "bundle", rows)
    table = pq.read_table(rows / "part-0.parquet")
    names = [f"{server.url}/{k}.jpg" for k in range(18)] + [f"{server.url}/404", "https://169.254.169.254/a.jpg"]
    table = table.set_column(table.schema.get_field_index("image_path"), "image_path", pa.array(names))
    pq.write_table(table, tmp_path / "by-url.parquet")
    server.image = next(rows.rglob("*.jpg")).read_bytes()
    options = ScoreConfig(image_roots=(f"{server.url}/",))
    try:
        ledger = score_in_process(bundle, str(tmp_path / "by-url.parquet"), str(tmp_path / "out"), options)
    finally:
        server.image = IMAGE
    assert ledger.reasons == {"degraded/MISSING": 1, "degraded/NOT_ALLOWED": 1}
    pq.write_table(table.set_column(1, "image_path", pa.array([f"{server.url}/503"] * 20)), tmp_path / "down.parquet")
    monkeypatch.setattr(url, "TOTAL_S", 0.3)
    with pytest.raises(EnvironmentFaultError, match=r"cannot read images of http://127\.0\.0\.1"):
        score_in_process(bundle, str(tmp_path / "down.parquet"), str(tmp_path / "out-2"), options)
    assert not list(tmp_path.glob("out-2/data/*")), "nothing of it is written into rows"
    assert open_table(str(tmp_path / "down.parquet")).image_roots(options.image_roots) == (server.url,)


def test_what_a_name_holds_does_not_write_to_the_log() -> None:
    assert str(MmrayError("a\x1b[2J\rb\u202e\u2028\nc")) == "a\\x1b[2J\\rb\\u202e\\u2028\nc"
