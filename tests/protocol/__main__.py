"""More schedules than a test has time for: python -m tests.protocol --schedules 1000000 --seed 1

Prints a JSON object for each search; exit 1 where one finds a violation.
"""

import argparse
import json
import sys
import time

from .search import EXHAUSTED, SAMPLED, Found, Search


def main() -> int:
    """Searches, and says what it found."""
    parser = argparse.ArgumentParser(prog="python -m tests.protocol", description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=10_000, help="random ones")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others count on from it")
    parser.add_argument("--exhaust", action="store_true", help="visit every state of the small scenarios too")
    arguments = parser.parse_args()
    found = list[Found]()

    def say(name: str, result: Found, started: float, **more: object) -> None:
        found.append(result)
        seconds = round(time.process_time() - started, 1)
        print(json.dumps({"scenario": name, **more, **result.to_dict(), "cpu_seconds": seconds}), flush=True)

    for name, scenario in EXHAUSTED.items() if arguments.exhaust else ():
        started = time.process_time()
        say(name, Search(scenario).exhaust(), started)
    for name, (scenario, share) in SAMPLED.items():
        started, count = time.process_time(), round(arguments.schedules * share)
        say(name, Search(scenario).sample(count, arguments.seed), started, seed=arguments.seed)
    return int(any(result.violation for result in found))


if __name__ == "__main__":
    sys.exit(main())
