"""`mmray tick`, `published` and `register`: scoring on a schedule."""

import argparse
from typing import Any

from mmray.commands.flags import add_events, add_score_options, score_config, settings


def register(commands: Any) -> None:
    """Adds these commands to the parser."""
    _add_tick(commands)
    _add_published(commands)
    _add_register(commands)


def _add_tick(commands: Any) -> None:
    tick = commands.add_parser(
        "tick",
        usage="%(prog)s BUNDLE TABLE ROOT [options]",
        help="score what is new in a table, and publish the whole",
        description="Score the files of TABLE that are new or changed since what is published "
        "under ROOT, or all of them for a new model, and publish the whole under the next number. Safe to run twice, "
        "late, or at the same time as another.",
    )
    tick.add_argument("bundle", metavar="BUNDLE")
    tick.add_argument("table", metavar="TABLE", help="parquet file, folder or glob")
    tick.add_argument("root", metavar="ROOT", help="folder or URI for runs and published lists")
    tick.add_argument("--full", action="store_true", default=None, help="score every file again")
    tick.add_argument("--key", metavar="C", help="score only changed rows of changed files, by key C")
    tick.add_argument(
        "--retry-failed", action="store_true", default=None, help="score files again that have a row that is not ok"
    )
    tick.add_argument("--min-rows", type=int, metavar="N", help="publish no fewer rows (default: 1)")
    tick.add_argument("--max-drift", type=float, metavar="PSI", help="publish no new scores that drift more")
    tick.add_argument("--keep", type=int, metavar="N", help="published lists that stay (default: 7)")
    tick.add_argument("--lease-s", type=float, metavar="S", help="a tick silent for so long is dead (default: 60)")
    add_score_options(tick)
    add_events(tick)
    tick.set_defaults(run=_tick)


def _tick(args: argparse.Namespace) -> None:
    from mmray.progress import event, row_progress
    from mmray.schedule.settings import ScheduleConfig
    from mmray.schedule.tick import tick

    with row_progress(quiet=args.quiet, events=args.json) as progress:
        result = tick(
            args.bundle,
            args.table,
            args.root,
            score_config(args),
            settings(ScheduleConfig, args, {}),
            **progress.of_scoring(),
        )
    if args.json:
        event("done", **result.to_dict())
    else:
        print("\n".join(result.lines()))


def _add_published(commands: Any) -> None:
    published = commands.add_parser("published", help="list the scored files that are published under a root")
    published.add_argument("root", metavar="ROOT")
    published.set_defaults(run=_published)


def _published(args: argparse.Namespace) -> None:
    from mmray.schedule.published import read_published

    print("\n".join(read_published(args.root).files(args.root)))


def _add_register(commands: Any) -> None:
    register = commands.add_parser(
        "register",
        help="make what is published under a root a Delta table",
        description="Make the files that are published under ROOT the newest version of a Delta table at ROOT; they "
        "stay where they are. Safe to run twice, or at the same time as another: `mmray tick ... && mmray register "
        "ROOT`. Needs `pip install 'mmray[delta]'`. Older versions cannot be read any more once a tick has removed "
        "the lists that had their files (--keep), as after a VACUUM; the newest version always can.",
    )
    register.add_argument("root", metavar="ROOT")
    register.set_defaults(run=_register)


def _register(args: argparse.Namespace) -> None:
    from mmray.errors import ConfigError

    try:
        from mmray.schedule.delta import register
    except ImportError as error:  # an extra
        raise ConfigError(f"a Delta table needs deltalake ({error}); run pip install 'mmray[delta]'") from error
    print("\n".join(register(args.root).lines()))
