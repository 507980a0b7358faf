"""Work that arrives one by one, done in batches: what waits while a batch runs is the next batch.

There is no waiting window: a single item goes at once. A caller that has gone is left out, and an item that makes its
batch fail fails alone.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Runs a function over batches on one thread, for callers on an event loop."""

    def __init__(self, run: Callable[[Sequence[In]], Sequence[Out]], max_items: int) -> None:
        self._run, self._max_items = run, max_items
        self._thread = ThreadPoolExecutor(1, "forward")
        self._waiting: deque[tuple[In, asyncio.Future[Out]]] = deque()
        self._drain: asyncio.Task[None] | None = None
        self._started: float | None = None

    async def submit(self, item: In) -> Out:
        """Returns what the function gives for the item, or raises what it raised for it."""
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._drain is None or self._drain.done():
            self._drain = asyncio.create_task(self._work())
        return await future

    @property
    def running_s(self) -> float:
        """For how many seconds the current batch has been running."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    async def _work(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_items))]
            alive = [(item, future) for item, future in batch if not future.done()]
            if not await self._try(alive) and len(alive) > 1:
                for pair in alive:
                    await self._try([pair])

    async def _try(self, batch: Sequence[tuple[In, "asyncio.Future[Out]"]]) -> bool:
        """Runs a batch; an error counts only where it can be no other item's."""
        if not batch:
            return True
        self._started = time.monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._run, [item for item, _ in batch]
            )
        except Exception as error:  # whatever the function raises belongs to the callers
            if len(batch) == 1 and not batch[0][1].done():
                batch[0][1].set_exception(error)
            return False
        finally:
            self._started = None
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
        return True
