"""Fixtures shared by all tests."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


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
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


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


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from mmray.cluster import cluster

    with cluster(2):
        yield
