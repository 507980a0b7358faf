"""`mmray plan`: what a run would do, before it does."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmray.commands.flags import add_score_options, score_config

if TYPE_CHECKING:
    from mmray.score.forecast import Forecast

Line = tuple[str, str]
UNSTABLE = 0.25  # of the stability index: commonly another population


def register(commands: Any) -> None:
    """Adds this command to the parser."""
    plan = commands.add_parser(
        "plan",
        usage="%(prog)s BUNDLE INPUT [options]",
        help="say what scoring a table would do, and how long it takes",
        description="Say what `mmray score` would do on this machine: reads every footer, and some rows as a run reads "
        "them. Writes nothing. Takes the flags of `mmray score`. A row that kills a process ends it, unlike a run.",
    )
    plan.add_argument("bundle", metavar="BUNDLE")
    plan.add_argument("table", metavar="INPUT", help="parquet file, folder or glob")
    plan.add_argument("--sample", type=int, default=256, metavar="N", help="rows looked at (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="print the forecast as JSON")
    add_score_options(plan)
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from mmray.errors import ConfigError
    from mmray.score.forecast import forecast

    if args.sample < 1:
        raise ConfigError(f"--sample: takes at least one row, got {args.sample}")
    found = forecast(args.bundle, args.table, score_config(args), args.sample, fresh=True)
    if args.json:
        print(json.dumps({**asdict(found), "drift": found.drift, "limit": found.limit}, indent=1))
        return
    for name, text in _lines(found):
        print(f"{name:<12} {text}")


def _lines(found: "Forecast") -> Iterator[Line]:
    columns = ", ".join(f"{column!r} ({name})" for name, column in found.columns.items())
    yield "table", f"{found.rows:,} rows in {found.slices:,} slices; {columns}"
    yield from _rows(found)
    yield from _drift(found)
    yield from _cost(found)
    yield from (("hint", hint) for hint in found.hints)


def _rows(found: "Forecast") -> Iterator[Line]:
    rows, bad = found.sample.rows, sum(found.reasons.values())
    yield "sample", f"{rows - bad:,} of {rows:,} rows ok"
    for reason, count in found.reasons.items():
        yield "", f"{count:>5,}  {reason}  {found.examples[reason]}"
    if found.image_kinds:
        yield "images", ", ".join(f"{count:,} {kind}" for kind, count in found.image_kinds.items())
    if "text" in found.columns:
        words = f"{found.sample.tokens / max(rows, 1):.1f} tokens a row, {found.sample.unknown_share:.0%} unknown"
        yield "texts", words + (f"; {found.trained_on.unknown_share:.0%} in training" if found.trained_on else "")
    if found.duplicates:
        yield "duplicates", f"{found.duplicates:,} rows have the cells of an earlier one"


def _drift(found: "Forecast") -> Iterator[Line]:
    if found.drift is None:
        yield "drift", "the bundle does not say what its training rows looked like"
        return
    told = "another population than that trained on" if found.drift > UNSTABLE else "as in training"
    yield "drift", f"stability index of the scores {found.drift:.2f}: {told}"


def _cost(found: "Forecast") -> Iterator[Line]:
    from mmray.progress import duration

    where = "on the GPU" if found.gpu_hours else "in the model"
    yield "a row", f"{found.prepare_ms:.2f} ms to read and decode, {found.predict_ms:.2f} ms {where}"
    how = "without Ray" if found.without_ray else "on Ray"
    need = f"{found.processes * found.process_bytes / 2**20:,.0f} of {found.memory / 2**20:,.0f} MiB"
    yield "processes", f"{found.processes}, {how}; memory at most {need}"
    yield "time", f"about {duration(found.seconds)} on this machine; {found.limit} takes most of it"
    gpu = f" and {found.gpu_hours:,.2f} GPU-hours" if found.gpu_hours else ""
    yield "a million", f"{found.core_hours:,.2f} core-hours{gpu}"
