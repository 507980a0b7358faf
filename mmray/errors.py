"""Every error a user can cause, as one tree; each message says what is wrong, what was got, and what to do.

MmrayError                    exit 2
├── ConfigError               exit 2   a setting is unknown, malformed or contradicts another
│   └── DivergenceError       exit 2   training came to a loss that is no number
├── TableError                exit 2   an input table or column is missing, empty or unreadable
├── BundleError               exit 2   a bundle is damaged, of another version, or fails its golden rows
├── OutputConflictError       exit 3   the output folder belongs to a different run
├── VerifyError               exit 4   an output does not hold what its input promises
├── EnvironmentFaultError     exit 5   the machine, cluster or store failed; the same command resumes
├── ErrorBudgetError          exit 6   more rows failed than `--max-error-rate` allows
├── GateError                 exit 6   a scheduled run is not fit to be published
└── JobError                  the job's own exit code: a submitted job ended with it
"""

import difflib
import re
from collections.abc import Iterable

# Of a terminal, of text direction and halves of characters: a name in a table must not write a line of a log.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class MmrayError(Exception):
    """A mistake or fault that is reported in one line, without a traceback; control characters are escaped."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), message))


class ConfigError(MmrayError):
    """A setting is unknown, malformed or contradicts another."""


class DivergenceError(ConfigError):
    """Training came to a loss that is no number: the learning rate is too high, or a row is wrong."""


class TableError(MmrayError):
    """An input table or column is missing, empty or unreadable."""


class BundleError(MmrayError):
    """A bundle is damaged, of another version, or does not reproduce its golden rows."""


class OutputConflictError(MmrayError):
    """The output folder belongs to a different run."""

    exit_code = 3


class VerifyError(MmrayError):
    """An output does not hold what its input promises."""

    exit_code = 4


class EnvironmentFaultError(MmrayError):
    """The machine, the cluster or the store failed; running the same command again resumes."""

    exit_code = 5


class ErrorBudgetError(MmrayError):
    """More rows failed than the run allows; the data is kept, `_SUCCESS` is withheld."""

    exit_code = 6


class GateError(MmrayError):
    """A scheduled run is not fit to be published; its data is kept, what is published stays."""

    exit_code = 6


class JobError(MmrayError):
    """A submitted job ended with an exit code other than 0."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def named(name: str, text: str) -> MmrayError | None:
    """Returns an error of ours by the name of its class, as another process told of it; None for any other."""
    kind = globals().get(name)
    is_ours = isinstance(kind, type) and issubclass(kind, MmrayError) and kind is not JobError
    return kind(text) if is_ours else None  # type: ignore[misc]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
