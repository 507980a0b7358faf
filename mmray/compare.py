"""Ways to fuse, compared on the same data: each trained with several seeds, measured, and put in one table.

Reads a `Config` and a labelled table -> gives the main metric of each view by fusion, as mean and standard deviation
over the seeds. Runs have names of their own, so what is finished is not done again.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from mmray.bundle_info import read_info
from mmray.cluster import cluster
from mmray.config import Config
from mmray.errors import ConfigError
from mmray.evaluate import LATE, evaluate_bundle
from mmray.labelled import FUSED
from mmray.machine import local_cpus
from mmray.metrics import PRIMARY
from mmray.slices import open_table
from mmray.store import open_parent
from mmray.train.data import open_tables
from mmray.train.job import train_model
from mmray.train.place import runs_here

KINDS = ("weighted_sum", "concat", "conv", "attention", "bilinear")
VIEWS = (FUSED, "image only", "text only", LATE)
GAIN = "gain"
Spread = tuple[float, float]
"""Mean and sample standard deviation."""


def compare_fusions(
    config: Config,
    kinds: Sequence[str],
    seeds: int,
    *,
    table: str | None = None,
    split: str | None = None,
    on_run: Callable[[dict[str, Any]], None] = lambda run: None,
) -> dict[str, Any]:
    """Trains and measures each kind of fusion with the seeds 0, 1, ...

    Args:
        config: settings of all runs; the settings of its own fusion are kept for that kind.
        kinds: some of `KINDS`.
        seeds: runs of each kind, at least one.
        table: labelled rows to measure on; the training table by default, and then a split of it.
        split: value of the split column that rows must have.
        on_run: called with each run as it is done.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    if table is None and split is None:
        raise ConfigError(
            "on its training table a model would be measured by what it knows by heart; give --split or --table"
        )
    if split is not None and config.table.split_column is None:
        raise ConfigError("--split needs table.split_column in the configuration; set it, or give --table")
    if seeds < 1:
        raise ConfigError(f"--seeds: {seeds} runs are none to compare; give 1 or more")
    table = table or config.table.train
    open_table(table, [config.table.label_column])  # what is wrong with it shows before hours of training
    runs = []
    here = runs_here(config, open_tables(config))
    with nullcontext() if here else cluster(max(config.train.max_workers, local_cpus())):
        for kind in kinds:
            for seed in range(seeds):
                runs.append(_run(variant(config, kind, seed), kind, table, split))
                on_run(runs[-1])
    return {"table": table, "split": split, "summary": summarised(runs), "runs": runs}


def variant(config: Config, kind: str, seed: int) -> Config:
    """Returns the configuration of one run: with its own name, seed and fusion."""
    raw = config.model_dump()
    if raw["model"]["fusion"]["kind"] != kind:
        raw["model"]["fusion"] = {"kind": kind}
    raw["train"] |= {"seed": seed, "name": f"{config.train.name or 'compare'}-{kind}-{seed}"}
    return Config.model_validate(raw)


def _run(config: Config, kind: str, table: str, split: str | None) -> dict[str, Any]:
    """Returns the metrics of one run; what was trained or measured before is read from the run's folder."""
    bundle = train_model(config).bundle
    files = [[file.uri, file.size, file.version] for file in open_table(table, ()).files]
    digest = hashlib.sha256(json.dumps([files, split, read_info(bundle).fingerprint]).encode()).hexdigest()
    store, _ = open_parent(bundle)
    name = f"evaluation-{digest[:12]}.json"
    if store.stat(name) is None:
        measured = evaluate_bundle(bundle, table, split=split)
        run = {"fusion": kind, "seed": config.train.seed, "bundle": bundle, "rows": measured.rows}
        run["metric"] = PRIMARY[measured.info.config.task.kind]
        store.create(name, json.dumps({**run, "metrics": measured.metrics}, indent=1).encode())
    found: dict[str, Any] = json.loads(store.read(name))
    return found


def _main_metric(run: Mapping[str, Any]) -> dict[str, float | None]:
    return {view: run["metrics"].get(view, {}).get(run["metric"]) for view in VIEWS}


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Spread | None]]:
    """Returns fusion -> view or `gain` -> spread over the seeds; None without a value.

    The gain is that of the fused prediction over the better single modality of the same run.
    """
    found: dict[str, dict[str, Spread | None]] = {}
    for kind in dict.fromkeys(run["fusion"] for run in runs):
        values = [_main_metric(run) for run in runs if run["fusion"] == kind]
        found[kind] = {view: _spread([row[view] for row in values]) for view in VIEWS}
        found[kind][GAIN] = _spread([_gain(row) for row in values])
    return found


def _gain(row: Mapping[str, float | None]) -> float | None:
    single = [value for view in VIEWS[1:3] if (value := row[view]) is not None]
    fused = row[FUSED]
    return fused - max(single) if single and fused is not None else None


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def run_line(run: Mapping[str, Any]) -> str:
    """Returns one line on a run."""
    values = ", ".join(f"{view} {value:.4f}" for view, value in _main_metric(run).items() if value is not None)
    return f"{run['fusion']}, seed {run['seed']}: {run['metric']} {values}"


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison as an aligned table."""
    runs, names = comparison["runs"], (*VIEWS, GAIN)
    seeds = len({run["seed"] for run in runs})
    lines = [
        f"{runs[0]['metric']} on {runs[0]['rows']:,} rows, mean and standard deviation of {seeds} seeds",
        f"{'fusion':<14}" + "".join(f"{name:>17}" for name in names),
    ]
    for kind, values in comparison["summary"].items():
        texts = ["-" if values[name] is None else "{:.3f} +- {:.3f}".format(*values[name]) for name in names]
        lines.append(f"{kind:<14}" + "".join(f"{text:>17}" for text in texts))
    return "\n".join(lines)
