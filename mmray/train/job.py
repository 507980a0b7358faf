"""A training run from configuration to bundle.

Reads a `Config` -> gives the URI of a bundle. The same command continues a run that was interrupted, and returns the
bundle of one that is finished.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from mmray.bundle import Bundle, save_bundle, without_weight_files
from mmray.bundle_info import read_info
from mmray.config import Config
from mmray.errors import ConfigError, TableError
from mmray.labels import labels_of
from mmray.machine import given_address
from mmray.model.encoders import ENCODERS
from mmray.preprocess.text import Vocabulary
from mmray.profile import profile_of
from mmray.store import open_store
from mmray.train.checkpoint import Checkpoint, latest_checkpoint
from mmray.train.data import (
    SPLITS,
    Survey,
    Tables,
    check_label_column,
    check_labelled,
    open_tables,
    preprocessing,
    row_bytes,
    surveyed,
    surveying,
)
from mmray.train.frozen import feature_bytes, has_frozen_images
from mmray.train.golden import golden_rows
from mmray.train.loop import Settings, best_epoch
from mmray.train.place import Place, place_for
from mmray.train.task import refuse_names_of_rows, with_task, with_two_labels
from mmray.train.trainer import OnEpoch, OnStart

EPOCHS_TIMES_ROOT, MIN_EPOCHS, MAX_EPOCHS = 1325, 5, 60
HOW_IT_RUNS = {"storage", "name", "num_workers", "shard", "accumulation", "max_failures", "checkpoint_minutes"}
"""Settings that do not change what a run is: where it is kept, how many processes work on it, in what parts."""


@dataclass(frozen=True)
class TrainResult:
    """What a run gave."""

    bundle: str
    """URI of the bundle."""
    history: list[dict[str, Any]]
    best: dict[str, Any]
    """The history's entry of the epoch that became the bundle."""
    trained_epochs: int
    """Epochs trained by this call; the others were there already."""


def train_model(
    config: Config,
    *,
    on_start: OnStart = lambda epochs, done: None,
    on_epoch: OnEpoch = lambda entry: None,
    cutoffs: Mapping[int, float] | None = None,
) -> TrainResult:
    """Trains a model and writes its bundle.

    Args:
        config: its settings.
        on_start: see `OnStart`.
        on_epoch: called with the history's entry of each epoch as it ends.
        cutoffs: by epoch, the validation loss above which training ends with that epoch; see `mmray.tune`.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    given, tables = config, open_tables(config)
    config = with_task(given, tables.train)
    check_label_column(config, tables.train)
    check_gpu_request(config)
    folder = _claim_run(given, tables)
    bundle_uri = f"{folder}/bundle"
    if open_store(bundle_uri).stat("bundle.json"):
        history = read_info(bundle_uri).metrics["history"]
        return TrainResult(bundle_uri, history, history[best_epoch(history)], 0)
    _check_image_encoder(config)
    earlier = latest_checkpoint(folder)
    before = len(earlier.history) if earlier else 0
    with place_for(config, tables) as place:
        counts = surveyed(place.rows(surveying(tables, config)), tables, config)
        config = with_two_labels(with_epochs(config, counts.rows), given, counts.labels)
        refuse_names_of_rows(config, counts.labels, counts.rows)
        labels = labels_of(config, counts.labels)
        words = Vocabulary.from_counts(counts.words, config.text) if config.table.text_column else None
        _check_words(config, words)
        on_start(config.train.epochs, before)
        measured = _fit(place, config, tables, counts, labels, words, folder, on_epoch, cutoffs or {})
    state = latest_checkpoint(folder)
    assert state is not None, "a fitted run has a checkpoint"
    save_bundle(_make_bundle(config, tables, counts, labels, words, state, measured), bundle_uri)
    return TrainResult(bundle_uri, state.history, state.history[best_epoch(state.history)], len(state.history) - before)


def _fit(
    place: Place,
    config: Config,
    tables: Tables,
    counts: Survey,
    labels: Sequence[str],
    words: Vocabulary | None,
    folder: str,
    on_epoch: OnEpoch,
    cutoffs: Mapping[int, float],
) -> int:
    """Trains, and returns the number of validation rows."""
    train = config.train
    frozen = has_frozen_images(config)
    bytes_each = row_bytes(config, len(labels), feature_bytes(config) if frozen else None)
    # A table smaller than a batch is cached whatever it takes: a stream of it would end before its first batch.
    fits = counts.rows * bytes_each <= train.cache_bytes or counts.rows < train.batch_size or not place.streams
    work = {split: preprocessing(tables, split, config, words, labels) for split in SPLITS}
    with_features = config if frozen and fits else None
    validation = place.blocks(work["validation"], "validation", with_features)
    measured = validation.num_rows
    unusable = counts.held_out - measured
    check_labelled(unusable, counts.held_out, "validation", "no label that training rows have", config.table)
    if not measured:
        raise TableError(
            "no labelled row is left for validation; raise table.validation_fraction or give table.validation"
        )
    cached = {"validation": validation.blocks}
    if fits:
        cached["train"] = place.blocks(work["train"], "train", with_features).blocks
    settings = Settings(
        config=config,
        folder=folder,
        num_labels=max(len(labels), 1),
        words=words.words if words else (),
        class_counts=[counts.labels[label] for label in labels],
        target_mean=counts.target_mean,
        target_std=counts.target_std,
        num_rows=counts.rows,
        files=[file.uri for file in tables.train.files],
        cached=cached,
        cutoffs=cutoffs,
    )
    place.fit(settings, None if fits else work["train"], on_epoch)
    return measured


def with_epochs(config: Config, rows: int) -> Config:
    """Returns the configuration with a number of epochs: chosen by the number of training rows where it is 0."""
    # A larger table needs fewer passes, and yet more steps: both go with the square root of its rows.
    epochs = config.train.epochs or min(max(round(EPOCHS_TIMES_ROOT / math.sqrt(rows)), MIN_EPOCHS), MAX_EPOCHS)
    return config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})


def _claim_run(config: Config, tables: Tables) -> str:
    """Returns the run's folder; refuses one that belongs to another configuration or other tables."""
    settings = config.model_dump(mode="json", exclude={"train": HOW_IT_RUNS})
    files = [[f.uri, f.size, f.version] for t in (tables.train, tables.validation) if t for f in t.files]
    digest = hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()
    folder = open_store(config.train.storage).child(config.train.name or digest[:12])
    store = open_store(folder)
    mine = json.dumps({"digest": digest, "config": settings}, indent=1).encode()
    if not store.create("run.json", mine):
        theirs = json.loads(store.read("run.json"))
        if theirs["digest"] != digest:
            raise ConfigError(
                f"{folder} holds a run with another configuration or other tables; give another train.name"
            )
    return folder


def check_gpu_request(config: Config) -> None:
    """Refuses GPUs that this machine has not; a cluster that is given may grow them."""
    if not config.train.use_gpu or given_address():
        return
    # Ray hides the GPUs from what has not asked for one, such as a trial of `mmray.tune`: its workers have.
    if not (ray.cluster_resources().get("GPU") if ray.is_initialized() else torch.cuda.is_available()):  # type: ignore[no-untyped-call]
        raise ConfigError("train.use_gpu = true, and this machine has no GPU that torch can use; set it to false")


def _check_words(config: Config, vocabulary: Vocabulary | None) -> None:
    if vocabulary is not None and len(vocabulary.words) == 0 and not config.text.ngram_buckets:
        raise TableError(
            f"no word of the text column {config.table.text_column!r} is left for the vocabulary; "
            "lower text.min_count, or check the column"
        )
    if vocabulary is not None and config.model.text_encoder.word_vectors is not None:
        ENCODERS["text"](config, vocabulary.words)  # which says what is wrong with the vectors


def _check_image_encoder(config: Config) -> None:
    """Refuses weights that are not the network's, and images that it does not take, by giving it one."""
    if "image" not in config.table.modalities:
        return
    size = config.image.size
    weights = getattr(config.model.image_encoder, "weights", "none")
    # What torchvision would download is the workers' business.
    here = weights == "package" or os.path.isfile(weights)
    encoder = ENCODERS["image"](config if here else without_weight_files(config), ()).eval()
    try:
        with torch.inference_mode():
            encoder({"image": torch.zeros(1, size, size, 3, dtype=torch.uint8)})
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"model.image_encoder does not take images of image.size = {size}: {str(error).splitlines()[0]}"
        ) from None


def _make_bundle(
    config: Config,
    tables: Tables,
    counts: Survey,
    labels: Sequence[str],
    words: Vocabulary | None,
    state: Checkpoint,
    validation_rows: int,
) -> Bundle:
    regression = config.task.kind == "regression"
    spread = 3 * counts.target_std
    best = state.history[best_epoch(state.history)]
    temperature = {"head.temperature": torch.tensor(best["temperature"])} if "temperature" in best else {}
    bundle = Bundle(
        config=config,
        labels=tuple(labels),
        vocabulary=words,
        weights={**state.best, **temperature},
        metrics={
            "validation": best,
            "history": state.history,
            "train_rows": counts.rows,
            "unlabelled_rows": counts.unlabelled,
            "validation_rows": validation_rows,
            "unlabelled_validation_rows": counts.held_out - validation_rows,
        },
        score_range=(counts.target_mean - spread, counts.target_mean + spread) if regression else (0.0, 1.0),
    )
    roots = tables.train.image_roots(config.table.image_roots)
    inputs = profile_of(bundle, tables.train, roots).to_dict()
    bundle = replace(bundle, metrics={**bundle.metrics, "inputs": inputs})
    return golden_rows(bundle, tables.train, roots)
