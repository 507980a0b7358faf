"""Fixtures shared by all tests."""

import datetime
import ipaddress
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two tests at a time, and all that they start, share two cores: a thread that waits for another must not hold one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # as `cluster.py` has it, also where a test starts the nodes
LONGEST = ("test_kill.py", "test_train.py", "test_nodes.py", "test_submit.py", "test_serve.py", "test_local.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with files of tests that take long: at the end the short ones keep every process busy."""
    long = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Small models gain nothing from more, and lose much where the machine is shared.
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data that lies beside the project (`MMRAY_SHARED`, `../shared` by default)."""
    root = Path(os.environ.get("MMRAY_SHARED", Path(__file__).parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no development data at {root}; set MMRAY_SHARED")
    return root


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    pytest.importorskip("moto.server")
    from faults import s3_on_loopback

    with s3_on_loopback() as url:
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a new bucket on a real S3 server on loopback; the environment leads there, as on a user's machine."""
    import obstore
    from obstore.store import S3Store

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")).close()
    assert obstore.list(S3Store(bucket)).collect() == []
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of the tests' own for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = builder.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    formats = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*formats))
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of small pictures and texts; a module that wants more than 40 rows says so as `ROWS`."""
    from models import colour_table

    return colour_table(tmp_path_factory.mktemp("rows"), rows=getattr(request.module, "ROWS", 40))


@pytest.fixture(scope="module")
def bundle(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model that knows those rows."""
    from models import saved_bundle

    return saved_bundle(tmp_path_factory.mktemp("bundles") / "bundle", rows)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from mmray.cluster import cluster

    with cluster(2):
        yield
