"""Small models and tables that several tests use."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmray.bundle import Bundle, load_bundle, save_bundle
from mmray.config import Config
from mmray.config_file import parse_config
from mmray.model import FusionModel
from mmray.options import ScoreConfig
from mmray.preprocess.text import Vocabulary
from mmray.score.carry import Carry
from mmray.score.commit import Manifest, Output, Receipt
from mmray.score.ledger import Ledger
from mmray.score.plan import Plan, describe, make_plan
from mmray.score.worker import SliceScorer
from mmray.slices import Slice, open_table
from mmray.train.golden import golden_rows

WORDS = ("red", "green", "blue", "square", "round", "a", "the")
COLOURS = {"blue": (255, 0, 0), "green": (0, 255, 0), "red": (0, 0, 255)}


def small_config(**sections: Any) -> Config:
    """A configuration with a tiny model; sections are merged over it."""
    raw: dict[str, Any] = {
        "table": {"train": "rows"},
        "task": {"kind": "multiclass"},
        "image": {"size": 16},
        "text": {"max_tokens": 8, "ngram_buckets": 50, "max_ngrams": 20},
        "model": {
            "width": 16,
            "dropout": 0.1,
            "image_encoder": {"kind": "cnn", "channels": [4, 8]},
            "text_encoder": {"kind": "lstm", "embedding_dim": 8, "hidden_dim": 8},
        },
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return parse_config(raw, "test")


def small_bundle(
    config: Config | None = None, labels: Sequence[str] = ("blue", "green", "red"), seed: int = 0
) -> Bundle:
    """An untrained model as a bundle, the same for the same seed."""
    config = config or small_config()
    torch.manual_seed(seed)
    model = FusionModel(config, num_labels=max(len(labels), 1), words=WORDS)
    vocabulary = Vocabulary(WORDS) if config.table.text_column else None
    return Bundle(config=config, labels=tuple(labels), vocabulary=vocabulary, weights=model.state_dict())


def with_golden(bundle: Bundle, table: Path) -> Bundle:
    """The bundle with golden rows from a table."""
    return golden_rows(bundle, open_table(str(table)), (str(table),))


def saved_bundle(folder: Path, table: Path, seed: int = 0) -> str:
    """Saves an untrained model with golden rows from a table, the same for the same seed; returns where it is."""
    save_bundle(with_golden(small_bundle(seed=seed), table), str(folder))
    return str(folder)


def with_other_scores(bundle: str, folder: Path) -> str:
    """Saves a bundle whose weights do not give its golden rows their scores; returns where it is."""
    loaded = load_bundle(bundle)
    weights = {**loaded.weights, "head._linear.weight": loaded.weights["head._linear.weight"].flip(0).contiguous()}
    save_bundle(dataclasses.replace(loaded, weights=weights), str(folder))
    return str(folder)


def colour_table(folder: Path, rows: int = 120, files: int = 2, **columns: Sequence[Any]) -> Path:
    """Pictures of one colour with a text that names it: `image_path`, `text`, `label`, and a number to regress."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    records = []
    for k in range(rows):
        colour = list(COLOURS)[k % 3]
        noise = generator.integers(0, 60, (24, 32, 3))
        image = np.clip(np.asarray(COLOURS[colour]) * 0.8 + noise, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{k}.jpg"), image)
        text = f"the {colour} square" if k % 2 else f"a {colour} one, number {k}"
        records.append(
            {
                "id": k,
                "image_path": f"images/{k}.jpg",
                "text": text,
                "label": colour,
                "value": float(list(COLOURS).index(colour)) + generator.normal(0, 0.1),
                "both": [colour, "even" if k % 2 == 0 else "odd"],
                "is_red": "yes" if colour == "red" else "no",
            }
        )
    table = pa.Table.from_pylist(records)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    for k in range(files):
        part = table.take(list(range(k, rows, files)))
        pq.write_table(part, folder / f"part-{k}.parquet", row_group_size=25)
    return folder


def score_in_process(
    bundle: str, table: str, output: str, options: ScoreConfig | None = None, stop_after: int = 10**9
) -> Ledger:
    """Scores as `score_table` does, with one scorer in this process in place of a cluster."""
    options = options or ScoreConfig(precision="fp32")
    plan = make_plan(bundle, table, options)
    target = Output(output)
    target.claim(plan, describe(plan, bundle, table))
    scorer = SliceScorer(bundle, output, plan.hash, plan.image_roots, options)
    done = target.committed(plan.hash)
    todo = [piece for piece in plan.slices if piece.index not in done]
    for piece in todo[:stop_after]:
        scorer.score(piece)
    if len(todo) > stop_after:
        return Ledger()
    manifest = Manifest.of(target.receipts(plan.hash, plan.slices))
    return target.finalize(plan, manifest, options.max_error_rate)


def one_scorer(
    bundle: str, output: str, plan: Plan, todo: Sequence[Slice], options: ScoreConfig, carry: Carry | None
) -> Iterator[Receipt]:
    """Takes the place of the processes that score (`mmray.score.job._run`) where a test is not of them."""
    scorer = SliceScorer(bundle, output, plan.hash, plan.image_roots, options, carry=carry)
    return map(scorer.score, todo)
