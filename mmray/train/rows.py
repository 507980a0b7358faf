"""Batches of preprocessed rows for one training worker.

Where the decoded rows fit `train.cache_bytes` they stay in memory, on a cluster in Ray's object store, which all
workers of a node share without a copy, and each epoch draws its batches from a permutation that depends on the seed and
the epoch alone. Larger tables are decoded anew each epoch, and shuffled within a buffer.
"""

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
import ray.train
from numpy.typing import NDArray
from ray.data.block import BlockAccessor

Batch = Mapping[str, NDArray[np.generic]]

SHUFFLE_BATCHES = 64  # batches in the shuffle buffer of a streamed table


def file_id(uri: str) -> int:
    """Returns the number that stands for a file beside each of its rows."""
    return zlib.crc32(uri.encode())


class Rows(Protocol):
    """Training rows of one worker."""

    def epoch(self, number: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """Yields the worker's batches of an epoch but the first few; every worker gets the same number of batches.

        Beside each stands the factor of its loss: gradients are averaged over workers, whose batches differ by a row
        where the workers do not divide the batch. With it the average is that of all its rows.
        """


class CachedRows:
    """All rows of a split: those of this process, or views of the blocks in the object store."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        """Takes blocks of rows, or references to them, which are tables of Arrow then."""
        if not all(isinstance(block, Mapping) for block in blocks):
            blocks = [BlockAccessor.for_block(table).to_numpy() for table in ray.get(list(blocks))]
        self._blocks: list[Batch] = [block for block in blocks if len(block["target"])]
        self._starts = np.cumsum([0, *(len(block["target"]) for block in self._blocks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def count(self, name: str) -> int:
        """Returns in how many rows a column is true."""
        return sum(int(np.count_nonzero(block[name])) for block in self._blocks)

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """Returns rows by their positions in the table, in the order asked for."""
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(owner, kind="stable")
        back = np.argsort(order, kind="stable")
        used = np.unique(owner)
        return {
            name: np.concatenate([self._blocks[b][name][indices[owner == b] - self._starts[b]] for b in used])[back]
            for name in self._blocks[0]
        }

    def mine(self, batch_size: int) -> Iterator[Batch]:
        """Yields every row that falls to this worker, once and in order."""
        context = ray.train.get_context()
        indices = np.arange(context.get_world_rank(), len(self), context.get_world_size())
        for start in range(0, len(indices), batch_size):
            yield self.take(indices[start : start + batch_size])


class ShuffledRows:
    """Cached rows in a new order each epoch."""

    def __init__(self, rows: CachedRows, batch_size: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed

    def epoch(self, number: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """See `Rows`."""
        context = ray.train.get_context()
        order = np.random.default_rng([self._seed, number]).permutation(len(self._rows))
        mine = shares(order, self._batch_size, context.get_world_rank(), context.get_world_size())
        for rows, factor in itertools.islice(mine, skip, None):
            yield self._rows.take(rows), factor


def shares(
    order: NDArray[np.int64], batch_size: int, rank: int, world: int
) -> Iterator[tuple[NDArray[np.int64], float]]:
    """Yields a worker's part of each batch of an order of rows, and the factor of its loss; see `Rows`."""
    if len(order) < batch_size:  # a table smaller than one batch: every worker still needs two rows
        order = np.resize(order, max(len(order), 2 * world))
    step = min(batch_size, len(order))
    for start in range(0, len(order) - step + 1, step):
        mine = order[start : start + step][rank::world]
        yield mine, len(mine) * world / step


class StreamedRows:
    """Rows decoded each epoch; Ray Data gives every worker the same number of them."""

    def __init__(self, split: str, batch_size: int, seed: int) -> None:
        self._shard, self._seed = ray.train.get_dataset_shard(split), seed
        self._batch_size = max(batch_size // ray.train.get_context().get_world_size(), 1)

    def epoch(self, number: int, skip: int = 0) -> Iterator[tuple[Batch, float]]:
        """See `Rows`."""
        batches: Any = self._shard.iter_batches(
            batch_size=self._batch_size,
            batch_format="numpy",
            drop_last=True,
            local_shuffle_buffer_size=self._batch_size * SHUFFLE_BATCHES,
            local_shuffle_seed=self._seed + number,
        )
        yield from ((batch, 1.0) for batch in itertools.islice(batches, skip, None))
