"""The Ray cluster a step runs on: the one given, or one of its own for as long as it lasts.

`RAY_ADDRESS` (which `ray job submit` sets) names a running cluster; a process that is already connected stays so.
Otherwise a local cluster starts, on the loopback interface only, and ends with the step. It is never joined by
accident: a bare `ray.init()` would connect to whatever runs on the machine.
"""

import logging
import os
import re
import secrets
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import ray
import ray.data
import ray.data.exceptions
import ray.exceptions

from mmray.errors import EnvironmentFaultError, MmrayError, named
from mmray.machine import KEEP_MEMORY, given_address, local_cpus, missing_gpus
from mmray.options import CALLS_PER_PROCESS, ScoreConfig
from mmray.placement import SPARE_CPUS, place
from mmray.slices import SPARE, Slice, slices_to_arrow
from mmray.stop import RESUMES, terminable

MAX_RETRIES = 3  # of an actor and of a slice on it, where nobody counts; Ray's own default is for ever
MAX_BLOCKS = 1024  # so many times as many slices are left, so many are handed out together
RAY_ERRORS = (ray.exceptions.RayError, ray.data.exceptions.SystemException, ray.data.exceptions.ExecutionTimeoutError)
LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
)
READER, READER_ENDS_S = "iter_threaded", 5.0  # Ray Data's name of it, and how long it is waited for
_OURS = r"^mmray\.errors\.(\w+): (.+)$"  # as a remote traceback ends with our own errors
_log = logging.getLogger(__name__)


@contextmanager
def cluster(num_cpus: int | None = None) -> Iterator[None]:
    """Connects to a cluster for the duration of a `with` block.

    Args:
        num_cpus: CPUs that the step's own workers will hold on a local cluster; all of the machine's by default.

    Raises:
        EnvironmentFaultError: no cluster could be started or reached.
    """
    if ray.is_initialized():
        yield
        return
    address, on_sigterm = given_address(), signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        else:
            _start_local((num_cpus or local_cpus()) + SPARE_CPUS)
    except Exception as error:  # of any class: Ray has none of its own for this
        raise EnvironmentFaultError(
            f"cannot {'reach the Ray cluster at ' + address if address else 'start Ray'}: {error}"
        ) from error
    with terminable(on_sigterm):
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # what Ray Data is at there ends while Ray is still there
            raise
        finally:
            _wait_for_readers()
            ray.shutdown()


def is_alone() -> bool:
    """Whether a step runs on this machine alone, and so finds the files that this process does."""
    if not ray.is_initialized():
        return given_address() is None
    places = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    return places <= {"127.0.0.1", ray.util.get_node_ip_address()}  # type: ignore[no-untyped-call]


def _wait_for_readers() -> None:
    """Waits until Ray Data's threads that read ahead have ended.

    It tells them to end and does not wait; one that still asks Ray for something after `ray.shutdown` ends the process,
    with exit code 1 and without a word.
    """
    for thread in threading.enumerate():
        if thread.name == READER:
            thread.join(READER_ENDS_S)


def environment(gpus: float) -> dict[str, Any] | None:
    """Returns the runtime environment of processes that hold so many GPUs each."""
    return None if gpus else {"env_vars": KEEP_MEMORY}


def cpus_for(options: ScoreConfig) -> int:
    """Returns the CPUs that scoring holds on a local cluster."""
    return (options.num_actors or local_cpus()) + (options.placement == "cluster")


def map_slices(
    slices: Sequence[Slice],
    worker: type,
    arguments: tuple[Any, ...],
    options: ScoreConfig,
    name: str,
    *,
    max_retries: int = MAX_RETRIES,
    heard: Callable[[int], None] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Runs a pool of actors over slices by Ray Data, and yields the rows they return as they come.

    A process or node that is lost costs time: what is left begins anew on what is there, as long as some gets done.

    Args:
        slices: the work, at least one; each slice goes to one actor whole.
        worker: class of the actors; called with a pyarrow table of one slice, as `slices_to_arrow` makes it; gives one
            row for it, with its index as `slice`.
        arguments: of the worker's constructor; the options, settled, come after them.
        options: size and place of the pool.
        name: of the work, on Ray's dashboard.
        max_retries: of an actor, and of a slice whose actor died, be it of another slice.
        heard: called with the slice of each row, also of one that came before; where it is given, actors that have
            nothing left get `SPARE`, of which they may make any slice's row once more.
    """
    _check_gpus(options.gpus_per_actor)
    left = list(slices)
    while left:
        done = set[int]()
        try:
            with closing(_one_pass(left, worker, arguments, options, name, max_retries, heard is not None)) as rows:
                for row in rows:
                    if heard is not None:
                        heard(row["slice"])
                    if row["slice"] not in done:
                        done.add(row["slice"])
                        yield row
                    if heard is not None and len(done) == len(left):  # whoever is still at one of them is late
                        break
            return
        except RAY_ERRORS as error:
            if not done or not _is_loss(error):
                raise
            _log.warning("a process or its node was lost; %s slices begin anew on the others", len(left) - len(done))
            # Those that were at work then come last, in case it was one of them.
            last = max(done)
            left = sorted((s for s in left if s.index not in done), key=lambda piece: piece.index < last)


def _one_pass(
    slices: Sequence[Slice],
    worker: type,
    arguments: tuple[Any, ...],
    options: ScoreConfig,
    name: str,
    max_retries: int,
    spare: bool,
) -> Generator[dict[str, Any], None, None]:
    placement = place(options, len(slices))
    pool = ray.data.ActorPoolStrategy(
        min_size=placement.min_actors,
        max_size=placement.max_actors,
        max_concurrent_calls_per_actor=CALLS_PER_PROCESS,
        max_tasks_in_flight_per_actor=CALLS_PER_PROCESS,  # what waits for one that is slow, no other can take
        enable_true_multi_threading=True,
    )
    spares = [SPARE] * (placement.min_actors * CALLS_PER_PROCESS if spare else 0)
    rows = over_slices(
        [*slices, *spares],
        worker,
        fn_constructor_args=(*arguments, placement.options),
        compute=pool,
        num_cpus=placement.num_cpus,
        num_gpus=options.gpus_per_actor,
        label_selector=options.node_labels or None,
        runtime_env=environment(options.gpus_per_actor),
        max_restarts=max_retries,
        max_task_retries=max_retries,
    )
    rows.set_name(name)
    rows.context.target_max_block_size = 1  # each row comes as it is done, not with those of its block
    # Ahead of time Ray Data would fetch the next, and meanwhile keep to itself what is there.
    blocks: Iterable[Any] = rows.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
    for block in blocks:
        yield from block.to_pylist()


def _is_loss(error: BaseException | None) -> bool:
    """Whether an error says that a process or node went away, and not that ours failed in it."""
    if error is None or re.search(_OURS, str(error), re.MULTILINE):
        return False
    return isinstance(error, LOSSES) or _is_loss(error.__cause__)


def _check_gpus(gpus_per_actor: float) -> None:
    """Refuses GPUs that a local cluster has not; one that is given may grow them."""
    there = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if gpus_per_actor > there and not given_address():
        raise missing_gpus(gpus_per_actor, there)


def over_slices(slices: Sequence[Slice], function: Any, **placement: Any) -> ray.data.Dataset:
    """Returns the dataset of what a function makes of slices, one at a time and lazily.

    Ray Data shows no progress and writes nothing to the terminal: ours stands there, and its errors come as exceptions.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Not `from_arrow`, which runs a task for each block and remembers it: 8,000 of them took 400 MB.
    rows: ray.data.Dataset = ray.data.from_blocks([slices_to_arrow(part) for part in in_blocks(slices)])
    with warnings.catch_warnings():
        # Retries have no named parameter yet, and their default is for ever.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return rows.map_batches(function, batch_size=1, batch_format="pyarrow", **placement)


def in_blocks(slices: Sequence[Slice]) -> Iterator[Sequence[Slice]]:
    """Yields consecutive slices, fewer together the fewer are left: the last ones, one at a time, end evenly."""
    first = 0
    while first < len(slices):
        size = -(-(len(slices) - first) // MAX_BLOCKS)
        yield slices[first : first + size]
        first += size


def unwrap(error: BaseException, what: str) -> MmrayError:
    """Finds our own error in what Ray raised for a remote failure, or says what failed in one line.

    Ray carries the remote traceback as text, in which our error stands with its class and message.
    """
    texts = [str(error), *map(str, getattr(error, "worker_failures", {}).values())]
    for text in texts:
        for name, message in re.findall(_OURS, text, re.MULTILINE):
            if ours := named(name, message):
                return ours
    lines = [line for line in texts[-1].splitlines() if re.match(r"(\w+\.)*\w*(Error|Exception)\b.*: ", line)]
    cause = lines[0] if lines else texts[-1].strip().partition("\n")[0] or type(error).__name__
    return EnvironmentFaultError(f"{what} stopped: {cause}; {RESUMES}")


def _start_local(num_cpus: int) -> None:
    """Starts a cluster on this machine; Ray gives its processes 30 s, which on a busy one may not do at once."""
    try:
        _init_local(num_cpus)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        _init_local(num_cpus)


def _init_local(num_cpus: int) -> None:
    # A local cluster asks for a token. Ray would write one into the home folder, and say so at length.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
        object_store_memory=_object_store_bytes(),
        _system_config={"prestart_worker_first_driver": False},  # a process for each CPU, most of which nobody needs
    )


def _object_store_bytes() -> int:
    """Returns a third of the free memory, within bounds: scoring needs little, training keeps decoded rows there."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    room = min(free // 3, shared.f_bavail * shared.f_frsize * 9 // 10) if shared else free // 3
    return max(min(room, 4 * 2**30), 100 * 2**20)
