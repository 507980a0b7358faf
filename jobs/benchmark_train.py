"""Measures training beside a bare loop: the same steps of the same model, over batches that are in memory already.

What lies between the two is what Ray Train, the drawing of batches, validation and checkpoints cost.
"""

import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

EPOCHS, WARM_UP = 5, 1  # of which the first are not counted
HELD_OUT = 0.02  # of the rows: validation is no part of a bare loop


def measure_training(folder: Path, table: Path, repeats: int) -> dict[str, Any]:
    """Returns rows/s of one training worker and of the bare loop, taken in turns, and their ratio."""
    from mmray.machine import KEEP_MEMORY

    os.environ |= KEEP_MEMORY  # of the bare loop, as training workers have it
    ours, bare = [], []
    for k in range(repeats):
        bundle, rate = _train(table, folder, f"run-{k}")
        ours.append(rate)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            bare.append(pool.apply(bare_training, (bundle,)))
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {
        "train_rows_per_s": [round(rate) for rate in ours],
        "bare_loop_rows_per_s": [round(rate) for rate in bare],
        "train_to_bare": round(statistics.median(ratios), 3),
    }


def _train(table: Path, folder: Path, name: str) -> tuple[str, float]:
    from mmray.bundle_info import read_info
    from mmray.config_file import parse_config
    from mmray.train.job import train_model

    config = parse_config(
        {
            "table": {"train": str(table), "validation_fraction": HELD_OUT},
            "task": {"kind": "multiclass"},
            "train": {"epochs": EPOCHS, "storage": str(folder / "runs"), "name": name},
        },
        "benchmark",
    )
    ended: list[float] = []
    bundle = train_model(config, on_epoch=lambda entry: ended.append(time.perf_counter())).bundle
    rows = read_info(bundle).metrics["train_rows"] // config.train.batch_size * config.train.batch_size
    return bundle, rows * (EPOCHS - WARM_UP) / (ended[-1] - ended[WARM_UP - 1])


def bare_training(bundle: str) -> float:
    """Returns rows/s of the training steps of a bundle's model, over made-up batches of its shapes."""
    import numpy as np
    import torch

    from mmray.bundle import load_bundle
    from mmray.machine import local_cpus
    from mmray.model import FusionModel
    from mmray.train.optimizer import build_optimizer
    from mmray.train.steps import Steps, TrainingLoss

    torch.set_num_threads(local_cpus())
    loaded = load_bundle(bundle)
    config, labels, words = loaded.config, len(loaded.labels), loaded.vocabulary.words if loaded.vocabulary else ()
    generator, size, side = np.random.default_rng(0), config.train.batch_size, config.image.size
    batch = {
        "image": generator.integers(0, 255, (size, side, side, 3), np.uint8),
        "token_ids": generator.integers(1, len(words), (size, config.text.max_tokens)).astype(np.int32),
        "ngram_ids": generator.integers(1, config.text.ngram_buckets, (size, config.text.max_ngrams)).astype(np.int32),
        "present_image": np.ones(size, bool),
        "present_text": np.ones(size, bool),
        "target": generator.integers(0, labels, size),
    }
    model = FusionModel(config, num_labels=labels, words=words)
    num_steps = max(loaded.metrics["train_rows"] // size, 1) * EPOCHS
    loss = TrainingLoss(model, config.train.auxiliary_weight)
    steps = Steps(loss, model, build_optimizer(config, model), config, num_steps, ())
    warm_up, counted = num_steps // EPOCHS * WARM_UP, num_steps // EPOCHS * (EPOCHS - WARM_UP)
    list(steps.run((batch, 1.0) for _ in range(warm_up)))
    started = time.perf_counter()
    list(steps.run((batch, 1.0) for _ in range(counted)))
    return float(size * counted / (time.perf_counter() - started))
