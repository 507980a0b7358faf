"""Prints manifests, filled from deploy/values.yaml: `python deploy/render.py rayjob-score | kubectl apply -f -`."""

import argparse
import json
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmray import __version__
from mmray.errors import ConfigError, nearest

HERE = Path(__file__).parent
# A kind is a file `<kind>.yaml.j2` below this folder.
KINDS = {file.name.removesuffix(".yaml.j2"): str(file.relative_to(HERE)) for file in sorted(HERE.rglob("*.yaml.j2"))}


def render(kind: str, **changes: Any) -> list[dict[str, Any]]:
    """Returns the manifests of a kind; see `text`."""
    return list(yaml.safe_load_all(text(kind, **changes)))


def text(kind: str, **changes: Any) -> str:
    """Returns the manifests of a kind as YAML with comments; `changes` stand instead of what values.yaml has.

    Raises:
        ConfigError: there is no such kind or value, or a value is of another type.
    """
    if kind not in KINDS:
        raise ConfigError(f"no kind {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
    values = yaml.safe_load((HERE / "values.yaml").read_text())
    for key, value in changes.items():
        if key not in values:
            raise ConfigError(f"no {key!r} in deploy/values.yaml{nearest(key, values)}")
        try:
            values[key] = type(values[key])(value)
        except ValueError:
            raise ConfigError(f"{key} is a whole number, got {value!r}") from None
    dependencies = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    ray_version = next(line for line in dependencies if line.startswith("ray[")).partition("==")[2]
    jinja = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters.update(json=json.dumps, shell=lambda words: shlex.join(map(str, words)))
    jinja.globals.update(values, version=__version__, ray_version=ray_version, serve_config=serve_config(values))
    return "\n".join(filter(str.strip, jinja.get_template(KINDS[kind]).render().splitlines()))


def serve_config(values: dict[str, Any]) -> str:
    """Returns deploy/serve.yaml with these values."""
    config = yaml.safe_load((HERE / "serve.yaml").read_text())
    application = config["applications"][0]
    config["http_options"]["port"] = values["serve_port"]
    # `args` are part of the application's version: another bundle there restarts the replicas that would swap it in.
    application["args"]["bundle"] = "see user_config"
    application["args"]["settings"]["gpus_per_replica"] = min(values["worker_gpus"], 1)
    application["deployments"][0]["user_config"]["bundle"] = values["bundle"]
    return str(yaml.safe_dump(config, sort_keys=False))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the kinds that a command line names."""
    parser = argparse.ArgumentParser(description="Print manifests.", epilog=f"Kinds: {', '.join(KINDS)}.")
    parser.add_argument("kinds", nargs="+", metavar="KIND")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of values.yaml")
    args = parser.parse_args(argv)
    if wrong := [change for change in args.set if "=" not in change]:
        parser.error(f"--set takes KEY=VALUE, got {wrong[0]!r}")
    try:
        print("\n---\n".join(text(kind, **dict(change.split("=", 1) for change in args.set)) for kind in args.kinds))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
