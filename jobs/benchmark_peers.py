"""Scores a table with a bundle's model as users of other systems would: each as its own documentation recommends.

    python jobs/benchmark_peers.py NAME BUNDLE TABLE OUTPUT

`loop` is two processes of plain PyTorch and nothing around them; `loader` PyTorch's DataLoader; `ray` Ray Data's recipe
of a map that decodes, an actor that predicts, and `write_parquet`; `daft` and `spark` need their packages, Spark Java.
All of them run the model as it was trained, in fp32, and decode, tokenise and resize as every tutorial does.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from benchmark_process import run_mmray

SIZE, BATCH = 224, 64
PEERS = ("loop", "loader", "ray", "daft", "spark")


def measure_peers(folder: Path, table: Path, bundle: Path, repeats: int, precision: str) -> dict[str, Any]:
    """Returns seconds of `mmray score` and of each peer, from start to end and in turns; and how far scores differ."""
    seconds: dict[str, list[float]] = {name: [] for name in ("mmray", *available())}
    for k in range(repeats):
        for name, its in seconds.items():
            output = folder / f"{name}-{k}"
            if name == "mmray":
                its.append(run_mmray("score", bundle, table, output, "--precision", precision)["seconds"])
            else:
                its.append(run_peer(name, bundle, table, output))
    medians = {name: round(statistics.median(its), 1) for name, its in seconds.items()}
    ours, rows = medians.pop("mmray"), len(_frame(str(table)))
    difference = np.abs(_scores(folder / "mmray-0" / "data") - _scores(folder / "loader-0")).max()
    return {
        "rows": rows,
        "precision": precision,
        "mmray_s": ours,
        "mmray_rows_per_s": round(rows / ours),
        "peer_s": medians,
        "peer_to_mmray": {name: round(its / ours, 2) for name, its in medians.items()},
        "largest_difference_of_a_score": round(float(difference), 5),
    }


def _scores(output: Path) -> Any:
    files = sorted(output.glob("*.parquet")) if output.is_dir() else [output]
    frame = pd.concat(map(pd.read_parquet, files))
    return frame.sort_values("id").score.to_numpy()


def available() -> list[str]:
    """Returns the peers that are installed."""
    needs = {"daft": "daft", "spark": "pyspark"}
    return [name for name in PEERS if name not in needs or importlib.util.find_spec(needs[name])]


def run_peer(name: str, bundle: Path, table: Path, output: Path) -> float:
    """Returns the seconds that a peer takes, as a process of its own from its start to its end."""
    command = [sys.executable, __file__, name, str(bundle), str(table), str(output)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": path})
    return time.perf_counter() - started


def load(path: str) -> Any:
    """Returns the pixels of an image, uint8 [S, S, 3]."""
    import cv2

    pixels: Any = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
    return cv2.resize(pixels, (SIZE, SIZE))


class Model:
    """A bundle's network, in fp32 on one thread."""

    def __init__(self, bundle: str) -> None:
        import torch

        from mmray.bundle import load_bundle

        torch.set_num_threads(1)
        loaded = load_bundle(bundle)
        assert loaded.vocabulary is not None, "it reads texts"
        assert loaded.config.image.size == SIZE, "as `load` gives them"
        self._network, self._vocabulary = loaded.build_model(), loaded.vocabulary
        self._max_tokens = loaded.config.text.max_tokens

    def predict(self, images: Sequence[Any], texts: Sequence[str]) -> Any:
        """Returns the score of each row, float32 [B]."""
        import nltk.tokenize
        import torch

        words = [nltk.tokenize.word_tokenize(text.lower(), preserve_line=True)[: self._max_tokens] for text in texts]
        ids = np.zeros((len(texts), max(map(len, words))), np.int32)
        for k, row in enumerate(words):
            ids[k, : len(row)] = self._vocabulary.ids(row)
        present = {name: torch.ones(len(texts), dtype=torch.bool) for name in ("image", "text")}
        with torch.inference_mode():
            arrays = {"image": torch.from_numpy(np.stack(images)), "token_ids": torch.from_numpy(ids)}
            logits = self._network.fuse(self._network.encode(arrays), present)
            return self._network.head.outputs(logits).numpy()[:, 1]


def loop(bundle: str, table: str, output: str) -> None:
    """Scores by two processes of plain PyTorch."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_loop, [(bundle, table, f"{output}-{k}.parquet", k) for k in range(2)])


def _loop(bundle: str, table: str, output: str, first: int) -> None:
    model, frame = Model(bundle), _frame(table).iloc[first::2]
    scores: list[float] = []
    for k in range(0, len(frame), BATCH):
        rows = frame.iloc[k : k + BATCH]
        scores.extend(model.predict([load(path) for path in rows.image_path], list(rows.text)))
    frame.assign(score=scores).to_parquet(output)


def loader(bundle: str, table: str, output: str) -> None:
    """Scores by a DataLoader with two workers."""
    import torch

    frame, model = _frame(table), Model(bundle)

    class Rows(torch.utils.data.Dataset[tuple[Any, str]]):
        def __len__(self) -> int:
            return len(frame)

        def __getitem__(self, k: int) -> tuple[Any, str]:
            return load(frame.image_path[k]), frame.text[k]

    batches: Any = torch.utils.data.DataLoader(
        Rows(), batch_size=BATCH, num_workers=2, collate_fn=lambda rows: [*zip(*rows, strict=True)]
    )
    scores = [score for images, texts in batches for score in model.predict(images, texts)]
    frame.assign(score=scores).to_parquet(output)


def ray(bundle: str, table: str, output: str) -> None:
    """Scores by Ray Data's recipe."""
    import ray as _ray

    class Predict:
        def __init__(self) -> None:
            self.model = Model(bundle)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            images = list(batch.pop("image"))
            return {**batch, "score": self.model.predict(images, list(batch["text"]))}

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "image": load(f"{table}/{row['image_path']}")}

    _ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    pool = _ray.data.ActorPoolStrategy(size=1)
    rows = _ray.data.read_parquet(table).map(decode)
    rows.map_batches(Predict, batch_size=BATCH, compute=pool, num_cpus=1).write_parquet(output)


def daft(bundle: str, table: str, output: str) -> None:
    """Scores by Daft, with two processes for the model."""
    import daft as _daft
    import daft.functions as functions

    @_daft.cls(max_concurrency=2, use_process=True)
    class Predict:
        def __init__(self) -> None:
            self.model = Model(bundle)

        @_daft.method.batch(return_dtype=_daft.DataType.float32(), batch_size=BATCH)  # type: ignore[untyped-decorator]
        def score(self, images: Any, texts: Any) -> Any:
            return self.model.predict([np.asarray(image) for image in images.to_pylist()], texts.to_pylist())

    rows = _daft.read_parquet(f"{table}/*.parquet")
    path = _daft.lit(f"{table}/") + _daft.col("image_path")
    image = functions.resize(functions.decode_image(functions.download(path), mode="RGB"), w=SIZE, h=SIZE)
    scored = rows.with_column("image", image).with_column(
        "score", Predict().score(_daft.col("image"), _daft.col("text"))
    )
    scored.exclude("image").write_parquet(output)


def spark(bundle: str, table: str, output: str) -> None:
    """Scores by Spark's `predict_batch_udf`."""
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.types import FloatType

    def make() -> Any:
        model = Model(bundle)
        return lambda paths, texts: model.predict([load(f"{table}/{path}") for path in paths], list(texts))

    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    score = predict_batch_udf(make, return_type=FloatType(), batch_size=BATCH)
    rows = session.read.parquet(table).repartition(8)
    rows.withColumn("score", score("image_path", "text")).write.parquet(output)


def _frame(table: str) -> Any:
    frame = pd.concat(map(pd.read_parquet, sorted(Path(table).glob("*.parquet"))), ignore_index=True)
    return frame.assign(image_path=[f"{table}/{path}" for path in frame.image_path])


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
