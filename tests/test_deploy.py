"""The files in deploy/ are what Ray and the project understand, to the letter: a typo fails here."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from mmray.serve.app import NAME, ServeArgs, build_app

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
