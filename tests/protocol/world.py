"""What may come of a request: the store's answers, good and bad, deaths of processes, and what strangers do meanwhile.

Nothing here knows the protocol. A state is a bucket, where each process stands, and what may still go wrong.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pyarrow as pa

from mmray.parquet import to_parquet
from mmray.score.commit import METADATA_KEY, part_key

from .code import OUTPUT, TABLE, Code, Ended, Node, Program, Raise, tag_of

Objects = tuple[tuple[str, bytes], ...]
"""What is in the bucket, by key in sorted order."""


class Process(NamedTuple):
    """A driver, or a worker of one."""

    number: int
    parent: int | None
    """The driver that waits for it; None for drivers, and for workers that nobody waits for any more."""
    node: Node


class Budget(NamedTuple):
    """How often something may still go wrong."""

    faults: int = 0
    """Answers that are errors, untrue, or out of date."""
    deaths: int = 0
    """Processes that die, or are taken for dead and go on."""
    changes: int = 0
    """Rewritings of the input."""
    strangers: int = 0
    """Files that somebody puts where a slice belongs."""


NOTHING = Budget()


class State(NamedTuple):
    """A moment."""

    objects: Objects
    processes: tuple[Process, ...]
    waiting: tuple[Program, ...]
    """Drivers that start at some time: beside another, or after its death."""
    left: Budget
    born: int = 0

    def key(self) -> Any:
        """Tells moments apart."""
        standing = sorted((p.parent is None, p.parent or 0, p.node.number) for p in self.processes)
        return self.objects, tuple(standing), self.waiting, self.left


class Move(NamedTuple):
    """One thing that can happen next."""

    what: str
    who: int
    then: Callable[[], State]
    trouble: bool = False


class Violation(Exception):
    """The protocol is broken."""


class World:
    """All that can happen to some code."""

    def __init__(self, code: Code, on_change: Callable[[Objects, str], None], on_end: Callable[..., None]) -> None:
        """Takes whom to tell of changes of the bucket (with the key), and of ends of drivers (with state and node)."""
        self.code, self._on_change, self._on_end = code, on_change, on_end

    def begin(self, drivers: tuple[Program, ...], budget: Budget, objects: Objects | None = None) -> State:
        """Returns a state in which nothing has happened yet."""
        return State(objects if objects is not None else ((TABLE, self.code.table),), (), drivers, budget)

    def moves(self, state: State, *, calm: bool = False) -> Iterator[Move]:
        """Yields everything that can happen next; where it is calm, nothing goes wrong."""
        left = NOTHING if calm else state.left
        for program in dict.fromkeys(state.waiting):
            yield Move(
                f"a driver of plan {program.plan} starts", 0, lambda program=program: self._start(state, program)
            )
        for process in state.processes:
            if not isinstance(process.node.then, Ended):
                yield from self._steps(state, process, left)
        if left.changes:
            rest = state._replace(left=left._replace(changes=left.changes - 1))
            yield Move(
                "the input changes",
                -1,
                lambda: rest._replace(objects=put(rest.objects, TABLE, self.code.changed)),
                True,
            )
        if left.strangers:
            for short in (False, True):
                yield Move("a stranger writes a file", -1, lambda short=short: self._stranger(state, short), True)

    def _steps(self, state: State, process: Process, left: Budget) -> Iterator[Move]:
        request = process.node.then
        assert not isinstance(request, Ended)
        what, who = f"{request.method} {request.key}", process.number
        if request.method == "place":
            yield Move(f"place {request.data}", who, lambda: self._place(state, process))
        elif request.method == "receive":
            for worker in state.processes:
                if worker.parent == who and isinstance(worker.node.then, Ended):
                    yield Move(f"receive of {worker.number}", who, lambda w=worker: self._receive(state, process, w))
        else:
            for how, answer, objects in _answers(state.objects, request):
                yield Move(f"{what}: {how}", who, lambda a=answer, o=objects: self._step(state, process, a, o))
            if left.faults:
                faulty = state._replace(left=left._replace(faults=left.faults - 1))
                for how, answer, objects in _faults(state.objects, request):
                    yield Move(
                        f"{what}: {how}", who, lambda a=answer, o=objects: self._step(faulty, process, a, o), True
                    )
        if left.deaths:
            deadly = state._replace(left=left._replace(deaths=left.deaths - 1))
            yield Move("dies", who, lambda: self._die(deadly, process, goes_on=False), True)
            if process.parent is not None:
                yield Move("is taken for dead", who, lambda: self._die(deadly, process, goes_on=True), True)

    def _start(self, state: State, program: Program) -> State:
        waiting = list(state.waiting)
        waiting.remove(program)
        return self._spawn(state._replace(waiting=tuple(waiting)), None, program)

    def _spawn(self, state: State, parent: int | None, program: Program) -> State:
        born = state.born + 1
        process = Process(born, parent, self.code.start(program))
        return state._replace(processes=(*state.processes, process), born=born)

    def _place(self, state: State, driver: Process) -> State:
        request, program = driver.node.then, driver.node.program
        state = self._step(state, driver, None, state.objects)
        for index in request.data:
            state = self._spawn(state, driver.number, program._replace(slice=index))
        return state

    def _receive(self, state: State, driver: Process, worker: Process) -> State:
        end = worker.node.then
        answer = end.value if end.error is None else Raise("worker failed", end.error)
        state = state._replace(processes=tuple(p for p in state.processes if p.number != worker.number))
        return self._step(state, driver, answer, state.objects)

    def _die(self, state: State, process: Process, *, goes_on: bool) -> State:
        """Ends a process: a worker is replaced as Ray does, and those of a driver are left to themselves."""
        orphans = {process.number} if goes_on else set[int]()
        orphans |= {p.number for p in state.processes if p.parent == process.number}
        kept = [p for p in state.processes if goes_on or p.number != process.number]
        state = state._replace(processes=_orphaned(kept, orphans))
        return self._spawn(state, process.parent, process.node.program) if process.parent is not None else state

    def _step(self, state: State, process: Process, answer: Any, objects: Objects) -> State:
        if objects is not state.objects:
            self._on_change(objects, process.node.then.key)
        node = self.code.step(process.node, answer)
        moved = tuple(p._replace(node=node) if p.number == process.number else p for p in state.processes)
        state = state._replace(objects=objects, processes=moved)
        if not isinstance(node.then, Ended) or process.parent is not None:
            return state
        if node.program.slice is None:
            self._on_end(state, node)
        kept = [p for p in moved if p.number != process.number]
        return state._replace(processes=_orphaned(kept, {p.number for p in kept if p.parent == process.number}))

    def _stranger(self, state: State, short: bool) -> State:
        """Puts a file in the place of slice 0: one of another kind, or ours without its last row."""
        left = state.left
        state = state._replace(left=left._replace(strangers=left.strangers - 1))
        run = dict(state.objects).get(f"{OUTPUT}/_mmray/run.json", b"{}")
        plan_hash = json.loads(run).get("plan_hash", "")
        key = f"{OUTPUT}/{part_key(plan_hash, 0)}"
        if not plan_hash or key in dict(state.objects):
            return state
        return state._replace(objects=put(state.objects, key, _strange(plan_hash if short else "")))


@cache
def _strange(plan_hash: str) -> bytes:
    table = pa.table({"theirs": [1]})
    if plan_hash:
        ledger = {"rows": 2, "statuses": {"ok": 2}, "modalities": {"text": 2}, "histogram": [2] + [0] * 19}
        note = {"plan_hash": plan_hash, "slice": 0, "ledger": ledger}
        table = pa.table({"id": [0]}).replace_schema_metadata({METADATA_KEY: json.dumps(note).encode()})
    return to_parquet(table)


def _orphaned(processes: list[Process], numbers: set[int]) -> tuple[Process, ...]:
    """Lets workers go; those that have ended already are gone."""
    free = [p._replace(parent=None) if p.number in numbers else p for p in processes]
    return tuple(p for p in free if not (p.number in numbers and isinstance(p.node.then, Ended)))


def put(objects: Objects, key: str, data: bytes) -> Objects:
    """Returns a bucket with an object more, or with another in its place."""
    return tuple(sorted({**dict(objects), key: data}.items()))


def _answers(objects: Objects, request: Any) -> Iterator[tuple[str, Any, Objects]]:
    """Yields how a store in order answers, with what is in the bucket then."""
    there = dict(objects)
    key, method = request.key, request.method
    if method == "list":
        yield "ok", tuple((k, len(v), tag_of(v)) for k, v in objects if k.startswith(key)), objects
    elif method == "overwrite" or (method == "put" and key not in there):
        yield "ok", None, put(objects, key, request.data)
    elif method == "put":
        yield "exists", Raise("exists"), objects
    elif method == "delete":
        yield "ok", None, tuple(item for item in objects if item[0] != key) if key in there else objects
    elif key not in there:
        yield "absent", Raise("absent"), objects
    else:
        data = there[key]
        yield "ok", (len(data), tag_of(data)) if method == "head" else data, objects


def _faults(objects: Objects, request: Any) -> Iterator[tuple[str, Any, Objects]]:
    """Yields how a store on a bad day answers."""
    yield "fails", Raise("fault"), objects
    if request.method == "list":
        ((_, listed, _),) = _answers(objects, request)
        for count in {0, len(listed) - 1} - {-1, len(listed)}:
            yield f"shows {count} of {len(listed)}", listed[:count], objects
    if request.method == "put":
        yield "409", Raise("exists"), objects
    for _, answer, after in _answers(objects, request):
        if request.method in ("put", "overwrite", "delete") and after is not objects:
            yield "done, and fails", Raise("fault"), after
            if request.method == "put" and answer is None:
                yield "done, and tells the second try that it exists", Raise("exists"), after
