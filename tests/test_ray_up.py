"""deploy/cluster.yaml.j2 is what `ray up`, EC2 and `ray start` understand; no machine is started."""

import json
import shlex
from pathlib import Path

import ray.autoscaler
from manifests import VALUES, problems, strict
from render import render

from mmray import __version__


def test_ray_up_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = render("cluster")
    schema = strict(json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    assert problems(schema, config) == []
    config["docker"]["imgae"] = config["docker"].pop("image")
    assert problems(schema, config)
    (config,) = render("cluster")
    validate_config(prepare_config(config))
    assert config["docker"]["image"] == f"{VALUES['image']}:{__version__}"


def test_ec2_takes_the_instances_of_the_cluster_file() -> None:
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    (config,) = render("cluster")
    for node in config["available_node_types"].values():
        wanted = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(wanted, shape).has_errors()
        assert ParamValidator().validate({**wanted, "InstanceTyp": "m7i.large"}, shape).has_errors()


def test_ray_start_understands_the_commands_of_the_cluster_file() -> None:
    from ray.scripts.scripts import cli, start, stop

    (config,) = render("cluster")
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        program, name, *arguments = shlex.split(command)
        assert program == "ray"
        assert cli.commands[name] in (start, stop)
        cli.commands[name].make_context(name, arguments)  # parses, and runs nothing
