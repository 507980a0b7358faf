"""Where a run does its work: on a cluster, or in this process, where a cluster would take longer to start.

Reads work on slices -> gives the rows that come of it, and trains on them: the same work, with the same outcome.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray.data
import ray.train
import torch
import torch.distributed as dist

from mmray.cluster import MAX_RETRIES, RAY_ERRORS, cluster, environment, over_slices, unwrap
from mmray.config import Config
from mmray.errors import EnvironmentFaultError, MmrayError
from mmray.machine import available_memory, cluster_at_hand, local_cpus
from mmray.slices import slices_to_arrow
from mmray.stop import RESUMES
from mmray.train.data import Split, Tables, Work, row_bytes
from mmray.train.frozen import FrozenImages, has_frozen_images
from mmray.train.loop import Settings, train_worker
from mmray.train.trainer import OnEpoch, Trainer, as_needed, ctrl_c_is_an_interruption, news, shown

FEW_ROWS = 20_000  # of more, threads would prepare rows longer than a cluster takes to start


@dataclass(frozen=True)
class Blocks:
    """Preprocessed rows of a split."""

    num_rows: int
    blocks: Sequence[Any]
    """As `CachedRows` takes them."""


class Place(Protocol):
    """Where a run does its work."""

    streams: bool
    """Whether rows that do not fit in memory can be prepared anew each epoch."""

    def rows(self, work: Work) -> Iterator[dict[str, Any]]:
        """Yields the rows that come of work, in order."""

    def blocks(self, work: Work, split: Split, frozen: Config | None) -> Blocks:
        """Returns all rows that come of work; with the features of the frozen network of a configuration."""

    def fit(self, settings: Settings, streamed: Work | None, on_epoch: OnEpoch) -> None:
        """Trains, on rows that come of work anew each epoch where there is some."""


def runs_here(config: Config, tables: Tables) -> bool:
    """Whether a run does without a cluster: one worker on a CPU, few rows that fit in memory, none at hand.

    A process that belongs to a group of torch's own, as `torchrun` starts them, leaves the work to a cluster.
    """
    rows = sum(table.num_rows for table in (tables.train, tables.validation) if table)
    alone = config.train.max_workers == 1 and not config.train.use_gpu and not has_frozen_images(config)
    fits = rows <= FEW_ROWS and rows * row_bytes(config, 0) <= min(config.train.cache_bytes, available_memory() // 3)
    in_group = dist.is_initialized() or "LOCAL_RANK" in os.environ
    return alone and fits and not cluster_at_hand() and not in_group


@contextmanager
def place_for(config: Config, tables: Tables) -> Iterator[Place]:
    """Yields where a run does its work.

    Raises:
        MmrayError: what stopped it there, from the block or from what the place does.
    """
    if runs_here(config, tables):
        yield Here()
        return
    with cluster(max(config.train.max_workers, local_cpus())):
        try:
            yield OnCluster()
        except (*RAY_ERRORS, ray.train.TrainingFailedError) as error:
            raise unwrap(error, "training") from error


class Here:
    """This process: threads prepare the rows, and it is the one worker."""

    streams = False

    def rows(self, work: Work) -> Iterator[dict[str, Any]]:
        """See `Place`."""
        for part in self._each(work):
            yield from part.to_pylist()

    def blocks(self, work: Work, split: Split, frozen: Config | None) -> Blocks:
        """See `Place`."""
        assert frozen is None, "that takes long, and a cluster is worth its start"
        blocks = list(self._each(work))
        return Blocks(sum(len(block["target"]) for block in blocks), blocks)

    def fit(self, settings: Settings, streamed: Work | None, on_epoch: OnEpoch) -> None:
        """See `Place`."""
        assert streamed is None, "few rows fit in memory"
        threads, log = torch.get_num_threads(), logging.getLogger("ray.train.v2.api.config")
        level = log.level
        log.setLevel(logging.WARNING)  # it asks to report trouble with this mode
        try:
            with _faults_told(), torch.random.fork_rng(devices=[]):
                scaling = ray.train.ScalingConfig(num_workers=0)  # Ray Train's way to say: in this process
                show = shown(on_epoch)
                ray.train.torch.TorchTrainer(lambda: train_worker(settings, show), scaling_config=scaling).fit()
        finally:
            log.setLevel(level)
            torch.set_num_threads(threads)

    def _each(self, work: Work) -> Iterator[Any]:
        with _faults_told(), ThreadPoolExecutor(local_cpus()) as pool:
            yield from pool.map(lambda piece: work.function(slices_to_arrow([piece]), *work.arguments), work.slices)


@contextmanager
def _faults_told() -> Iterator[None]:
    """Raises what fails in this process as the error that a cluster's failure is."""
    try:
        yield
    except (MmrayError, AssertionError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise EnvironmentFaultError(f"training stopped: {what}; {RESUMES}") from error


class OnCluster:
    """A Ray cluster: tasks of Ray Data prepare the rows, and Ray Train starts the workers."""

    streams = True

    def rows(self, work: Work) -> Iterator[dict[str, Any]]:
        """See `Place`."""
        yield from _dataset(work).iter_rows()

    def blocks(self, work: Work, split: Split, frozen: Config | None) -> Blocks:
        """See `Place`."""
        rows = _dataset(work)
        if frozen:
            rows = _with_features(rows, split, frozen)
        whole = rows.materialize()
        return Blocks(int(whole.count()), whole.to_arrow_refs())

    def fit(self, settings: Settings, streamed: Work | None, on_epoch: OnEpoch) -> None:
        """See `Place`."""
        train = settings.config.train
        # Ray keeps its own notes in the scratch folder; the run's checkpoints are ours (`mmray.train.checkpoint`).
        with news(on_epoch) as told, tempfile.TemporaryDirectory(prefix="mmray-") as scratch:
            trainer = Trainer(
                lambda: train_worker(settings, told.tell),  # no `train_loop_config`: its controller would load that too
                scaling_config=ray.train.ScalingConfig(
                    num_workers=train.num_workers,  # type: ignore[arg-type]  # its first version, not used, took one
                    use_gpu=train.use_gpu,
                ),
                run_config=ray.train.RunConfig(
                    name="ray",
                    storage_path=scratch,
                    failure_config=ray.train.FailureConfig(train.max_failures),
                    worker_runtime_env=environment(train.use_gpu),  # type: ignore[call-arg]  # as above
                ),
                datasets={"train": _dataset(streamed)} if streamed else {},  # what is cached, every worker sees whole
            )
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # after which an end is noticed, for 2
            with as_needed(), ctrl_c_is_an_interruption():
                trainer.fit()


def _dataset(work: Work) -> ray.data.Dataset:
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return over_slices(work.slices, work.function, fn_args=work.arguments, max_retries=MAX_RETRIES)


def _with_features(rows: ray.data.Dataset, split: Split, config: Config) -> ray.data.Dataset:
    """Returns preprocessed rows with what the frozen image network makes of their images in the images' place."""
    gpus = config.train.max_workers if config.train.use_gpu else 0
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=gpus or local_cpus())
    return rows.map_batches(
        FrozenImages,
        fn_constructor_args=(config, split == "train" and config.train.augment),
        batch_size=None,
        batch_format="numpy",
        compute=pool,
        num_cpus=1,
        num_gpus=1 if gpus else 0,
        runtime_env=environment(gpus),
    )
