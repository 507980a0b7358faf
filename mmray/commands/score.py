"""`mmray score`, `verify`, `errors`, `report` and `parity`: a scored table, and whether it is right."""

import argparse
import json
import os
from collections import Counter
from typing import Any

from mmray.commands.flags import (
    add_columns,
    add_events,
    add_progress,
    add_score_options,
    local_folder,
    score_config,
)


def register(commands: Any) -> None:
    """Adds these commands to the parser."""
    _add_score(commands)
    _add_verify(commands)
    _add_errors(commands)
    _add_report(commands)
    _add_parity(commands)


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        usage="%(prog)s BUNDLE INPUT OUTPUT [options]",
        help="score every row of a table, once",
        description="Score a table into OUTPUT/data/*.parquet; OUTPUT/_SUCCESS says that every row is there. "
        "The same command resumes a run that was interrupted, and is quick where there is nothing left to do.",
    )
    score.add_argument("bundle", metavar="BUNDLE")
    score.add_argument("table", metavar="INPUT", help="parquet file, folder or glob")
    score.add_argument("output", metavar="OUTPUT", help="folder that is new or of the same run")
    add_score_options(score)
    score.add_argument("--report", metavar="DIR", help="write `mmray report` there when every row is there")
    add_events(score)
    score.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> None:
    from mmray.progress import event, row_progress
    from mmray.score.job import score_table

    folder = None if args.report is None else _made_folder(args.report)
    with row_progress(quiet=args.quiet, events=args.json) as progress:
        result = score_table(
            args.bundle,
            args.table,
            args.output,
            score_config(args),
            **progress.of_scoring(),
        )
    if args.json:
        event("done", **result.to_dict())
    else:
        print("\n".join([*result.lines(), os.path.join(args.output, "data")]), flush=True)
    if folder is not None:
        page = _write_report(folder, args.output, args.bundle)
        event("report", page=page) if args.json else print(page)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove that an output holds every row of its input",
        description="0: files and manifest agree. 1: every footer too. 2: every input row stands there, in order. "
        "3: random rows get the same scores again, within 1e-3 of fp32 and 1e-2 of bf16.",
    )
    verify.add_argument("output", metavar="OUTPUT")
    verify.add_argument("--level", type=int, choices=[0, 1, 2, 3], default=1, help="default: %(default)s")
    verify.add_argument("--sample", type=int, default=256, metavar="N", help="rows scored again (default: %(default)s)")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="which rows (default: %(default)s)")
    verify.add_argument("--bundle", metavar="BUNDLE", help="for level 3 (default: where the run had it)")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    add_progress(verify)
    verify.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from mmray.errors import VerifyError
    from mmray.progress import row_progress
    from mmray.score.verify import verify_output

    with row_progress(quiet=args.quiet) as progress:
        report = verify_output(
            args.output,
            args.level,
            sample=args.sample,
            seed=args.seed,
            bundle=args.bundle,
            on_start=lambda rows: progress.start("verifying", rows),
            on_slice=progress.advance,
        )
    if args.json:
        print(json.dumps({**asdict(report), "passed": report.passed}, indent=1))
    elif report.passed:
        print(f"{report.rows:,} rows in {report.slices:,} slices: verified at level {report.level}")
    if not report.passed:
        raise VerifyError(f"{args.output} does not hold:\n  " + "\n  ".join(report.mismatches))


def _add_errors(commands: Any) -> None:
    errors = commands.add_parser("errors", help="list the rows of an output that are not ok, by reason")
    errors.add_argument("output", metavar="OUTPUT")
    errors.add_argument("--reason", help="only this reason")
    errors.add_argument("--column", action="append", default=[], help="also show this column; repeatable")
    errors.add_argument("--limit", type=int, default=20, metavar="N", help="rows shown (default: %(default)s)")
    errors.set_defaults(run=_errors)


def _errors(args: argparse.Namespace) -> None:
    from mmray.score.problems import problems
    from mmray.table import Reason

    counts: Counter[tuple[str, str]] = Counter()
    for problem in problems(args.output, args.column, args.reason):
        if counts.total() < args.limit:
            extra = "".join(f"  {name}={value!r}" for name, value in problem.cells.items())
            print(f"{problem.key}:{problem.row}  {problem.status}  {problem.detail}{extra}")
        counts[problem.status, problem.reason] += 1
    if counts.total() > args.limit:
        print(f"... and {counts.total() - args.limit:,} more; --limit shows more, --reason one kind")
    for (status, reason), count in counts.most_common():
        print(f"{count:>12,}  {status:<9} {reason:<16}  {Reason[reason].meaning} {Reason[reason].remedy}")
    if not counts:
        print("every row is ok" if args.reason is None else f"no row has the reason {args.reason}")


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write a page about a finished run, to look at and to send on",
        description="Write report.html and report.json about a finished run: every row accounted for, reasons with "
        "examples, how far the scores are from those of the rows trained on or of another run, what was verified.",
        epilog="How to read it: first whether it was verified, then how many rows have no score and why; a reason that "
        "most of them share is one mistake, and `mmray errors` says what to do. A stability index below 0.1 is "
        "chance, above 0.25 other rows than those trained on: look at the groups of --by for which. Of a run that was "
        "slower than planned, the shares of time say what to give it more of.",
    )
    report.add_argument("output", metavar="OUTPUT")
    report.add_argument("--to", metavar="DIR", help="folder for the page (default: OUTPUT)")
    report.add_argument("--before", metavar="OUTPUT", help="another run, to compare scores with")
    report.add_argument("--by", metavar="C", help="column whose values group the rows")
    report.add_argument(
        "--samples", type=int, default=0, metavar="N", help="show N rows with picture and text (default: none)"
    )
    report.add_argument("--bundle", metavar="BUNDLE", help="where the bundle is now (default: where the run had it)")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from mmray.errors import ConfigError

    folder = local_folder("--to", args.to or args.output)
    if args.samples < 0:
        raise ConfigError(f"--samples: takes a number of rows, got {args.samples}")
    print(_write_report(folder, args.output, args.bundle, args.before, by=args.by, samples=args.samples))


def _write_report(folder: str, *arguments: Any, **options: Any) -> str:
    """Writes what `scoring_report` makes of these, and returns the page's path."""
    from mmray.account import scoring_report
    from mmray.report import write_report

    write_report(folder, scoring_report(*arguments, **options))
    return os.path.join(folder, "report.html")


def _made_folder(uri: str) -> str:
    """Makes the report's folder before the work of hours, not after it."""
    from mmray.errors import ConfigError

    folder = local_folder("--report", uri)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report: cannot make {folder!r}: {error.strerror}; name another folder") from error
    return folder


def _add_parity(commands: Any) -> None:
    parity = commands.add_parser(
        "parity",
        help="score the same rows by every path, and compare",
        description="Score rows of a table by the predictor, by Ray Data at several batch sizes and actor counts, and "
        "over HTTP; print the largest difference of each from the first. Exits 4 where one is beyond the tolerance.",
    )
    parity.add_argument("bundle", metavar="BUNDLE")
    parity.add_argument("table", metavar="TABLE", help="parquet file, folder or glob")
    parity.add_argument("--rows", type=int, default=500, metavar="N", help="rows compared (default: %(default)s)")
    add_columns(parity)
    parity.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> None:
    from mmray.errors import VerifyError
    from mmray.parity import compare_paths

    broken = []
    for parity in compare_paths(args.bundle, args.table, score_config(args), args.rows):
        other = f"   {parity.other_rows:,} rows with another label, status or reason" if parity.other_rows else ""
        print(f"{parity.path:<34} largest difference {parity.largest_difference:.2e}{other}", flush=True)
        broken += [] if parity.holds else [parity.path]
    if broken:
        raise VerifyError(f"the same rows get other scores by: {', '.join(broken)}")
