"""What a bundle's `bundle.json` says: enough to plan with, without the model and what it needs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmray.config import Config
from mmray.errors import BundleError
from mmray.store import open_store

FORMAT_VERSION = 2


@dataclass(frozen=True)
class BundleInfo:
    """What `bundle.json` says, without loading the rest."""

    fingerprint: str
    config: Config
    labels: tuple[str, ...]
    metrics: Mapping[str, Any]
    score_range: tuple[float, float]
    digests: Mapping[str, str]


def read_info(uri: str) -> BundleInfo:
    """Reads `bundle.json` alone: enough to plan a run without loading the model.

    Raises:
        BundleError: there is no bundle, or it is of another version or malformed.
    """
    try:
        raw = json.loads(open_store(uri).read("bundle.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"no bundle at {uri!r}: it has no bundle.json; give the folder `mmray train` printed"
        ) from None
    except (ValueError, RecursionError):
        raise BundleError(f"{uri}/bundle.json is not JSON; the bundle is damaged, copy it again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{uri} is a bundle of format {version!r}; this mmray reads format {FORMAT_VERSION}: "
            "train it again, or use the mmray version that made it"
        )
    try:
        return BundleInfo(
            fingerprint=str(raw["fingerprint"]),
            config=Config.model_validate(raw["config"]),
            labels=tuple(raw["labels"]),
            metrics=raw["metrics"],
            score_range=(float(raw["score_range"][0]), float(raw["score_range"][1])),
            digests=dict(raw["sha256"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BundleError(f"{uri}/bundle.json is malformed ({error}); the bundle is damaged, copy it again") from None
