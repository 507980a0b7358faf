"""Scores rows at a distance, and finds those that kill the process that scores them.

Reads rows -> gives them with the columns that scoring appends, as `Predictor.score` does, by the same predictor in a
child process. Where the child dies on a batch, its rows are scored one at a time; those that it dies on again get a
fault, and the batch is scored without them: the others are among the neighbours they always had.
"""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mmray.errors import EnvironmentFaultError, named
from mmray.predictor import OnStage, Predictor
from mmray.score.child import FORWARD, PREPARE, READ
from mmray.score.spawn import Fork, spawn
from mmray.table import Fault, Reason, append_columns, fault

START_S = 300  # to import, and to load a bundle
GRACE_S = 30  # a child ends by itself when its time is up; one that does not is ended
TRIES = 2  # times that a row must kill, alone: the machine may have its moments
MAX_NAMED, MAX_SHARE = 32, 0.01  # rows of a slice that may kill, whichever is more: beyond, it is not the rows
Faults = dict[str, Fault]
"""Modality -> why it cannot be used."""


class Died(Exception):
    """The child did not come back."""

    def __init__(self, step: str, kind: str, how: str) -> None:
        super().__init__(how)
        self.step, self.kind, self.how = step, kind, how


class Isolation:
    """A predictor that rows cannot kill, for the duration of a `with` block; threads wait for one another there.

    There is one child at a time, which bounds memory, and it is kept for those who wait: a process that died was at two
    slices, as a rule, and both come back.
    """

    def __init__(self, predictor: Predictor, bundle_uri: str, image_roots: Sequence[str], on_stage: OnStage) -> None:
        """Takes whose scores it should give.

        Args:
            predictor: the one that died of the rows in another process.
            bundle_uri: where its bundle is.
            image_roots: where its images are.
            on_stage: called with `isolated` and the seconds of each batch.
        """
        self._predictor, self._on_stage = predictor, on_stage
        options = predictor.options.model_copy(update={"precision": predictor.precision})
        self._settings = {"bundle": bundle_uri, "image_roots": image_roots, "options": options.model_dump(mode="json")}
        self._child: subprocess.Popen[bytes] | Fork | None = None
        self._named = self._allowed = 0
        self._turn, self._counting, self._users = threading.Lock(), threading.Lock(), 0

    def __enter__(self) -> "Isolation":
        with self._counting:
            self._users += 1
        self._turn.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._counting:
            self._users -= 1
            if not self._users:
                self._end()
        self._turn.release()

    def score(self, table: pa.Table) -> pa.Table:
        """Returns the table with the columns of `output_fields` appended: n rows in, n rows out, in order.

        Raises:
            EnvironmentFaultError: so many rows kill the child that it is not theirs, or it does not start.
        """
        if not table.num_rows:
            return self._predictor.score(table)
        self._named, self._allowed = 0, max(MAX_NAMED, int(MAX_SHARE * table.num_rows))
        size = self._predictor.options.rows_per_batch
        names = self._predictor.modalities
        rows = pa.table({name: table[self._predictor.column(name)] for name in names})
        parts = [self._batch(rows.slice(k, size)) for k in range(0, rows.num_rows, size)]
        return append_columns(table, pa.concat_tables(parts))

    def _batch(self, rows: pa.Table) -> pa.Table:
        started = time.perf_counter()
        try:
            return self._ask(rows, [{}] * rows.num_rows)
        except Died:
            return self._row_by_row(rows)
        finally:
            self._on_stage("isolated", time.perf_counter() - started)

    def _row_by_row(self, rows: pa.Table) -> pa.Table:
        each = [rows.slice(k, 1) for k in range(rows.num_rows)]
        faults = [self._faults_of(row) for row in each]
        try:
            return self._ask(rows, faults)
        except Died:  # of the rows together
            return pa.concat_tables([self._ask(row, [found]) for row, found in zip(each, faults, strict=True)])

    def _faults_of(self, row: pa.Table) -> Faults:
        """Returns why modalities of a row cannot be used, of one that kills alone."""
        found: Faults = {}
        deaths = 0
        while True:
            try:
                self._ask(row, [found])
            except Died as death:
                deaths += 1
                if deaths % TRIES == 0:
                    found |= self._name(death)
            else:
                return found

    def _name(self, death: Died) -> Faults:
        self._named += 1
        if self._named > self._allowed:
            raise EnvironmentFaultError(
                f"{self._named} rows of a slice killed the process that scored them, at last one {death.how} "
                f"({death.step}): that is the machine or the model and not the rows; run again elsewhere"
            )
        modality = death.step.removeprefix(f"{PREPARE} ")
        if modality in self._predictor.modalities:
            return {modality: fault(Reason[f"DECODE_{death.kind}"], death.how)}
        reason = Reason.MODEL_CRASH if death.step == FORWARD else Reason[f"DECODE_{death.kind}"]
        return {name: fault(reason, death.how) for name in self._predictor.modalities}

    def _ask(self, rows: pa.Table, faults: Sequence[Faults]) -> pa.Table:
        """Has the child score rows, as one batch.

        Raises:
            Died: it did not.
        """
        if self._child is None or self._child.poll() is not None:
            self._start()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        self._connection.send_bytes(json.dumps(faults).encode())
        self._connection.send_bytes(sink.getvalue())
        step, since, limit_s = READ, time.monotonic(), float(START_S)
        while "scored" not in (message := self._hear(step, limit_s)):
            if "step" in message:
                step, since, limit_s = message["step"], time.monotonic(), message["limit_s"]
            else:
                raise self._death(step, time.monotonic() - since >= limit_s, message)
        return pa.ipc.open_stream(self._connection.recv_bytes()).read_all()

    def _hear(self, step: str, limit_s: float) -> dict[str, Any]:
        """Returns what the child says next; where it is no more, how it ended."""
        assert self._child is not None, "it was started"
        try:
            if self._connection.poll(limit_s + GRACE_S):
                message: dict[str, Any] = json.loads(self._connection.recv_bytes())
                return message
        except (EOFError, OSError):
            self._child.wait(GRACE_S)
        code = self._child.poll()
        self._end()
        return {"code": code}

    def _death(self, step: str, late: bool, message: dict[str, Any]) -> Exception:
        """Returns what to raise, of what the child said last."""
        if self._predictor.options.gpus_per_actor:  # it cannot go on with what it has
            self._end()
        if ours := named(message.get("error", ""), message.get("text", "")):
            return ours
        if step == READ:
            return EnvironmentFaultError(
                f"images could not be read ({_how(late, message)[1]}); mend the store or the mount, then run again"
            )
        return Died(step, *_how(late, message))

    def _start(self) -> None:
        self._end()
        self._child, self._connection = spawn("mmray.score.child")
        self._connection.send_bytes(json.dumps(self._settings).encode())
        message = self._hear("start", START_S)
        if ours := named(message.get("error", ""), message.get("text", "")):
            raise ours
        if "ready" not in message:
            raise EnvironmentFaultError(f"a process to score rows apart does not start ({_how(False, message)[1]})")

    def _end(self) -> None:
        if self._child is not None:
            self._connection.close()
            self._child.kill()
            self._child.wait()
            self._child = None


def _how(late: bool, message: dict[str, Any]) -> tuple[str, str]:
    """Returns the kind of a death, and how to say it."""
    code, error = message.get("code"), message.get("error")
    if error == "MemoryError":
        return "OOM", "needs more memory than it may have"
    if error is not None:
        return "CRASH", f"raises {error}"
    if code is None or late:
        return "TIMEOUT", "does not come to an end"
    if code == -signal.SIGKILL:
        return "OOM", "is killed for its memory"
    return "CRASH", f"dies of {signal.Signals(-code).name}" if code < 0 else f"exits with {code}"
