"""What must hold of an output at every moment, however it came about."""

import hashlib
import json
from typing import Any

from mmray.errors import EnvironmentFaultError, OutputConflictError
from mmray.parquet import from_parquet
from mmray.score.commit import METADATA_KEY

from .code import OUTPUT, ROWS_PER_SLICE, Code, Ended, Node, Program
from .world import NOTHING, Budget, Objects, State, Violation, World

RUN, SUCCESS = f"{OUTPUT}/_mmray/run.json", f"{OUTPUT}/_SUCCESS"
MAX_STEPS = 500  # of a run without faults; it takes a tenth


class Invariants:
    """Checks buckets and ends of drivers; what was checked once is not checked again."""

    def __init__(self, code: Code, *, noise: bool) -> None:
        """Takes the code, and whether machines score a little differently: then outputs are not all the same."""
        self._code, self._noise = code, noise
        self._world = World(code, lambda objects, key: None, lambda state, node: None)
        self._before: Objects = ()
        self._right, self._restarted = set[Objects](), set[Objects]()
        self._files: dict[bytes, Any] = {}
        self._success: dict[int, bytes] = {}

    def changed(self, before: Objects, after: Objects) -> None:
        """Holds over a change: but for attempts, what is there stays as it is."""
        if after == before:
            return
        then = dict(after)
        for key, data in before:
            if key.startswith(f"{OUTPUT}/") and "/attempts/" not in key and then.get(key) != data:
                raise Violation(f"{key} was {'changed' if key in then else 'removed'}")

    def holds(self, objects: Objects) -> None:
        """Holds of a bucket at any moment."""
        if objects in self._right:
            return
        there = {k.removeprefix(f"{OUTPUT}/"): v for k, v in objects if k.startswith(f"{OUTPUT}/")}
        data = {key: self._file(blob) for key, blob in there.items() if key.startswith("data/")}
        ours = [note for note, _, _ in data.values() if note]
        if len({note["slice"] for note in ours}) < len(ours):
            raise Violation("a slice has two files")
        if data and "_mmray/run.json" not in there:
            raise Violation("there is data in a folder that no run has taken")
        if data and {note["plan_hash"] for note in ours} - {json.loads(there["_mmray/run.json"])["plan_hash"]}:
            raise Violation("a file of another plan has got in")
        if "_SUCCESS" in there:
            self._complete(there, data)
        self._right.add(objects)

    def _complete(self, there: dict[str, bytes], data: dict[str, Any]) -> None:
        success, owner = json.loads(there["_SUCCESS"]), json.loads(there["_mmray/run.json"])
        manifest = there.get(f"_mmray/manifest-{success['manifest'][:8]}.parquet")
        if manifest is None or hashlib.sha256(manifest).hexdigest() != success["manifest"]:
            raise Violation("_SUCCESS names a manifest that is not there")
        if f"_mmray/plan-{success['plan_hash'][:8]}.parquet" not in there:
            raise Violation("_SUCCESS without a plan")
        if success["plan_hash"] != owner["plan_hash"]:
            raise Violation("_SUCCESS is of another plan")
        listed = {(row["key"], row["size"], row["ledger"]) for row in self._file(manifest)[2].to_pylist()}
        if listed != {(key, len(there[key]), json.dumps(note.get("ledger"))) for key, (note, _, _) in data.items()}:
            raise Violation("the manifest does not name exactly the files that are there, as they are")
        rows = [row for key in sorted(data) for row in data[key][1]]
        want = len(self._code.plans[0].slices) * ROWS_PER_SLICE
        if rows != list(range(want)) or success["rows"] != want or success["slices"] != len(data):
            raise Violation(f"_SUCCESS, and the rows are {rows}")
        if (
            not self._noise
            and self._success.setdefault(_number(self._code, owner), there["_SUCCESS"]) != there["_SUCCESS"]
        ):
            raise Violation("_SUCCESS depends on the schedule")

    def ended(self, state: State, node: Node, given: Budget) -> None:
        """Holds of the end of a driver."""
        end, there = node.then, dict(state.objects)
        assert isinstance(end, Ended)
        plan = self._code.plans[node.program.plan]
        owner = json.loads(there[RUN])["plan_hash"] if RUN in there else None
        if end.error is None:
            if SUCCESS not in there or owner != plan.hash:
                raise Violation("a driver says that its run is complete, and it is not")
            if json.loads(there[SUCCESS])["ledger"] != json.loads(json.dumps(end.value.to_dict())):
                raise Violation("a driver counts otherwise than _SUCCESS")
        elif isinstance(end.error, OutputConflictError):
            if owner in (None, plan.hash) and state.left.strangers == given.strangers:
                raise Violation(f"a driver meets a conflict in an output of its own: {end.error}")
        elif not isinstance(end.error, EnvironmentFaultError):
            raise Violation(f"a driver ends in {end.error!r}")
        elif (state.left.faults, state.left.changes) == (given.faults, given.changes):
            raise Violation(f"a driver meets a fault where there was none: {end.error}")

    def restarts(self, state: State, given: Budget) -> None:
        """Holds of every moment: the same command, run once more and alone, comes to the right end."""
        objects = state.objects
        if objects in self._restarted:
            return
        there = dict(objects)
        number = _number(self._code, json.loads(there[RUN])) if RUN in there else 0
        alone = self._world.begin((Program(number),), NOTHING, objects)
        end = self._run(alone)
        spoilt = (state.left.strangers, state.left.changes) != (given.strangers, given.changes)
        if end.error is not None and not spoilt:
            raise Violation(f"a run that is started again ends in {end.error!r}")
        self._restarted.add(objects)

    def _run(self, state: State) -> Ended:
        ends = list[Ended]()
        world = World(self._code, lambda objects, key: None, lambda state, node: ends.append(node.then))  # type: ignore[arg-type]
        for _ in range(MAX_STEPS):
            before = state.objects
            state = next(world.moves(state)).then()
            self.changed(before, state.objects)
            self.holds(state.objects)
            if ends:
                return ends[0]
        raise Violation("a run that is started again does not come to an end")

    def _file(self, blob: bytes) -> tuple[dict[str, Any], list[int], Any]:
        if blob not in self._files:
            table = from_parquet(blob)
            note = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
            self._files[blob] = note, table["id"].to_pylist() if "id" in table.schema.names else [], table
        return self._files[blob]


def _number(code: Code, owner: dict[str, Any]) -> int:
    return [plan.hash for plan in code.plans].index(owner["plan_hash"])
