"""`mmray demo`, `train`, `evaluate`, `compare` and `tune`: from rows to a bundle, and what it is worth."""

import argparse
import json
import os
import sys
from typing import Any

from mmray.commands.flags import add_placement, add_progress, local_folder, score_config
from mmray.config_file import load_config
from mmray.errors import ConfigError


def register(commands: Any) -> None:
    """Adds these commands to the parser."""
    _add_demo(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_tune(commands)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="train, evaluate, score, verify and report on real data, in a few minutes")
    demo.add_argument("--dir", default="mmray-demo", help="folder to work in (default: %(default)s)")
    _add_set(demo)
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from mmray.demo.run import run_demo

    run_demo(args.dir, args.set)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model and print its bundle's URI",
        description="Train a model as a TOML file says, and print the URI of its bundle: on a cluster, unless none is "
        "at hand, the rows are few (20,000), and one worker without a GPU is asked for.",
        epilog="Settings are sections and keys: [table] train, image_column, text_column, label_column; [task] kind; "
        "[model.fusion] kind; [train] epochs, num_workers. jobs/configs/ has ready files with comments; every key is "
        "described in mmray/config.py. A run that was interrupted continues with the same command.",
    )
    _add_config(train)
    add_progress(train)
    train.set_defaults(run=_train)


def _add_config(parser: Any) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="settings; relative paths are relative to this folder")
    _add_set(parser)


def _add_set(parser: Any) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting: --set train.epochs=3"
    )


def _train(args: argparse.Namespace) -> None:
    from mmray.progress import EpochProgress, epoch_line
    from mmray.train.job import train_model

    progress = EpochProgress(quiet=args.quiet)
    result = train_model(load_config(args.config, args.set), on_start=progress.start, on_epoch=progress.advance)
    if not result.trained_epochs:
        print("this run is finished already; another train.name or configuration starts a new one", file=sys.stderr)
    print(f"best epoch: {epoch_line(result.best)}", file=sys.stderr)
    print(result.bundle)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a bundle on a labelled table, fused and each modality alone",
        description="Measure a bundle on a labelled table in one pass: fused, each modality alone and the mean of "
        "these, by the modalities that rows have, and at other weights of the image where the fusion has one.",
    )
    evaluate.add_argument("bundle", metavar="BUNDLE")
    evaluate.add_argument("table", metavar="TABLE", help="parquet file, folder or glob")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="folder for metrics.json and report.html")
    evaluate.add_argument("--split", help="measure only rows with this value of the bundle's split column")
    evaluate.add_argument("--slice-by", metavar="C", help="column whose values group the rows, each group measured")
    add_placement(evaluate)
    add_progress(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from mmray.evaluate import evaluate_bundle
    from mmray.progress import row_progress
    from mmray.report import write_report
    from mmray.summary import evaluation_json, evaluation_report, evaluation_text

    folder = local_folder("--output", args.output)
    with row_progress(quiet=args.quiet) as progress:
        evaluation = evaluate_bundle(
            args.bundle,
            args.table,
            score_config(args),
            split=args.split,
            by=args.slice_by,
            on_start=lambda rows: progress.start("evaluating", rows),
            on_slice=progress.advance,
        )
    os.makedirs(folder, exist_ok=True)
    _write_json(os.path.join(folder, "metrics.json"), evaluation_json(evaluation))
    write_report(folder, evaluation_report(evaluation, args.bundle))
    print(evaluation_text(evaluation))
    print(os.path.join(folder, "report.html"))


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="train each kind of fusion with several seeds, and print what each is worth",
        description="Train each kind of fusion with several seeds on the same data and measure it: the main metric of "
        "the fused prediction, of each modality alone and of the mean of these, and the gain over the better modality.",
        epilog="A run is one of `mmray train`, named <train.name>-<kind>-<seed> below train.storage. The same command "
        "continues after an interruption; what is finished answers at once.",
    )
    _add_config(compare)
    compare.add_argument("--kinds", nargs="+", metavar="KIND", help="weighted_sum concat conv attention bilinear")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each kind (default: %(default)s)")
    compare.add_argument("--table", metavar="TABLE", help="labelled rows to measure on (default: the training table)")
    compare.add_argument("--split", help="measure only rows with this value of table.split_column")
    compare.add_argument("--json", metavar="FILE", help="file for the figures")
    compare.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    from mmray.compare import KINDS, compare_fusions, comparison_text, run_line

    config, kinds = load_config(args.config, args.set), args.kinds or KINDS
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ConfigError(f"--kinds: no fusion is called {', '.join(unknown)}; there are {', '.join(KINDS)}")
    found = compare_fusions(
        config,
        kinds,
        args.seeds,
        table=args.table,
        split=args.split,
        on_run=lambda run: print(run_line(run), file=sys.stderr),
    )
    print(comparison_text(found))
    _write_json(args.json, found)


def _write_json(path: str | None, found: dict[str, Any]) -> None:
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="try other settings, stop what is hopeless early, and print the best",
        description="Train with other settings, the configuration's own first; stop trials early whose validation loss "
        "is not among the better third by then (asynchronous successive halving). Prints all trials, the best settings "
        "as flags of `mmray train`, and last the best trial's bundle.",
        epilog="Knobs, with their values in mmray/knobs.py: learning_rate weight_decay dropout word_dropout "
        "auxiliary_weight (these by default), modality_dropout batch_size width alpha. A trial is a run of `mmray "
        "train`, named <train.name>-<trial> below train.storage. The same command continues after an interruption, and "
        "more --trials add to those that are done. The best of many on the validation rows looks better there than it "
        "is: measure its bundle on other rows with `mmray evaluate`.",
    )
    _add_config(tune)
    tune.add_argument("--trials", type=int, default=20, metavar="N", help="how many (default: %(default)s)")
    tune.add_argument("--knobs", nargs="+", default=[], metavar="KNOB", help="what to vary (default: see below)")
    tune.add_argument("--parallel", type=int, default=1, metavar="N", help="trials at a time (default: %(default)s)")
    tune.add_argument("--json", metavar="FILE", help="file for the figures")
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> None:
    from mmray.progress import epoch_line
    from mmray.tune import trial_line, tune, tuning_text

    found = tune(
        load_config(args.config, args.set),
        args.trials,
        args.knobs,
        parallel=args.parallel,
        on_epoch=lambda entry: print(f"trial {entry.pop('trial')}, {epoch_line(entry)}", file=sys.stderr),
        on_trial=lambda trial: print(trial_line(trial), file=sys.stderr),
    )
    _write_json(args.json, found)
    print(tuning_text(found))
    print(found["trials"][0]["bundle"])
