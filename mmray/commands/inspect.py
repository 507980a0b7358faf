"""`mmray inspect` and `explain-row`: what a bundle is, and why a row got what it got."""

import argparse
import json
from typing import Any

SHOWN_LABELS = 8
LOSSES = ("train_loss", "validation_loss")


def register(commands: Any) -> None:
    """Adds these commands to the parser."""
    _add_inspect(commands)
    _add_explain(commands)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a bundle is: model, labels, what it was trained on and how well it did",
        description="Say what a bundle is: reads bundle.json and the sizes of the files, and loads no model.",
    )
    inspect.add_argument("bundle", metavar="BUNDLE")
    inspect.add_argument("--json", action="store_true", help="print all that it says, every setting included, as JSON")
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from mmray.bundle_info import read_info
    from mmray.store import open_store

    info = read_info(args.bundle)
    sizes = {name: entry.size for name, entry in open_store(args.bundle).list().items()}
    if args.json:
        found = {"fingerprint": info.fingerprint, "labels": info.labels, "score_range": info.score_range}
        print(
            json.dumps({**found, "bytes": sizes, "metrics": info.metrics, "config": info.config.model_dump()}, indent=1)
        )
        return
    for name, text in _lines(info, sizes):
        print(f"{name:<12} {text}")


def _lines(info: Any, sizes: dict[str, int]) -> list[tuple[str, str]]:
    config = info.config
    encoder, side = config.model.image_encoder, config.image.size
    about = {
        "image": f"{getattr(encoder, 'name', encoder.kind)} on {side} x {side} pixels",
        "text": f"{config.model.text_encoder.kind} over at most {config.text.max_tokens} tokens",
    }
    columns = {name: getattr(config.table, f"{name}_column") for name in config.table.modalities}
    return [
        ("fingerprint", info.fingerprint),
        ("task", _task(info)),
        *((name, f"{about[name]}; column {column!r}") for name, column in columns.items()),
        ("fusion", config.model.fusion.kind),
        *_training(info.metrics),
        ("size", f"{sum(sizes.values()) / 2**20:,.1f} MiB in {len(sizes)} files"),
    ]


def _training(metrics: Any) -> list[tuple[str, str]]:
    """Returns what training said; nothing of a bundle that was made otherwise."""
    if "validation" not in metrics:
        return []
    best = metrics["validation"]
    values = {name: value for name, value in best.items() if isinstance(value, float) and name not in LOSSES}
    measured = [f"{name} {value:.3f}" for name, value in values.items()]
    return [
        ("trained on", f"{metrics['train_rows']:,} rows, epoch {best['epoch']} of {len(metrics['history'])}"),
        ("validation", f"{metrics['validation_rows']:,} rows: {', '.join(measured)}"),
    ]


def _task(info: Any) -> str:
    kind, labels = info.config.task.kind, info.labels
    if not labels:
        return str(kind)
    more = f" and {len(labels) - SHOWN_LABELS} more" if len(labels) > SHOWN_LABELS else ""
    return f"{kind}, {len(labels)} labels: {', '.join(labels[:SHOWN_LABELS])}{more}"


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain-row",
        help="score one row of an output again, stage by stage",
        description="Score one row again and say what each stage makes of it: what was read, what the model sees of "
        "it, the score, and that of each modality alone.",
    )
    explain.add_argument("output", metavar="OUTPUT")
    explain.add_argument("row", metavar="FILE:ROW", help="as `mmray errors` names it, or any other of OUTPUT/data")
    explain.add_argument("--bundle", metavar="BUNDLE", help="where the bundle is now (default: where the run had it)")
    explain.add_argument("--picture", metavar="FILE", help="write the image as the model sees it, as a JPEG")
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> None:
    from mmray.score.explain import explain_row

    for stage, text in explain_row(args.output, args.row, args.bundle, args.picture):
        print(f"{stage:<12} {text}")
