"""Goes through schedules: all of them up to a bound on what goes wrong, or random ones from a seed."""

import random
from collections import deque
from dataclasses import asdict, dataclass

from .code import Code, Program
from .invariants import Invariants
from .world import NOTHING, Budget, Move, Objects, State, Violation, World


@dataclass(frozen=True)
class Scenario:
    """Who is there, and what may go wrong."""

    drivers: tuple[int, ...]
    """Plan of each; of one plan: rivals, or one that comes after the other's death."""
    budget: Budget = NOTHING
    slices: int = 2
    noise: bool = False


# Every state of these is visited, with a rival, a restart or an answer that goes wrong at each place there is.
EXHAUSTED = {
    "one driver, two slices, two faults": Scenario((0,), Budget(faults=2)),
    "one driver, two slices, a death or a zombie": Scenario((0,), Budget(deaths=1)),
    "rivals of one plan": Scenario((0, 0), slices=1, noise=True),
    "rivals of two plans, a fault": Scenario((0, 1), Budget(faults=1), slices=1),
}
# Of these there are more schedules than anybody can visit; the first without noise, where every output is the same.
SAMPLED = {
    "two drivers and another plan": (Scenario((0, 0, 1), Budget(faults=2, deaths=2)), 0.8),
    "three drivers and another plan, three slices": (
        Scenario((0, 0, 0, 1), Budget(faults=3, deaths=3), slices=3),
        0.1,
    ),
    "machines that differ, an input that changes, strangers": (
        Scenario((0, 0, 1), Budget(faults=2, deaths=2, changes=1, strangers=1), noise=True),
        0.1,
    ),
}
"""Scenario and its share of the schedules."""
HUNTED = Scenario((0, 0, 1), Budget(faults=2, deaths=2, changes=1, strangers=1), noise=True)
"""Where mutants are found."""


@dataclass
class Found:
    """What a search has seen."""

    states: int = 0
    transitions: int = 0
    depth: int = 0
    schedules: int = 0
    violation: str | None = None
    trace: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if value}


class Search:
    """Schedules of one scenario."""

    def __init__(self, scenario: Scenario, code: Code | None = None) -> None:
        self.code = code or Code(scenario.slices)
        self._scenario = scenario
        self._invariants = Invariants(self.code, noise=scenario.noise)
        self._world = World(self.code, self._on_change, self._on_end)
        self._drivers = tuple(Program(plan, noise=k * scenario.noise) for k, plan in enumerate(scenario.drivers))

    def _on_change(self, objects: Objects, key: str) -> None:
        self._invariants.holds(objects)

    def _on_end(self, state: State, node: object) -> None:
        self._invariants.ended(state, node, self._scenario.budget)  # type: ignore[arg-type]

    def _after(self, state: State, move: Move) -> State:
        after = move.then()
        self._invariants.changed(state.objects, after.objects)
        self._invariants.restarts(after, self._scenario.budget)
        return after

    def exhaust(self, max_states: int = 10**7) -> Found:
        """Visits every state that can be reached, the nearest first."""
        with self.code.in_place():
            return self._exhaust(max_states)

    def _exhaust(self, max_states: int) -> Found:
        start = self._world.begin(self._drivers, self._scenario.budget)
        found, queue = Found(), deque([(start, 0)])
        came: dict[object, tuple[object, str] | None] = {start.key(): None}
        while queue and len(came) < max_states:
            state, depth = queue.popleft()
            found.depth = depth
            for move in self._world.moves(state):
                found.transitions += 1
                try:
                    after = self._after(state, move)
                except Violation as violation:
                    found.states, found.violation = len(came), str(violation)
                    found.trace = (*_way(came, state.key()), said(move))
                    return found
                if after.key() not in came:
                    came[after.key()] = state.key(), said(move)
                    queue.append((after, depth + 1))
        found.states = len(came)
        return found

    def sample(self, schedules: int, seed: int) -> Found:
        """Follows random schedules to their ends."""
        found = Found()
        with self.code.in_place():
            for number in range(seed, seed + schedules):
                found.schedules += 1
                trace = list[str]()
                try:
                    found.transitions += self._follow(random.Random(number), trace)
                except Violation as violation:
                    found.violation, found.trace = f"{violation} (seed {number})", tuple(trace)
                    break
                found.depth = max(found.depth, len(trace))
        return found

    def _follow(self, chance: random.Random, trace: list[str]) -> int:
        state = self._world.begin(self._drivers, self._scenario.budget)
        trouble = 10 ** chance.uniform(-3, -0.5)
        pace: dict[int, float] = {}  # some processes are a thousand times slower: they come back when all is over
        while usual := list(self._world.moves(state, calm=True)):
            bad = chance.random() < trouble and [move for move in self._world.moves(state) if move.trouble]
            some = bad or usual
            (move,) = chance.choices(some, [pace.setdefault(m.who, 10 ** chance.uniform(-3, 0)) for m in some])
            trace.append(said(move))
            state = self._after(state, move)
        return len(trace)


def said(move: Move) -> str:
    """Returns a move as a line of a counterexample."""
    return f"{move.who}: {move.what}" if move.who > 0 else move.what


def _way(came: dict[object, tuple[object, str] | None], key: object) -> tuple[str, ...]:
    way = list[str]()
    while step := came[key]:
        key, line = step
        way.append(line)
    return tuple(reversed(way))
