"""The command line. Each command calls one function of the library, shows how far it is, and exits with a code.

0 done; 2 a mistake in what was given; 3 the output belongs to another run; 4 verification found a mismatch; 5 the
machine, cluster or store failed (the same command resumes); 6 too many failed rows; 130 interrupted (resumes too).
"""

import argparse
import faulthandler
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mmray import __version__
from mmray.config import ScoreConfig, Section, load_config
from mmray.errors import ConfigError, MmrayError

INTERRUPTED = 130
S = TypeVar("S", bound=Section)


def run() -> None:
    """Is the `mmray` command: `main` in a process of its own."""
    _keep_stderr_for_python()
    sys.exit(main())


def _keep_stderr_for_python() -> None:
    """Leaves the terminal to our own messages: Ray's core and image decoders write to descriptor 2 behind our back."""
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
    except KeyboardInterrupt:
        print("mmray: interrupted; the same command continues where it stopped", file=sys.stderr)
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_score(commands)
    _add_tick(commands)
    _add_published(commands)
    _add_verify(commands)
    _add_errors(commands)
    _add_serve(commands)
    _add_parity(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="train, evaluate, score, verify and report on real data, in two minutes")
    demo.add_argument("--dir", default="mmray-demo", help="folder to work in (default: %(default)s)")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from mmray.demo.run import run_demo

    run_demo(args.dir)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model and print its bundle's URI",
        description="Train a model as a TOML file says, and print the URI of its bundle.",
        epilog="Settings are sections and keys: [table] train, image_column, text_column, label_column; [task] kind; "
        "[model.fusion] kind; [train] epochs, num_workers. jobs/configs/ has ready files with comments; every key is "
        "described in mmray/config.py. A run that was interrupted continues with the same command.",
    )
    train.add_argument("config", metavar="CONFIG.toml", help="settings; relative paths are relative to this folder")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting: --set train.epochs=3"
    )
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from mmray.train.job import train_model

    config = load_config(args.config, args.set)
    result = train_model(config, on_epoch=lambda entry: print(epoch_line(entry), file=sys.stderr))
    if not result.trained_epochs:
        print("this run is finished already; another train.name or configuration starts a new one", file=sys.stderr)
    print(f"best epoch: {epoch_line(result.best)}", file=sys.stderr)
    print(result.bundle)


def epoch_line(entry: dict[str, Any]) -> str:
    """Returns one line on an epoch of training."""
    values = (f"{name} {value:.4f}" for name, value in entry.items() if name != "epoch" and value is not None)
    return f"epoch {entry['epoch']:>3}: " + ", ".join(values)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="measure a bundle on a labelled table, fused and each modality alone"
    )
    evaluate.add_argument("bundle", metavar="BUNDLE")
    evaluate.add_argument("table", metavar="TABLE", help="parquet file, folder or glob")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="folder for metrics.json and report.html")
    evaluate.add_argument("--split", help="measure only rows with this value of the bundle's split column")
    _add_placement(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from mmray.evaluate import evaluate_bundle
    from mmray.report import write_report
    from mmray.store import split_uri
    from mmray.summary import evaluation_report, metrics_table

    scheme, folder = split_uri(args.output)
    if scheme != "file":
        raise ConfigError(f"--output {args.output} is no folder of this machine; give one, and copy it from there")
    evaluation = evaluate_bundle(args.bundle, args.table, _score_config(args), split=args.split)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "metrics.json"), "w", encoding="utf-8") as file:
        json.dump(
            {"rows": evaluation.rows, "skipped": evaluation.skipped, "metrics": evaluation.metrics}, file, indent=1
        )
    write_report(folder, evaluation_report(evaluation, args.bundle))
    print(metrics_table(evaluation))
    print(os.path.join(folder, "report.html"))


def _add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="score every row of a table, once",
        description="Score a table into OUTPUT/data/*.parquet; OUTPUT/_SUCCESS says that every row is there. "
        "The same command resumes a run that was interrupted, and is quick where there is nothing left to do.",
    )
    score.add_argument("bundle", metavar="BUNDLE")
    score.add_argument("table", metavar="INPUT", help="parquet file, folder or glob")
    score.add_argument("output", metavar="OUTPUT", help="folder that is new or of the same run")
    _add_score_options(score)
    score.set_defaults(run=_score)


def _add_score_options(parser: Any) -> None:
    _add_placement(parser)
    parser.add_argument("--probabilities", action="store_true", help="add the probability of every label")
    parser.add_argument("--slice-rows", type=int, metavar="N", help="rows per output file at most")
    parser.add_argument("--max-error-rate", type=float, metavar="X", help="share of rows that may fail (default: any)")


def _add_columns(parser: Any) -> None:
    parser.add_argument("--image-root", action="append", metavar="DIR", help="where images may lie; repeatable")
    parser.add_argument("--image-column", metavar="C", help="default: the one trained on")
    parser.add_argument("--text-column", metavar="C", help="default: the one trained on")


def _add_placement(parser: Any) -> None:
    _add_columns(parser)
    parser.add_argument("--actors", type=int, metavar="N", help="processes (default: one per CPU, or per GPU)")
    parser.add_argument("--gpus", type=float, metavar="N", help="GPUs of each process, or a fraction (default: 0)")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="default: fp32")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows per forward pass (default: 32)")
    parser.add_argument("--decode-threads", type=int, metavar="N", help="per process (default: 1)")


def _score_config(args: argparse.Namespace) -> ScoreConfig:
    return _settings(ScoreConfig, args, {"image_root": "image_roots", "actors": "num_actors", "gpus": "gpus_per_actor"})


def _settings(kind: type[S], args: argparse.Namespace, fields: Mapping[str, str], **more: Any) -> S:
    """Returns the settings that a command's flags give; a wrong one is named as it was typed.

    Args:
        fields: flag -> field, where the two have different names.
        more: settings that no flag gives.
    """
    from pydantic import ValidationError

    given = {fields.get(key, key): value for key, value in vars(args).items() if value is not None}
    try:
        return kind(**{key: value for key, value in given.items() if key in kind.model_fields}, **more)
    except ValidationError as error:
        item = error.errors()[0]
        if not item["loc"]:
            raise ConfigError(item["msg"].removeprefix("Value error, ")) from None
        name = str(item["loc"][0])
        flag = {field: flag for flag, field in fields.items()}.get(name, name).replace("_", "-")
        raise ConfigError(f"--{flag}: {item['msg']}, got {item['input']!r}") from None


def _score(args: argparse.Namespace) -> None:
    from mmray.progress import row_progress
    from mmray.score.job import score_table

    with row_progress() as progress:
        result = score_table(
            args.bundle,
            args.table,
            args.output,
            _score_config(args),
            on_start=lambda plan, done: progress.start("scoring", plan.num_rows, done),
            on_slice=lambda ledger: progress.advance(ledger.rows),
        )
    print("\n".join([*result.lines(), os.path.join(args.output, "data")]))


def _add_tick(commands: Any) -> None:
    tick = commands.add_parser(
        "tick",
        help="score what is new in a table, and publish the whole",
        description="One tick of a schedule: score the files of TABLE that are new or changed since what is published "
        "under ROOT, or all of them for a new model, and publish the whole under the next number. Safe to run twice, "
        "late, or at the same time as another.",
    )
    tick.add_argument("bundle", metavar="BUNDLE")
    tick.add_argument("table", metavar="TABLE", help="parquet file, folder or glob")
    tick.add_argument("root", metavar="ROOT", help="folder or URI for runs and published lists")
    tick.add_argument("--full", action="store_true", default=None, help="score every file again")
    tick.add_argument(
        "--retry-failed", action="store_true", default=None, help="score files again that have a row that is not ok"
    )
    tick.add_argument("--min-rows", type=int, metavar="N", help="publish no fewer rows (default: 1)")
    tick.add_argument("--max-drift", type=float, metavar="PSI", help="publish no new scores that drift more")
    tick.add_argument("--keep", type=int, metavar="N", help="published lists that stay (default: 7)")
    tick.add_argument("--lease-s", type=float, metavar="S", help="a tick silent for so long is dead (default: 60)")
    _add_score_options(tick)
    tick.set_defaults(run=_tick)


def _tick(args: argparse.Namespace) -> None:
    from mmray.config import ScheduleConfig
    from mmray.progress import row_progress
    from mmray.schedule.tick import tick

    with row_progress() as progress:
        result = tick(
            args.bundle,
            args.table,
            args.root,
            _score_config(args),
            _settings(ScheduleConfig, args, {}),
            on_start=lambda plan, done: progress.start("scoring", plan.num_rows, done),
            on_slice=lambda ledger: progress.advance(ledger.rows),
        )
    print("\n".join(result.lines()))


def _add_published(commands: Any) -> None:
    published = commands.add_parser("published", help="list the scored files that are published under a root")
    published.add_argument("root", metavar="ROOT")
    published.set_defaults(run=_published)


def _published(args: argparse.Namespace) -> None:
    from mmray.schedule.published import read_published

    print("\n".join(read_published(args.root).files(args.root)))


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove that an output holds every row of its input",
        description="0: files and manifest agree. 1: every footer too. 2: every input row stands there, in order.",
    )
    verify.add_argument("output", metavar="OUTPUT")
    verify.add_argument("--level", type=int, choices=[0, 1, 2], default=1, help="default: %(default)s")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from mmray.errors import VerifyError
    from mmray.score.verify import verify_output

    report = verify_output(args.output, args.level)
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

    counts: Counter[str] = Counter()
    for problem in problems(args.output, args.column, args.reason):
        if counts.total() < args.limit:
            extra = "".join(f"  {name}={value!r}" for name, value in problem.cells.items())
            print(f"{problem.key}:{problem.row}  {problem.status}  {problem.detail}{extra}")
        counts[f"{problem.status:<9} {problem.reason}"] += 1
    if counts.total() > args.limit:
        print(f"... and {counts.total() - args.limit:,} more; --limit shows more, --reason one kind")
    for name, count in counts.most_common():
        print(f"{count:>12,}  {name}")
    if not counts:
        print("every row is ok" if args.reason is None else f"no row has the reason {args.reason}")


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP with the same scores",
        description="Answer POST /v1/score with the predictor that scores tables. MMRAY_TOKEN in the environment asks "
        "every request for that bearer token. Ctrl-C ends it.",
    )
    serve.add_argument("bundle", metavar="BUNDLE")
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    serve.add_argument("--port", type=int, help="default: 8000")
    serve.add_argument("--replicas", type=int, metavar="N", help="processes (default: 1)")
    serve.add_argument("--gpus", type=float, metavar="N", help="GPUs of each (default: 0)")
    serve.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="default: fp32")
    serve.add_argument(
        "--image-root",
        action="append",
        metavar="DIR",
        help="let requests name images in this folder; repeatable (default: uploads only)",
    )
    serve.add_argument("--max-items", type=int, metavar="N", help="most items in a request (default: 64)")
    serve.add_argument("--tls-cert", metavar="PEM", help="answer over HTTPS, with this certificate")
    serve.add_argument("--tls-key", metavar="PEM", help="the certificate's private key")
    serve.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="let pages of this origin call from a browser; repeatable (default: none)",
    )
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from mmray.serve.app import serve_forever

    def on_ready(url: str, metrics: str) -> None:
        print(f"ready at {url}; metrics for Prometheus at {metrics}", flush=True)

    serve_forever(args.bundle, _serve_config(args), on_ready=on_ready)


def _serve_config(args: argparse.Namespace) -> Any:
    from mmray.serve.settings import ServeConfig

    fields = {
        "image_root": "image_roots",
        "cors_origin": "cors_origins",
        "replicas": "num_replicas",
        "gpus": "gpus_per_replica",
    }
    return _settings(ServeConfig, args, fields, token=os.environ.get("MMRAY_TOKEN") or None)


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
    _add_columns(parity)
    parity.set_defaults(run=_parity)


def _parity(args: argparse.Namespace) -> None:
    from mmray.errors import VerifyError
    from mmray.parity import compare_paths

    broken = []
    for parity in compare_paths(args.bundle, args.table, _score_config(args), args.rows):
        other = f"   {parity.other_rows:,} rows with another label, status or reason" if parity.other_rows else ""
        print(f"{parity.path:<34} largest difference {parity.largest_difference:.2e}{other}", flush=True)
        broken += [] if parity.holds else [parity.path]
    if broken:
        raise VerifyError(f"the same rows get other scores by: {', '.join(broken)}")


if __name__ == "__main__":
    run()
