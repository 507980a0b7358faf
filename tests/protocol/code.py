"""The real code as a machine of steps: given the answers a process has had, what it asks next, or how it ended.

A process of mmray does the same for the same answers. So it is run from its start up to the first request that has no
answer yet, once for each sequence of answers; what came of it is kept in a tree. A state of the search is then a
position in that tree for each process, and the search costs look-ups, while no line of the protocol is written twice.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import obstore.exceptions as oe
import pyarrow as pa

import mmray.store
from mmray.options import ScoreConfig
from mmray.parquet import to_parquet
from mmray.score import attempts, commit, job
from mmray.score.attempts import Attempts
from mmray.score.commit import Manifest, Output, Receipt, receipt_from_row, receipts_to_arrow
from mmray.score.plan import Plan
from mmray.score.worker import SliceScorer, Stages
from mmray.slices import Slice

BUCKET, TABLE, OUTPUT = "s3://bucket", "table/rows.parquet", "out"
ROWS_PER_SLICE = 2
write_manifest = Manifest.to_parquet


class Request(NamedTuple):
    """What a process asks of the store, or of the cluster: `place` slices, `receive` a receipt."""

    method: str
    key: str = ""
    data: Any = None


class Program(NamedTuple):
    """What a process runs."""

    plan: int
    slice: int | None = None
    """Of a worker; a driver has none."""
    noise: int = 0
    """Numbers of the machine: the same slice comes out a little different on another."""


class Ended(NamedTuple):
    """How a process came to its end."""

    value: Any = None
    error: BaseException | None = None


class Raise(NamedTuple):
    """An answer that is an exception."""

    kind: str
    said: Any = None


class Pause(BaseException):
    """Ends a run of the real code at a request that has no answer yet."""


@dataclass
class Node:
    """Where a process stands."""

    number: int
    program: Program
    answers: tuple[Any, ...]
    then: Request | Ended
    children: dict[Any, "Node"] = field(default_factory=dict)


class Code:
    """The real code, or a mutant of it."""

    def __init__(self, slices: int = 2, patches: Sequence[Callable[[], Any]] = ()) -> None:
        self.table = table_bytes(slices)
        self.plans = tuple(make_plan(slices, self.table, k) for k in range(2))
        self.changed = table_bytes(slices, first=100)
        self._patches, self._roots, self.nodes = patches, dict[Program, Node](), 0
        self._left, self._asked, self._noise = iter(()), list[Request](), 0

    def start(self, program: Program) -> Node:
        """Returns where a process begins."""
        if program not in self._roots:
            self._roots[program] = self._node(program, ())
        return self._roots[program]

    def step(self, node: Node, answer: Any) -> Node:
        """Returns where a process comes to by an answer."""
        if answer not in node.children:
            node.children[answer] = self._node(node.program, (*node.answers, answer))
        return node.children[answer]

    def _node(self, program: Program, answers: tuple[Any, ...]) -> Node:
        self.nodes += 1
        return Node(self.nodes, program, answers, self._run(program, answers))

    def _run(self, program: Program, answers: tuple[Any, ...]) -> Request | Ended:
        self._left, self._asked, self._noise = iter(answers), list[Request](), program.noise
        ended = Ended()
        try:
            ended = Ended(self._main(program))
        except Pause:
            pass
        except Exception as error:
            ended = Ended(error=error.with_traceback(None))
        return self._asked[0] if self._asked else ended

    def _ask(self, request: Request) -> Any:
        if not self._asked:
            for answer in self._left:
                if isinstance(answer, Raise):
                    raise error_of(answer, request)
                return answer
        self._asked.append(request)  # also where the code cleans up behind itself: a process that stands still does not
        raise Pause

    def _main(self, program: Program) -> Any:
        plan, output = self.plans[program.plan], f"{BUCKET}/{OUTPUT}"
        if program.slice is None:
            return job.score_plan(plan, "bundle", f"{BUCKET}/{TABLE}", output, ScoreConfig()).ledger
        piece = plan.slices[program.slice]
        (row,) = receipts_to_arrow([Scorer(output, plan.hash, program.noise).score(piece)]).to_pylist()
        return tuple({**row, "took_s": None}.items())  # time is no part of a state

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the search in the place of the bucket, of the cluster and of chance, for the duration of a `with` block.

        Only within it does a process go on.
        """

        def placed(bundle: str, output: str, plan: Plan, todo: Sequence[Slice], *_: Any) -> Iterator[Receipt]:
            self._ask(Request("place", data=tuple(piece.index for piece in todo)))
            for _piece in todo:
                yield receipt_from_row(dict(self._ask(Request("receive"))))

        def process() -> str:
            return f"another-machine {self._noise} 1 1"

        with ExitStack() as stack:
            for patch in (
                lambda: mock.patch.object(mmray.store, "_remote", lambda uri: Bucket(self._ask, uri)),
                lambda: mock.patch.object(mmray.store, "CONFLICT_PAUSES_S", (0,)),
                lambda: mock.patch.object(job, "_run", placed),
                lambda: mock.patch.object(commit, "ThreadPoolExecutor", InTurn),
                lambda: mock.patch.object(Manifest, "to_parquet", manifest_once),
                lambda: mock.patch.object(attempts, "this_process", process),
                lambda: mock.patch.object(attempts, "secrets", SimpleNamespace(token_hex=lambda size: "token")),
                *self._patches,
            ):
                stack.enter_context(patch())
            yield


class Bucket:
    """Takes the place of obstore's client: every call is a request that the search answers."""

    def __init__(self, ask: Callable[[Request], Any], uri: str) -> None:
        self._ask, self._prefix = ask, f"{uri.removeprefix(BUCKET).strip('/')}/"

    def put(self, key: str, data: bytes, *, mode: str = "overwrite", use_multipart: bool = False) -> None:
        self._ask(Request("put" if mode == "create" else "overwrite", self._prefix + key, bytes(data)))

    def get(self, key: str) -> Any:
        data = self._ask(Request("get", self._prefix + key))
        return SimpleNamespace(bytes=lambda: data, meta={"size": len(data)})

    def get_range(self, key: str, *, start: int, length: int) -> bytes:
        data: bytes = self._ask(Request("get", self._prefix + key))
        return data[start : start + length]

    def head(self, key: str) -> dict[str, Any]:
        return dict(zip(("size", "e_tag"), self._ask(Request("head", self._prefix + key)), strict=True))

    def list(self, prefix: str | None) -> list[list[dict[str, Any]]]:
        found = self._ask(Request("list", f"{self._prefix}{prefix}/" if prefix else self._prefix))
        return [[{"path": k.removeprefix(self._prefix), "size": size, "e_tag": tag} for k, size, tag in found]]

    def delete(self, key: str) -> None:
        self._ask(Request("delete", self._prefix + key))


class InTurn:
    """Takes the place of a pool of threads: what a process asks next depends on nothing but its answers."""

    def __init__(self, threads: int) -> None:
        pass

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        return map(function, items)


def error_of(answer: Raise, request: Request) -> BaseException:
    """Returns what obstore raises."""
    if answer.kind == "worker failed":
        raised: BaseException = answer.said
        return raised
    known = {"exists": oe.AlreadyExistsError, "absent": oe.NotFoundError, "fault": oe.GenericError}
    return known[answer.kind](f"{answer.kind}: {request.key}")


class Scorer(SliceScorer):
    """The real scorer without a model: reads, commits and keeps its attempts as on a cluster."""

    def __init__(self, output: str, plan_hash: str, noise: int) -> None:
        bundle = SimpleNamespace(score_range=(0.0, 1.0), fingerprint="model")
        self._predictor = SimpleNamespace(bundle=bundle, precision="fp32")  # type: ignore[assignment]
        self._output, self._plan_hash, self._noise = Output(output), plan_hash, noise
        self._attempts = Attempts(self._output.store)
        self._on_stage, self._stages = lambda stage, seconds: None, Stages()  # type: ignore[method-assign]

    def _score_here(self, piece: Slice, rows: pa.Table) -> tuple[pa.Table, int]:
        count = rows.num_rows
        columns = {
            "score": [self._noise / 2] * count,
            "status": ["ok"] * count,
            "reason": pa.nulls(count, pa.string()),
            "modalities_used": ["text"] * count,
        }
        for name, column in columns.items():
            rows = rows.append_column(name, pa.array(column))
        return rows, 0

    _score_apart = _score_here


class PlanOnce(Plan):
    """A plan that works its constants out once: a search would spend half its time on them."""

    hash = cached_property(Plan.hash.fget)  # type: ignore[assignment, arg-type, attr-defined]

    _file = cached_property(Plan.to_parquet)

    def to_parquet(self) -> bytes:
        return self._file


@cache
def _manifest_of(rows: tuple[tuple[int, Any], ...]) -> bytes:
    return write_manifest(Manifest(_rows=dict(rows)))


def manifest_once(manifest: Manifest) -> bytes:
    """Takes the place of `Manifest.to_parquet`, as `PlanOnce` does of a plan's."""
    return _manifest_of(tuple(manifest._rows.items()))


def table_bytes(slices: int, first: int = 0) -> bytes:
    """Returns the input table as a file; another `first` gives what it is changed to."""
    return to_parquet(pa.table({"id": list(range(first, first + slices * ROWS_PER_SLICE))}))


def make_plan(slices: int, table: bytes, number: int) -> Plan:
    """Returns a plan over the table; another number is another choice of options."""
    uri, version = f"{BUCKET}/{TABLE}", tag_of(table)
    pieces = tuple(Slice(k, uri, version, k * ROWS_PER_SLICE, ROWS_PER_SLICE) for k in range(slices))
    identity = {
        "fingerprint": "model",
        "files": [[uri, len(table), version, slices * ROWS_PER_SLICE]],
        "slices": "as they are",
        "options": {"choice": number, "image_roots": []},
    }
    return PlanOnce(pieces, identity, SimpleNamespace(fingerprint="model"))  # type: ignore[arg-type]


@cache
def tag_of(data: bytes) -> str:
    """Returns an object's entity tag."""
    return f"{zlib.crc32(data):08x}"
