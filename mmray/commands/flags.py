"""Flags that several commands share, and flags as settings."""

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from mmray.config import Section
from mmray.errors import ConfigError
from mmray.options import ScoreConfig
from mmray.store import split_uri

S = TypeVar("S", bound=Section)


def add_columns(parser: Any) -> None:
    """Adds where images and texts are."""
    parser.add_argument(
        "--image-root",
        action="append",
        metavar="DIR",
        help="a folder, URI or https://HOST with images; repeatable",
    )
    parser.add_argument("--image-column", metavar="C", help="default: the one trained on")
    parser.add_argument("--text-column", metavar="C", help="default: the one trained on")


def add_placement(parser: Any) -> None:
    """Adds which columns are scored, by how many processes, and how."""
    add_columns(parser)
    parser.add_argument("--actors", type=int, metavar="N", help="processes (default: one per CPU, or per GPU)")
    parser.add_argument("--gpus", type=float, metavar="N", help="GPUs of each process, or a fraction (default: 0)")
    parser.add_argument("--node-label", action="append", metavar="K=V", help="run on such nodes only; repeatable")
    parser.add_argument("--precision", metavar="P", help="auto, bf16 or fp32 (default: fp32)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows per forward pass (default: 32; on a GPU 256)")
    parser.add_argument("--decode-threads", type=int, metavar="N", help="per process (default: 1)")
    parser.add_argument("--local", action=argparse.BooleanOptionalAction, help="without Ray (default: few rows)")
    parser.add_argument("--reads", type=int, metavar="N", help="images of a store read at a time (default: 64)")


def add_score_options(parser: Any) -> None:
    """Adds all that `ScoreConfig` has."""
    add_placement(parser)
    parser.add_argument("--probabilities", action="store_true", help="add the probability of every label")
    parser.add_argument("--min-actors", type=int, metavar="N", help="begin with so few and grow (default: all at once)")
    parser.add_argument("--placement", metavar="WHO", help="who decodes: auto, cluster or local (default: auto)")
    parser.add_argument("--on-unavailable", metavar="DO", help="image not to be had: fail or record (default: fail)")
    parser.add_argument("--slice-rows", type=int, metavar="N", help="rows per output file at most")
    parser.add_argument("--stuck-after", type=float, metavar="S", help="seconds until a hang is one (default: 600)")
    parser.add_argument("--max-error-rate", type=float, metavar="X", help="share of rows that may fail (default: any)")


def add_progress(parser: Any) -> None:
    """Adds how a long step shows how far it is."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def add_events(parser: Any) -> None:
    """Adds `add_progress`, also for machines."""
    add_progress(parser)
    parser.add_argument("--json", action="store_true", help="print progress and result as JSON lines")


def score_config(args: argparse.Namespace) -> ScoreConfig:
    """Returns how a table is scored, of the flags of `add_score_options`."""
    labels = dict(_pair(text) for text in vars(args).get("node_label") or ())
    fields = {
        "image_root": "image_roots",
        "actors": "num_actors",
        "gpus": "gpus_per_actor",
        "stuck_after": "stuck_after_s",
    }
    return settings(ScoreConfig, args, fields, node_labels=labels)


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise ConfigError(f"--node-label: takes KEY=VALUE, got {text!r}; for example ray.io/accelerator-type=H100")
    return key, value


def settings(kind: type[S], args: argparse.Namespace, fields: Mapping[str, str], **more: Any) -> S:
    """Returns the settings that a command's flags give; a wrong one is named as it was typed.

    Args:
        fields: flag -> field, where the two have different names.
        more: settings that no flag gives.
    """
    from pydantic import ValidationError

    given = {fields.get(key, key): value for key, value in vars(args).items() if value is not None}
    try:
        return kind(**{key: value for key, value in given.items() if key in kind.model_fields}, **more)
    except ValidationError as error:
        item = error.errors()[0]
        if not item["loc"]:
            raise ConfigError(item["msg"].removeprefix("Value error, ")) from None
        name = str(item["loc"][0])
        flag = {field: flag for flag, field in fields.items()}.get(name, name).replace("_", "-")
        raise ConfigError(f"--{flag}: {item['msg']}, got {item['input']!r}") from None


def local_folder(flag: str, uri: str) -> str:
    """Returns the path of the folder that a flag names for a report.

    Raises:
        ConfigError: it is none of this machine.
    """
    scheme, path = split_uri(uri)
    if scheme != "file" or not path:
        raise ConfigError(
            f"{uri!r} is no folder of this machine, and the report is written to one; name one with {flag}"
        )
    return path
