"""The files in deploy/ are what Ray and the project understand, to the letter: a typo fails here."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from models import colour_table, saved_bundle
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema
from ray_head import BIN, Head, running_head
from test_serve import replicas

from mmray.bundle import load_bundle
from mmray.errors import ConfigError
from mmray.serve.app import NAME, ServeArgs, build_app
from mmray.serve.haproxy import free_port
from mmray.serve.settings import ServeConfig

DEPLOY = Path(__file__).parents[1] / "deploy"


def unknown(section: dict[str, Any], schema: type[BaseModel]) -> set[str]:
    """The keys that Ray would ignore without a word."""
    return set(section) - set(schema.model_fields)


def test_the_serve_config_names_what_there_is() -> None:
    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert not unknown(config, ServeDeploySchema)
    assert not unknown(config["http_options"], HTTPOptionsSchema)
    assert not unknown(application, ServeApplicationSchema)
    assert not unknown(deployment, DeploymentSchema)
    assert not unknown(deployment["autoscaling_config"], AutoscalingConfig)
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
    args = ServeArgs.model_validate(application["args"])
    assert deployment["name"] == NAME
    assert deployment["user_config"] == {"bundle": args.bundle}
    assert args.settings.request_timeout_s < config["http_options"]["request_timeout_s"]
    assert build_app(args) is not None
    with pytest.raises(ConfigError, match="tls_cert, tls_key: not here"):
        build_app(ServeArgs(bundle=args.bundle, settings=ServeConfig(tls_cert="a", tls_key="b")))


class Deployed:
    """deploy/serve.yaml on a cluster that runs on its own."""

    def __init__(self, head: Head, folder: Path) -> None:
        self.head, self.port, self._file = head, free_port(), folder / "serve.yaml"

    def deploy(self, bundle: str) -> None:
        """Deploys it with another bundle in `user_config`, as its first lines say."""
        config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
        config["http_options"] |= {"host": "127.0.0.1", "port": self.port}
        (application,) = config["applications"]
        application["args"]["bundle"] = "/no/such/bundle"  # the one in user_config counts
        application["deployments"][0]["user_config"] = {"bundle": bundle}
        self._file.write_text(yaml.safe_dump(config))
        command = [str(BIN / "serve"), "deploy", str(self._file)]
        subprocess.run(command, env=self.head.env, check=True, capture_output=True)

    def logged(self, words: str) -> bool:
        """Whether a replica has logged these words."""
        return any(words in log.read_text() for log in self.head.logs.glob("serve/replica_*.log"))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with running_head() as head:
        yield Deployed(head, tmp_path_factory.mktemp("deployed"))


@pytest.mark.long  # in short, test_serve.py swaps one
@pytest.mark.ray
def test_another_bundle_in_the_serve_config_is_swapped_in_without_a_failed_request(
    deployed: Deployed, tmp_path: Path
) -> None:
    rows = colour_table(tmp_path / "rows", rows=24)
    bundles = [saved_bundle(tmp_path / str(seed), rows, seed) for seed in range(2)]
    first, second = (load_bundle(bundle).fingerprint for bundle in bundles)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "bundle.json").write_text("{}")

    async def answers(client: httpx.AsyncClient, until: Callable[[str], bool], least: int) -> list[str]:
        found: list[str] = []
        while len(found) < least or not until(found[-1]):
            asked = (client.post("/v1/score", json={"text": "red"}) for _ in range(8))
            found += [answer.raise_for_status().json()["fingerprint"] for answer in await asyncio.gather(*asked)]
        return found

    async def talk() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{deployed.port}", timeout=60) as client:
            await until_ready(client, deployed, bundles[0])
            before = replicas()
            change = asyncio.create_task(asyncio.to_thread(deployed.deploy, bundles[1]))
            seen = await answers(client, lambda last: last == second, 1000)
            await change
            assert set(seen) == {first, second}
            await asyncio.to_thread(deployed.deploy, str(broken))
            seen = await answers(client, lambda last: deployed.logged("keeps answering"), 100)
            assert set(seen) == {second}, "a bad bundle leaves the old one answering"
            assert replicas() == before, "the replicas that ran"

    asyncio.run(asyncio.wait_for(talk(), 180))


async def until_ready(client: httpx.AsyncClient, deployed: Deployed, bundle: str) -> None:
    taken = False
    while True:
        deployed.head.check()
        try:
            if not taken:
                await asyncio.to_thread(deployed.deploy, bundle)
                taken = True
            if (await client.get("/readyz")).status_code == 200:
                return
        except (subprocess.CalledProcessError, httpx.TransportError):
            await asyncio.sleep(0.5)
