"""The commit protocol, run as it is under every schedule of requests, faults and deaths: see `tests/protocol`.

`pytest -s tests/test_protocol.py` prints how much was searched; `python -m tests.protocol` searches for longer.
"""

from collections.abc import Callable

import pytest
from protocol.code import Code
from protocol.mutants import MUTANTS
from protocol.search import EXHAUSTED, HUNTED, SAMPLED, Search

SCHEDULES, SEED = 10_000, 20260101
HUNT = 3_000  # schedules in which a mutant is found, at most


@pytest.mark.slow
@pytest.mark.parametrize("name", EXHAUSTED)
def test_in_every_schedule_of_a_small_run_each_slice_is_there_once(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    found = Search(EXHAUSTED[name]).exhaust()
    record_property("searched", found.to_dict())
    print(f"\n{name}: all of {found.states:,} states, {found.transitions:,} steps between them, depth {found.depth}")
    assert found.violation is None, "\n".join(found.trace)
    assert found.states > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_in_ten_thousand_schedules_at_random_each_slice_is_there_once(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    scenario, share = SAMPLED[name]
    found = Search(scenario).sample(round(SCHEDULES * share), SEED)
    record_property("searched", {**found.to_dict(), "seed": SEED})
    print(f"\n{name}: {found.schedules:,} schedules from seed {SEED}, {found.transitions:,} steps, depth {found.depth}")
    assert found.violation is None, "\n".join(found.trace)


@pytest.mark.slow
def test_a_rule_taken_away_is_missed() -> None:
    missed = []
    for name, patches in MUTANTS.items():
        found = Search(HUNTED, Code(HUNTED.slices, patches)).sample(HUNT, SEED)
        print(f"\n{name}: {found.violation}, after {found.schedules:,} schedules and {len(found.trace)} steps", end="")
        if found.violation is None:
            missed.append(name)
    assert not missed
    assert len(MUTANTS) >= 8
