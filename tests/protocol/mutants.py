"""The protocol with a rule taken away: each must be found wanting, or the search proves nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

from mmray.errors import EnvironmentFaultError, OutputConflictError
from mmray.score import commit, worker
from mmray.score.commit import RUN, Manifest, Output, Receipt, part_key
from mmray.score.ledger import Ledger
from mmray.score.plan import Plan
from mmray.slices import Slice
from mmray.store import ObjectStore

Patch = Callable[[], Any]
real_claim, real_commit, real_receipt, real_finalize = Output.claim, Output.commit, Output.receipt, Output.finalize
real_create = ObjectStore.create


def _overwrite(self: ObjectStore, key: str, data: bytes) -> bool:
    with self._asking("write", key, required=True):
        self._store.put(key, data)
    return True


def _conflict_is_there(self: ObjectStore, key: str, data: bytes) -> bool:
    return self._put(key, data)


def _silence_is_consent(self: ObjectStore, key: str, data: bytes) -> bool:
    try:
        return real_create(self, key, data)
    except EnvironmentFaultError:
        return True


def _in_two_writes(self: ObjectStore, key: str, data: bytes) -> bool:
    if not real_create(self, key, data[: len(data) // 2]):
        return False
    return _overwrite(self, key, data)


def _claim_overwrites(self: Output, plan: Plan, description: dict[str, Any]) -> None:
    owner = self.owner()
    if owner is not None and owner["plan_hash"] != plan.hash:
        raise OutputConflictError("another run")
    _overwrite(self.store, RUN, json.dumps(description, indent=1).encode())  # type: ignore[arg-type]
    self.store.create(f"_mmray/plan-{plan.hash[:8]}.parquet", plan.to_parquet())


def _claim_does_not_compare(self: Output, plan: Plan, description: dict[str, Any]) -> None:
    self.store.create(RUN, json.dumps(description, indent=1).encode())
    self.store.create(f"_mmray/plan-{plan.hash[:8]}.parquet", plan.to_parquet())


def _claim_looks_once(self: Output, plan: Plan, description: dict[str, Any]) -> None:
    if self.owner() is None and self.store.list("data"):
        raise OutputConflictError("data that mmray did not write")
    real_claim(self, plan, description)


def _claim_without_plan(self: Output, plan: Plan, description: dict[str, Any]) -> None:
    if not self.store.create(RUN, json.dumps(description, indent=1).encode()):
        owner = self.owner()
        if owner is not None and owner["plan_hash"] != plan.hash:
            raise OutputConflictError("another run")
        return  # "who created it has written the plan"
    self.store.create(f"_mmray/plan-{plan.hash[:8]}.parquet", plan.to_parquet())


def _own_receipt(self: Output, plan_hash: str, piece: Slice, scored: Any, ledger: Ledger, provenance: Any) -> Receipt:
    real = real_commit(self, plan_hash, piece, scored, ledger, provenance)
    return replace(real, ledger=ledger)


def _receipt_of_anything(self: Output, plan_hash: str, piece: Slice) -> Receipt:
    entry = self.store.stat(part_key(plan_hash, piece.index))
    assert entry is not None
    ledger = Ledger(piece.num_rows, {"ok": piece.num_rows}, {}, {"text": piece.num_rows})
    return Receipt(piece.index, part_key(plan_hash, piece.index), entry.size, ledger)


def _receipt_of_any_rows(self: Output, plan_hash: str, piece: Slice) -> Receipt:
    try:
        return real_receipt(self, plan_hash, piece)
    except OutputConflictError:
        return real_receipt(self, plan_hash, replace(piece, num_rows=1))


def _success_first(self: Output, plan: Plan, manifest: Manifest, max_error_rate: float) -> Ledger:
    """Creates the objects of the end in the other order."""
    held = dict[str, bytes]()
    create = self.store.create

    def later(key: str, data: bytes) -> bool:
        held[key] = data
        return True

    with mock.patch.object(self.store, "create", later):
        total = real_finalize(self, plan, manifest, max_error_rate)
    for key in reversed(held):
        create(key, held[key])
    return total


def _success_of_what_is_listed(self: Output, plan: Plan, manifest: Manifest, max_error_rate: float) -> Ledger:
    there = self.committed(plan.hash) or {0}
    some = replace(plan, slices=tuple(piece for piece in plan.slices if piece.index in there))
    with mock.patch.object(type(plan), "hash", plan.hash):
        return real_finalize(self, some, Manifest.of(self.receipts(plan.hash, some.slices)), max_error_rate)


def _done_is_not_looked_at(self: Output, plan_hash: str) -> set[int]:
    for key in self.store.list("data"):
        self.store.delete(key)
    return set()


def _receipt_before_commit(self: Any, piece: Slice) -> Receipt:
    """Says that a slice is done, and writes it afterwards - which a process that is ended does not come to."""
    ledger = Ledger(piece.num_rows, {"ok": piece.num_rows}, {}, {"text": piece.num_rows})
    return Receipt(piece.index, part_key(self._plan_hash, piece.index), 1, ledger)


def _on(target: Any, name: str, new: Any) -> Patch:
    return partial(mock.patch.object, target, name, new)


MUTANTS: dict[str, Sequence[Patch]] = {
    "create overwrites": [_on(ObjectStore, "create", _overwrite)],
    "409 is taken for 'it exists'": [_on(ObjectStore, "create", _conflict_is_there)],
    "no answer is taken for success": [_on(ObjectStore, "create", _silence_is_consent)],
    "a file is written in two steps": [_on(ObjectStore, "create", _in_two_writes)],
    "the claim overwrites": [_on(Output, "claim", _claim_overwrites)],
    "the claim does not compare plans": [_on(Output, "claim", _claim_does_not_compare)],
    "the claim takes a rival's data for a stranger's": [_on(Output, "claim", _claim_looks_once)],
    "the plan is written by its first driver only": [_on(Output, "claim", _claim_without_plan)],
    "a twin's receipt is its own": [_on(Output, "commit", _own_receipt)],
    "a footer is not read": [_on(Output, "receipt", _receipt_of_anything)],
    "a footer's rows are not counted": [_on(Output, "receipt", _receipt_of_any_rows)],
    "_SUCCESS comes before its manifest": [_on(Output, "finalize", _success_first)],
    "_SUCCESS trusts a listing": [_on(Output, "finalize", _success_of_what_is_listed)],
    "inputs are not looked at again": [_on(commit, "_check_inputs", lambda plan: None)],
    "what is there is deleted and written again": [_on(Output, "committed", _done_is_not_looked_at)],
    "a receipt comes before its file": [_on(worker.SliceScorer, "score", _receipt_before_commit)],
}
