"""A configuration from a TOML file and `key=value` overrides; a wrong key is answered with the nearest right one."""

import tomllib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from mmray.config import Config
from mmray.errors import ConfigError, nearest
from mmray.store import open_parent


def load_config(uri: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides (values in TOML syntax, or bare strings).

    The file may lie in a folder or in a store. Relative paths in `[table]` and `train.storage` are kept as written:
    they are relative to the working folder.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is wrong.
    """
    try:
        store, name = open_parent(uri)
        raw = tomllib.loads(store.read(name).decode())
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {uri!r}; see jobs/configs/ for ready ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {uri!r}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{uri} is not TOML: {error}; a setting reads `key = value`") from None
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, uri)


def parse_config(raw: dict[str, Any], where: str) -> Config:
    """Checks a plain mapping against the schema; `where` names its origin in messages."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, where) for item in error.errors())) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set takes section.key=value, got {override!r}; for example --set train.epochs=3")
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {part!r} is a value, not a section")
    parsed = _parse_value(value.strip())
    if parts[-1] == "kind" and parsed in _TAGS:  # what only the kind before it had goes with it
        known = _known_keys([*parts[:-1], parsed])
        for key in set(node) - set(known):
            del node[key]
    node[parts[-1]] = parsed


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --set model.fusion.kind=concat


_TAGS = {
    "cnn",
    "torchvision",
    "efficientnet_lite0",
    "lstm",
    "gru",
    "rnn",
    "bag",
    "weighted_sum",
    "concat",
    "conv",
    "attention",
}
_TAGS |= {"bilinear", "auto", "binary", "multiclass", "multilabel", "regression"}


def _explain(item: Any, where: str) -> str:
    # pydantic puts a union's tag into the location; it is not a key the user wrote.
    names_a_key = item["type"] in ("extra_forbidden", "missing")
    location = [
        part for k, part in enumerate(item["loc"]) if part not in _TAGS or (names_a_key and k == len(item["loc"]) - 1)
    ]
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys([str(part) for part in item["loc"][:-1]])
        return f"{where}: unknown key {key!r}{nearest(str(location[-1]), known)}"
    if item["type"] == "missing":
        return f"{where}: {key!r} is missing; add it"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
    return f"{where}: {key + ': ' if key else ''}{message}{got}"


def _known_keys(location: Sequence[str]) -> list[str]:
    """Returns the keys allowed at a location, whose parts are field names and union tags."""
    sections: list[Any] = [Config]
    for part in location:
        annotations = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        if annotations:
            sections = list(next(get_args(a) or (a,) for a in annotations))
        else:
            sections = [s for s in sections if part in get_args(s.model_fields["kind"].annotation)]
    return [name for section in sections for name in section.model_fields]
