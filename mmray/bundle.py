"""The checkpoint: everything that makes a score, in one directory without pickles.

    bundle.json          format version, config, labels, metrics, package versions, fingerprint, sha256 of the others
    weights.safetensors  every parameter and buffer
    vocabulary.json      the words, in order of their ids
    golden.parquet       a few rows with their cells and the scores they must get

`bundle.json` is written last: a folder without it is not a bundle. Its own digest stands at its end, over all bytes but
those of the digest. Loading verifies every digest, and opens no other file.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import safetensors
import safetensors.torch
import torch

from mmray.bundle_info import FORMAT_VERSION, read_info, sealed
from mmray.config import Config
from mmray.errors import BundleError, ConfigError
from mmray.model import FusionModel
from mmray.parquet import from_parquet, to_parquet
from mmray.preprocess import Preprocessor
from mmray.preprocess.text import Vocabulary
from mmray.store import open_store

FILES = ("weights.safetensors", "vocabulary.json", "golden.parquet")
PACKAGES = ("mmray", "torch", "torchvision", "nltk", "opencv-python", "opencv-python-headless", "numpy")


@dataclass(frozen=True)
class Bundle:
    """A trained model with all that is needed to use it, in memory."""

    config: Config
    labels: tuple[str, ...]
    """Label of each output; empty for regression."""
    vocabulary: Vocabulary | None
    weights: Mapping[str, torch.Tensor]
    golden: pa.Table | None = None
    """Columns `image` (bytes), `text`, `outputs` (list<float>: what the model must give)."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What training measured: validation metrics, the course of each epoch."""
    score_range: tuple[float, float] = (0.0, 1.0)
    """Where scores are expected to lie: the axis of histograms."""

    def build_model(self) -> FusionModel:
        """Builds the network and loads the weights, in evaluation mode.

        Raises:
            BundleError: the weights do not fit the configuration.
        """
        words = self.vocabulary.words if self.vocabulary else ()
        # The weights come from the bundle: a file named in the training configuration need not exist here.
        model = FusionModel(without_weight_files(self.config), num_labels=max(len(self.labels), 1), words=words)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise BundleError(f"the bundle's weights do not fit its configuration: {error}") from None
        return model.eval()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over configuration, labels, weights, vocabulary and preprocessing version."""
        digest = hashlib.sha256()
        for part in (
            self.config.model_dump_json(include={"image", "text", "model", "task"}),
            json.dumps([self.labels, self.config.table.modalities, Preprocessor.version]),
            self.vocabulary.to_json() if self.vocabulary else "",
        ):
            digest.update(hashlib.sha256(part.encode()).digest())
        digest.update(hashlib.sha256(_pack_weights(self.weights)).digest())
        return digest.hexdigest()


def without_weight_files(config: Config) -> Config:
    """Returns the configuration with pretrained weights and word vectors left out: a bundle has its own."""
    encoders: dict[str, Any] = {}
    if hasattr(config.model.image_encoder, "weights"):
        encoders["image_encoder"] = config.model.image_encoder.model_copy(update={"weights": "none"})
    encoders["text_encoder"] = config.model.text_encoder.model_copy(update={"word_vectors": None})
    return config.model_copy(update={"model": config.model.model_copy(update=encoders)})


def save_bundle(bundle: Bundle, uri: str) -> None:
    """Writes a bundle to a folder or URI that has none yet.

    Raises:
        ConfigError: there is a bundle already.
    """
    store = open_store(uri)
    files = {"weights.safetensors": _pack_weights(bundle.weights)}
    if bundle.vocabulary:
        files["vocabulary.json"] = bundle.vocabulary.to_json().encode()
    if bundle.golden is not None:
        files["golden.parquet"] = to_parquet(bundle.golden)
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": bundle.fingerprint,
        "config": bundle.config.model_dump(mode="json"),
        "labels": bundle.labels,
        "metrics": bundle.metrics,
        "score_range": bundle.score_range,
        "versions": _installed_versions(),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    for name, data in files.items():
        if not store.create(name, data) and store.read(name) != data:
            raise ConfigError(f"{uri} already holds another bundle's {name}; give a folder that does not exist")
    if not store.create("bundle.json", sealed(manifest)):
        raise ConfigError(f"{uri} already holds a bundle; give a folder that does not exist")


def load_bundle(uri: str) -> Bundle:
    """Reads a bundle and verifies every digest and the fingerprint.

    Raises:
        BundleError: a file is missing or altered, or the version is another.
    """
    info = read_info(uri)
    files = {name: _read_verified(uri, name, digest) for name, digest in info.digests.items()}
    try:
        bundle = Bundle(
            config=info.config,
            labels=info.labels,
            vocabulary=Vocabulary.from_json(files["vocabulary.json"].decode()) if "vocabulary.json" in files else None,
            weights=safetensors.torch.load(files["weights.safetensors"]),
            golden=from_parquet(files["golden.parquet"]) if "golden.parquet" in files else None,
            metrics=info.metrics,
            score_range=info.score_range,
        )
    except (KeyError, ValueError, pa.ArrowException, safetensors.SafetensorError) as error:
        raise BundleError(f"the bundle at {uri} is incomplete or damaged ({error}); copy it again") from None
    if bundle.fingerprint != info.fingerprint:
        raise BundleError(
            f"the bundle at {uri} does not match its fingerprint: it says {info.fingerprint[:12]}, it is "
            f"{bundle.fingerprint[:12]}; bundle.json was edited, or this mmray preprocesses differently"
        )
    return bundle


def _read_verified(uri: str, name: str, digest: str) -> bytes:
    if name not in FILES:
        raise BundleError(f"the bundle at {uri} lists {name!r}, which no bundle has; take it from where it was made")
    try:
        data = open_store(uri).read(name)
    except FileNotFoundError:
        raise BundleError(f"the bundle at {uri} lacks {name}; copy it again") from None
    got = hashlib.sha256(data).hexdigest()
    if got != digest:
        raise BundleError(
            f"{uri}/{name} is damaged: its sha256 is {got[:12]}..., bundle.json says {digest[:12]}...; copy it again"
        )
    return data


def _installed_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:  # of OpenCV's two packages one is there
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _pack_weights(weights: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
