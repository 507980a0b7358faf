"""The command line. Each command calls one function of the library, shows how far it is, and exits with a code.

0 done; 2 a mistake in what was given; 3 the output belongs to another run; 4 verification found a mismatch; 5 the
machine, cluster or store failed (the same command resumes); 6 too many failed rows; 130 interrupted (resumes too).
"""

import argparse
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mmray import __version__
from mmray.commands import inspect, plan, schedule, score, serve, submit, train
from mmray.errors import MmrayError
from mmray.stop import terminate

INTERRUPTED = 130
PATHS = {"BUNDLE", "INPUT", "OUTPUT", "TABLE", "ROOT", "DIR", "FILE", "CONFIG.toml"}
"""What arguments are called that are paths, which a shell completes."""


def run() -> None:
    """Is the `mmray` command: `main` in a process of its own."""
    _keep_the_terminal()
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())


def _keep_the_terminal() -> None:
    """Leaves the terminal to our own messages.

    Ray's core and image decoders write to descriptor 2 behind our back, and Ray's driver prints on stdout what nodes
    report of processes that ended, whatever `log_to_driver` says.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")  # every line; Ray reads it when it is imported
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    faulthandler.enable(sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except MmrayError as error:
        print(f"mmray: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print(f"mmray: interrupted; {str(interrupt) or 'the same command continues where it stopped'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `mmray errors OUT | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mmray",
        description="Train a model that fuses an image and a text, and score very large tables with it on Ray.",
        epilog="Start with `mmray demo`. Paths are local, or file://, s3://, gs:// and az:// URIs.",
    )
    parser.add_argument("--version", action="version", version=f"mmray {__version__}")
    parser.add_argument(
        "--completion",
        action=_Completion,
        choices=["bash", "zsh"],
        help='print a script for the shell: eval "$(mmray --completion bash)"',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (train, inspect, plan, score, schedule, serve, submit):
        group.register(commands)
    return parser


class _Completion(argparse.Action):
    """Prints what a shell reads to complete the words of a command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: object = None) -> None:
        import shtab

        (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        for command in commands.values():
            for action in command._actions:
                if action.metavar in PATHS:
                    action.complete = shtab.FILE
        print(shtab.complete(parser, values))
        parser.exit()


if __name__ == "__main__":
    run()
