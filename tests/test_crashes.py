"""A run that dies, or whose store fails it, at any of its steps: the same command then completes it, exactly.

The steps are counted, not listed: what the code comes to do more is covered the day it does.
"""

import errno
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import obstore.exceptions as oe
import pyarrow.dataset
import pytest
from faults import OneFault, serving
from io_steps import WRITES, Steps, in_bucket, on_disk
from models import colour_table, one_scorer, saved_bundle

from mmray.bundle import load_bundle
from mmray.errors import EnvironmentFaultError
from mmray.options import ScoreConfig
from mmray.predictor import Predictor
from mmray.score import job, worker
from mmray.score.commit import PACE
from mmray.score.verify import verify_output
from mmray.score.worker import SliceScorer
from mmray.source import ImageSource
from mmray.store import TEMPORARY_SUFFIX, open_store

OPTIONS = ScoreConfig(precision="fp32", slice_rows=5)
ROWS, SLICES = 9, 2
DEAD = 9

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A bundle and a table."""
    folder = tmp_path_factory.mktemp("given")
    rows = colour_table(folder / "rows", rows=ROWS, files=1)
    return saved_bundle(folder / "bundle", rows), str(rows)


@pytest.fixture(scope="module")
def predictor(given: tuple[str, str]) -> Predictor:
    """The model made ready, once for all runs: no step of theirs is in it."""
    bundle = load_bundle(given[0])
    return Predictor.on_this_worker(bundle, ImageSource([given[1]], bundle.config.image.max_bytes), OPTIONS)


@pytest.fixture(autouse=True)
def _without_a_cluster(monkeypatch: pytest.MonkeyPatch, predictor: Predictor) -> None:
    """One scorer in this process takes the cluster's place; rows that killed are another test's."""

    monkeypatch.setattr(job, "_run", one_scorer)
    monkeypatch.setattr(worker, "load_bundle", lambda uri: predictor.bundle)
    monkeypatch.setattr(Predictor, "on_this_worker", lambda *given, **more: predictor)
    monkeypatch.setattr(SliceScorer, "_score_apart", SliceScorer._score_here)


class Death(BaseException):
    """The end of a process: nothing that it would still do for order's sake takes place."""


def dies_in_a_fork(run: Callable[[], object]) -> bool:
    """Runs in a process that may die, and returns whether it did."""
    child = os.fork()
    if not child:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DEAD)
    return code == DEAD


def fails(run: Callable[[], object]) -> bool:
    """Returns whether a run ends in a fault of its machine or store: in anything else, this raises."""
    try:
        run()
    except EnvironmentFaultError as error:
        return "again" in str(error)
    return False


def complete(given: tuple[str, str], output: str) -> None:
    """Runs the command again, and holds what is there against what was given."""
    bundle, table = given
    result = job.score_table(bundle, table, output, OPTIONS)
    assert result.ledger.statuses == {"ok": ROWS}
    report = verify_output(output, 2)
    assert report.passed, report.mismatches
    assert (report.rows, report.slices) == (ROWS, SLICES)
    names = sorted(open_store(output).list())
    assert len([name for name in names if name.startswith("data/")]) == SLICES
    others = {name for name in names if not name.startswith("data/")} - {PACE}
    assert len(others) == 4, names  # run, plan, manifest, _SUCCESS


def count(given: tuple[str, str], output: str, stepping: Callable[..., AbstractContextManager[None]]) -> list[str]:
    """Returns the steps of a run in which nothing goes wrong."""
    steps = Steps()
    with stepping(output, steps):
        job.score_table(*given, output, OPTIONS)
    return steps.names


def test_a_run_that_dies_at_any_step_on_a_disk_is_completed(
    given: tuple[str, str], predictor: Predictor, tmp_path: Path
) -> None:
    names = count(given, str(tmp_path / "whole"), on_disk)
    steps = [k for k, name in enumerate(names) if name in WRITES]
    for at in steps:
        output = str(tmp_path / str(at))

        def run(output: str = output, at: int = at) -> None:
            predictor._thread = ThreadPoolExecutor(1)  # a fork has no threads of its parent's
            with on_disk(output, Steps(at, lambda do: os._exit(DEAD))):
                job.score_table(*given, output, OPTIONS)

        assert dies_in_a_fork(run), names[at]
        assert readable(output) in (0, 4, ROWS), "a reader sees whole slices or none"
        complete(given, output)
    print(f"\n{len(steps)} deaths on a disk")
    assert len(steps) > 40


def readable(output: str) -> int:
    """Returns how many rows a reader of the data finds, who knows nothing of mmray."""
    if not Path(output, "data").is_dir():
        return 0
    return int(pyarrow.dataset.dataset(f"{output}/data", format="parquet").count_rows())


def full(do: Callable[[], Any]) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(do: Callable[[], Any]) -> None:
    do()
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(("fault", "begun"), [(full, False), (broken, False), (broken, True)])
def test_a_disk_that_fails_at_any_step_is_a_fault_that_the_same_command_resumes(
    given: tuple[str, str], tmp_path: Path, fault: Callable[..., None], begun: bool
) -> None:
    def output(name: object) -> str:
        folder = str(tmp_path / str(name))
        if begun:
            with pytest.raises(Death):
                job.score_table(*given, folder, OPTIONS, on_slice=end)
        return folder

    names = count(given, output("whole"), on_disk)
    failed = 0
    for at, name in enumerate(names):
        folder = output(at)
        with on_disk(folder, Steps(at, fault)):
            ended = fails(partial(job.score_table, *given, folder, OPTIONS))
        assert not (ended and name == "unlink"), "what need not go may stay"
        assert name == "unlink" or not list(Path(folder).rglob(f"*{TEMPORARY_SUFFIX}"))
        complete(given, folder)
        failed += ended
    print(f"\n{len(names)} x {fault.__name__} on a disk, {failed} of which ended the run")
    assert failed > 30


def end(receipt: object) -> None:
    raise Death


def client_faults() -> dict[str, Callable[[Callable[[], Any]], Any]]:
    def lost(do: Callable[[], Any]) -> None:
        do()
        raise oe.GenericError("timed out")

    def told(do: Callable[[], Any]) -> None:
        do()
        raise oe.AlreadyExistsError("the second try found what the first had made")

    def conflict(do: Callable[[], Any]) -> None:
        raise oe.AlreadyExistsError("409 Conflict")

    def refused(do: Callable[[], Any]) -> None:
        raise oe.GenericError("503, ten times")

    return {"503": refused, "timed out": lost, "exists": told, "409": conflict}


@pytest.mark.parametrize("kind", client_faults())
def test_a_bucket_that_fails_at_any_request_is_a_fault_that_the_same_command_resumes(
    given: tuple[str, str], s3: str, kind: str
) -> None:
    names = count(given, f"{s3}/whole", in_bucket)
    failed = 0
    tried = [k for k, name in enumerate(names) if name == "put" or kind not in ("exists", "409")]
    for at in tried:
        output = f"{s3}/{at}"
        with in_bucket(output, Steps(at, client_faults()[kind])):
            ended = fails(partial(job.score_table, *given, output, OPTIONS))
        assert not (ended and names[at] == "delete"), "what need not go may stay"
        complete(given, output)
        failed += ended
    print(f"\n{len(tried)} x {kind} in a bucket, {failed} of which ended the run")
    assert len(tried) >= 8
    assert (failed == 0) == (kind in ("exists", "409")), "what can be made sure of at once ends no run"


def test_a_run_that_dies_at_any_request_to_a_bucket_is_completed(given: tuple[str, str], s3: str) -> None:
    names = count(given, f"{s3}/whole", in_bucket)
    for at in range(len(names)):
        output = f"{s3}/{at}"
        with in_bucket(output, Dead(at)), pytest.raises(Death):
            job.score_table(*given, output, OPTIONS)
        complete(given, output)
    print(f"\n{len(names)} deaths at requests to a bucket")


class Dead(Steps):
    """Steps of a process that dies at one of them: it takes none after that either."""

    def take(self, name: str, do: Callable[[], Any]) -> Any:
        self.names.append(name)
        if self._at is not None and len(self.names) > self._at:
            raise Death
        return do()


@pytest.mark.parametrize("kind", ["refused", "unanswered", "conflict"])
def test_an_answer_that_goes_wrong_on_the_wire_is_asked_for_again(
    given: tuple[str, str], s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with serving(OneFault(s3_server)) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        job.score_table(*given, f"{s3}/whole", OPTIONS)
        puts = store.asked["PUT"]
        for at in range(puts):
            store.next_fault(kind, "PUT", at)
            complete(given, f"{s3}/{at}")
            assert store.faults["PUT", kind] == at + 1
    print(f"\n{puts} x {kind} on the wire")
    assert puts >= 8
