"""The only inference path: a bundle and a table in, the table with its scores out. Knows nothing of Ray.

Reads cells of images and texts -> gives one prediction per row, in order. A row's score does not depend on the batch,
the order or the neighbours it comes with, within `TOLERANCE`.
"""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mmray.bundle import Bundle, load_bundle
from mmray.errors import BundleError, ConfigError, EnvironmentFaultError
from mmray.model.folding import fold
from mmray.model.precision import Precision, autocast, resolve_precision
from mmray.options import ScoreConfig, column_of
from mmray.prediction import Prediction
from mmray.preprocess import Features, Preprocessor
from mmray.preprocess.image import prepare_decoders
from mmray.source import ImageSource
from mmray.table import append_columns, cells, output_fields

TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}
"""Largest difference of a probability (or of a standardised regression value) between machines and batch sizes."""

FED_AHEAD = 16  # batches on their way from elsewhere: so many CPUs can prepare at a time, and memory has a bound
_log = logging.getLogger(__name__)
T = TypeVar("T")
Feed = Callable[[Mapping[str, Sequence[Any]]], Future[Features]]
"""Who prepares a batch: called with the cells of each modality, answers at once with what will be its features."""
OnStage = Callable[[str, float], None]
"""Called with the name of a stage and the seconds that something took there."""


class Predictor:
    """A bundle made ready on a device."""

    def __init__(
        self,
        bundle: Bundle,
        source: ImageSource,
        options: ScoreConfig,
        device: str = "cpu",
        *,
        feed: Feed | None = None,
        on_stage: OnStage = lambda stage, seconds: None,
    ) -> None:
        """Loads the weights and rescores the golden rows.

        Args:
            bundle: the model and what goes with it.
            source: where images are read.
            options: precision, batch size, threads.
            device: `cpu` or `cuda`.
            feed: who prepares batches elsewhere, several at a time; by default a thread of this process does, one.
            on_stage: called with `prepare` or `forward` and the seconds that a batch took there.

        Raises:
            BundleError: the golden rows do not get their scores.
            ConfigError: the device does not exist.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                "a GPU was asked for and this machine has none that torch can use; leave --gpus out, or run elsewhere"
            )
        self.bundle, self.options, self.device = bundle, options, device
        self._model = bundle.build_model()
        fold(self._model)
        self._model.to(device)
        self._preprocess = Preprocessor(
            bundle.config, bundle.vocabulary, source, decode_threads=options.decode_threads or 1, reads=options.reads
        )
        self._thread = ThreadPoolExecutor(1)
        self._feed, self._ahead = feed, FED_AHEAD if feed else 1
        self._on_stage = on_stage
        self._fits = sys.maxsize  # rows of a forward pass, as far as is known
        self._turn = threading.Lock()  # two batches at once would only push one another out of the cache
        self.precision: Precision = "fp32"
        self.precision = self._choose_precision()

    @classmethod
    def on_this_worker(cls, bundle: Bundle, source: ImageSource, options: ScoreConfig, **more: Any) -> "Predictor":
        """Makes a predictor in a process that has one CPU core, or a GPU, to itself; `more` as the class takes it."""
        prepare_decoders()
        if not options.gpus_per_actor:
            torch.set_num_threads(1)  # one process per core with one thread each beats fewer with more
        return cls(bundle, source, options, "cuda" if options.gpus_per_actor else "cpu", **more)

    def __repr__(self) -> str:
        task, labels = self.bundle.config.task.kind, len(self.bundle.labels)
        about = f"{task}, {labels} labels" if labels else task
        return f"<Predictor {self.bundle.fingerprint[:12]}: {about}, {self.precision} on {self.device}>"

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the model knows, sorted."""
        return self.bundle.config.table.modalities

    def score(self, table: pa.Table) -> pa.Table:
        """Returns the table with the columns of `output_fields` appended: n rows in, n rows out, in order."""
        columns = {name: cells(table[self.column(name)]) for name in self.modalities}
        return append_columns(table, self.scores(self.predict(columns)))

    def scores(self, prediction: Prediction) -> pa.Table:
        """Returns the columns of `output_fields` for what was predicted, a row each."""
        names, task = [field.name for field in self.fields], self.bundle.config.task.kind
        columns = zip(self.fields, prediction.columns(names, task, self.bundle.labels), strict=True)
        arrays = [pa.array(values, field.type, from_pandas=False) for field, values in columns]
        return pa.Table.from_arrays(arrays, schema=pa.schema(self.fields))

    def column(self, modality: str) -> str:
        """Returns the name of a modality's column: the run's own, or the one trained on."""
        return column_of(modality, self.options, self.bundle.config.table)

    @property
    def fields(self) -> list[pa.Field]:
        """The columns that scoring appends."""
        return output_fields(
            self.bundle.config.task.kind, probabilities=self.options.probabilities, modalities=self.modalities
        )

    def predict(
        self, columns: Mapping[str, Sequence[Any]], *, alone: bool = False, alphas: Sequence[float] = ()
    ) -> Prediction:
        """Predicts B rows.

        Args:
            columns: modality -> B cells.
            alone: also predict each row from each modality on its own.
            alphas: also predict each row at these weights of the image, where the fusion has one.
        """
        forward = partial(self._in_turn, alone=alone, alphas=alphas)
        parts = [forward(part) for part in self._batches(columns)]
        if not parts:
            return forward(self._preprocess({name: [None] for name in self.modalities})).head(0)
        return Prediction.concatenate(parts)

    def prepare(self, columns: Mapping[str, Sequence[Any]]) -> Features:
        """Preprocesses B rows, for `predict_features`; thread-safe."""
        return self._preprocess(columns)

    def _batches(self, columns: Mapping[str, Sequence[Any]]) -> Iterator[Features]:
        # Batches are prepared while the model is at another: decoding releases the interpreter lock, a store's answers
        # take their time, and a GPU would wait for both.
        feed = self._feed or self._prepare_beside  # not kept: a reference to itself would keep it in memory
        size, num_rows = self.options.rows_per_batch, len(next(iter(columns.values())))
        pending: deque[Future[Features]] = deque()
        for k in range(0, num_rows, size):
            pending.append(feed({name: column[k : k + size] for name, column in columns.items()}))
            if len(pending) > self._ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _prepare_beside(self, columns: Mapping[str, Sequence[Any]]) -> Future[Features]:
        return self._thread.submit(timed, self._on_stage, "prepare", self._preprocess, columns)

    def _in_turn(self, features: Features, alone: bool, alphas: Sequence[float]) -> Prediction:
        predict = partial(self.predict_features, alone=alone, alphas=alphas)
        with self._turn:  # the wait for which is no time of the model
            return timed(self._on_stage, "forward", predict, features)

    def predict_features(self, features: Features, *, alone: bool = False, alphas: Sequence[float] = ()) -> Prediction:
        """Predicts B rows that were preprocessed, as one batch; as smaller ones from when one did not fit in memory.

        Raises:
            EnvironmentFaultError: a single row does not fit.
        """
        rows = features.num_rows
        if rows <= self._fits:
            try:
                return self._forward(features, alone, alphas)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
            self._shrink(rows)
        parts = [self.predict_features(part, alone=alone, alphas=alphas) for part in features.split(self._fits)]
        return Prediction.concatenate(parts)

    def _shrink(self, rows: int) -> None:
        if rows < 2:
            raise EnvironmentFaultError(
                f"the memory of this {self.device} does not hold the model at one row; run fewer processes on it, or "
                "take a larger machine"
            )
        self._fits = rows // 2
        _log.warning("%d rows do not fit in memory; from now on %d at a time", rows, self._fits)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, features: Features, alone: bool, alphas: Sequence[float]) -> Prediction:
        arrays = {name: torch.from_numpy(array).to(self.device) for name, array in features.arrays.items()}
        present = {name: torch.from_numpy(mask).to(self.device) for name, mask in features.present.items()}
        with autocast(self.device, self.precision):
            embeddings = self._model.encode(arrays)
            logits = self._model.fuse(embeddings, present)
            weight = self._model.image_weight(embeddings, present)
            views = {name: self._model.fuse(embeddings, _only(name, present)) for name in present if alone}
            swept = {a: self._model.fuse_at(a, embeddings, present) for a in alphas if weight is not None}
        some: NDArray[np.bool_] = np.logical_or.reduce([*features.present.values()])
        return Prediction(
            outputs=self._outputs(logits, some),
            present=features.present,
            faults=features.faults,
            image_weight=None if weight is None else weight.float().cpu().numpy(),
            alone={name: self._outputs(view, features.present[name]) for name, view in views.items()},
            at_alpha={alpha: self._outputs(view, some) for alpha, view in swept.items()},
        )

    def _outputs(self, logits: torch.Tensor, known: NDArray[np.bool_]) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = self._model.head.outputs(logits).cpu().numpy()
        outputs[~known] = np.nan
        return outputs

    def _choose_precision(self) -> Precision:
        wanted = self.options.precision
        first = resolve_precision(wanted, self.device)
        for precision in dict.fromkeys((first, "fp32" if wanted == "auto" else first)):
            self.precision = precision
            difference = self._golden_difference()
            if difference <= TOLERANCE[precision]:
                return precision
        raise BundleError(
            f"the bundle's golden rows come out {difference:.4f} away from their scores ({self.precision}, allowed "
            f"{TOLERANCE[self.precision]}): this machine or these package versions compute another model"
        )

    def _golden_difference(self) -> float:
        golden = self.bundle.golden
        if golden is None:
            return 0.0
        got = self.predict({name: golden[name].to_pylist() for name in self.modalities}).outputs
        want = np.asarray(golden["outputs"].to_pylist(), np.float32)
        low, high = self.bundle.score_range
        return float(np.abs(got - want).max() / (high - low))


def load_predictor(bundle: str, options: ScoreConfig | None = None) -> Predictor:
    """Loads a bundle to score in this process, on its CPUs, or on a GPU where `options.gpus_per_actor` is set.

    Args:
        bundle: folder or URI of a bundle.
        options: columns, precision; and `image_roots`, beneath which images are read where cells are paths.

    Raises:
        BundleError: it is damaged, or its golden rows come out differently here.
        ConfigError: a root is malformed, or there is no GPU.
        EnvironmentFaultError: a root is not there.
    """
    loaded, options = load_bundle(bundle), options or ScoreConfig()
    source = ImageSource(options.image_roots, loaded.config.image.max_bytes, options.on_unavailable)
    prepare_decoders()
    return Predictor(loaded, source, options, "cuda" if options.gpus_per_actor else "cpu")


def timed(on_stage: OnStage, stage: str, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function, and reports the seconds it took as those of a stage."""
    started = time.perf_counter()
    result = function(*arguments)
    on_stage(stage, time.perf_counter() - started)
    return result


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU, torch has no class of its own for it.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


def _only(name: str, present: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {other: mask if other == name else torch.zeros_like(mask) for other, mask in present.items()}
