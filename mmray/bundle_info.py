"""What a bundle's `bundle.json` says: enough to plan with, without the model and what it needs."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmray.config import Config
from mmray.errors import BundleError
from mmray.store import open_store

FORMAT_VERSION = 3
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"\n\}\Z')


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
        data = open_store(uri).read("bundle.json")
        raw = json.loads(data)
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
    if not _is_sealed(data):
        raise BundleError(f"{uri}/bundle.json does not have the sha256 that it ends with; it is damaged, copy it again")
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


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a `bundle.json`, which end with the sha256 of the others."""
    zeros = json.dumps({**manifest, "seal": "0" * 64}, indent=1).encode()
    return _SEAL.sub(b'"seal": "%s"\n}' % hashlib.sha256(zeros).hexdigest().encode(), zeros)


def _is_sealed(data: bytes) -> bool:
    found = _SEAL.search(data)
    if found is None:
        return False
    return hashlib.sha256(data[: found.start(1)] + b"0" * 64 + data[found.end(1) :]).hexdigest().encode() == found[1]
