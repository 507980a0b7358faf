"""Tuning: trials with other settings, hopeless ones stopped early, and the best of them.

Reads a `Config` -> gives every trial with its settings and what it came to on the validation rows. A trial is a run of
`mmray.train` with a name of its own, so what is finished is not done again and what was interrupted continues.

Not Ray Tune: it keeps and reopens its state as pickles, it stops a trial by ending its process, before there is a
bundle, and it takes neither relative paths nor `az://`. What it would do here is `cutoffs`, ten lines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from mmray.bundle_info import read_info
from mmray.cluster import RAY_ERRORS, cluster, unwrap
from mmray.config import Config
from mmray.config_file import parse_config
from mmray.errors import ConfigError, DivergenceError
from mmray.knobs import chosen, sampled
from mmray.machine import local_cpus
from mmray.metrics import PRIMARY
from mmray.store import open_store
from mmray.train.data import check_label_column, open_tables
from mmray.train.job import TrainResult, check_gpu_request, train_model
from mmray.train.task import with_task
from mmray.train.trainer import News, OnEpoch, news

REDUCTION = 3  # of the trials at a rung, one in so many goes on (eta in Li et al. 2020)
RUNGS = 2  # below the last epoch: a ninth of the epochs tells something, less is noise
LOSS = "validation_loss"
Trial = dict[str, Any]
"""`trial` (its number), `settings` by key, `epochs` done and `of` how many, `best` (the history's entry), `metric`
(the name of the main one), `history`, `bundle`; or `diverged`, a message, in place of what follows the settings."""


def tune(
    config: Config,
    trials: int,
    knobs: Sequence[str] = (),
    *,
    parallel: int = 1,
    on_epoch: OnEpoch = lambda entry: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> dict[str, Any]:
    """Tries settings, the configuration's own as trial 0.

    Args:
        config: settings of all trials but for the knobs.
        trials: how many, the first included; a larger number adds to those that are done.
        knobs: names of `mmray.knobs.KNOBS`; without any, those of its `USUAL` that do something here.
        parallel: trials at a time. Those that run at the same time are not held against each other.
        on_epoch: called with the history's entry of each epoch as it ends, and the `trial`'s number in it.
        on_trial: called with each trial as it ends, or is found done.

    Returns:
        `metric`, `knobs`, and `trials` with the best one first: the one with the lowest validation loss of an epoch.

    Raises:
        MmrayError: see `mmray.errors` for what each means and its exit code.
    """
    if trials < 1 or parallel < 1:
        raise ConfigError(f"--trials {trials}, --parallel {parallel}: give 1 or more")
    knobs = chosen(config, knobs)
    settings = sampled(config, knobs, trials)
    configs = [variant(config, number, settings[number]) for number in range(trials)]
    table = open_tables(config).train
    check_label_column(with_task(config, table), table)
    check_gpu_request(config)
    done = {number: train_model(configs[number]) for number in range(trials) if _has_bundle(configs[number])}
    found = [_trial(number, settings[number], result) for number, result in done.items()]
    for trial in found:
        on_trial(trial)
    left = [number for number in range(trials) if number not in done]
    if left:
        with cluster(max(parallel * config.train.max_workers, local_cpus())), news(on_epoch) as told:
            running: dict[Any, int] = {}
            while left or running:
                while left and len(running) < parallel:
                    number = left.pop(0)
                    running[_train.remote(configs[number], cutoffs(found), told, number)] = number
                (ready, *_), _ = ray.wait(list(running))
                found.append(_trial(running[ready], settings[running.pop(ready)], _result(ready)))
                on_trial(found[-1])
    if all("diverged" in trial for trial in found):
        raise DivergenceError(f"every trial diverged; the first: {found[0]['diverged']}")
    ordered = sorted(found, key=_order)
    return {"metric": ordered[0]["metric"], "knobs": list(knobs), "trials": ordered}


def variant(config: Config, number: int, settings: Mapping[str, Any]) -> Config:
    """Returns the configuration of one trial: with its own name and settings."""
    raw = config.model_dump()
    for key, value in {**settings, "train.name": f"{config.train.name or 'tune'}-{number}"}.items():
        *sections, name = key.split(".")
        node = raw
        for section in sections:
            node = node[section]
        node[name] = value
    return parse_config(raw, f"trial {number}")


def cutoffs(trials: Sequence[Trial]) -> dict[int, float]:
    """Returns the validation loss by epoch above which a trial that comes after these is stopped.

    Asynchronous successive halving (Li et al. 2020, "A system for massively parallel hyperparameter tuning"): at each
    rung, an epoch, one in `REDUCTION` of the trials that came so far goes on. The rungs are a ninth and a third of the
    epochs, rounded up.
    """
    known = [trial for trial in trials if "diverged" not in trial]
    epochs = max((trial["of"] for trial in known), default=0)
    found = {}
    for rung in {math.ceil(epochs / REDUCTION**k) for k in range(1, RUNGS + 1)} - {epochs}:
        losses = [trial["history"][rung - 1][LOSS] for trial in known if trial["epochs"] >= rung]
        losses = sorted(loss for loss in losses if math.isfinite(loss))
        if len(losses) >= REDUCTION:  # fewer say nothing
            found[rung] = losses[(len(losses) + 1) // REDUCTION - 1]
    return found


@ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")
def _train(config: Config, cutoffs: dict[int, float], told: News, number: int) -> TrainResult | str:
    try:
        return train_model(config, cutoffs=cutoffs, on_epoch=lambda entry: told.tell({"trial": number, **entry}))
    except DivergenceError as error:
        return str(error)


def _result(reference: Any) -> TrainResult | str:
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except RAY_ERRORS as error:
        raise unwrap(error, "tuning") from error


def _has_bundle(config: Config) -> bool:
    folder = open_store(config.train.storage).child(str(config.train.name))
    return open_store(f"{folder}/bundle").stat("bundle.json") is not None


def _trial(number: int, settings: Mapping[str, Any], result: TrainResult | str) -> Trial:
    trial = {"trial": number, "settings": dict(settings)}
    if isinstance(result, str):
        return {**trial, "diverged": result}
    if not math.isfinite(result.best[LOSS]):
        return {**trial, "diverged": f"its {LOSS} is {result.best[LOSS]}"}
    settled = read_info(result.bundle).config  # the task and the number of epochs may have been left open
    done = {"epochs": len(result.history), "of": settled.train.epochs, "best": result.best}
    done["metric"] = PRIMARY[settled.task.kind]
    return {**trial, **done, "history": result.history, "bundle": result.bundle}


def _order(trial: Trial) -> tuple[float, int]:
    return (math.inf if "diverged" in trial else trial["best"][LOSS], trial["trial"])


def trial_line(trial: Trial) -> str:
    """Returns one line on a trial that has ended."""
    if "diverged" in trial:
        return f"trial {trial['trial']} diverged: {trial['diverged']}"
    how = "" if trial["epochs"] == trial["of"] else f", stopped after {trial['epochs']} of {trial['of']} epochs"
    return f"trial {trial['trial']}: {LOSS} {trial['best'][LOSS]:.4f}{how}"


def tuning_text(found: Mapping[str, Any]) -> str:
    """Returns the trials as an aligned table, the best first, and the flags that train with its settings."""
    trials, metric = found["trials"], found["metric"]
    heads = ["trial", LOSS, metric, "epochs", *found["knobs"]]
    rows = [heads, *(_cells(trial, metric) for trial in trials)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    flags = " ".join(f"--set {key}={value}" for key, value in trials[0]["settings"].items())
    return "\n".join([*lines, f"best: trial {trials[0]['trial']}, {flags}"])


def _cells(trial: Trial, metric: str) -> list[str]:
    settings = [str(value) for value in trial["settings"].values()]
    if "diverged" in trial:
        return [str(trial["trial"]), "diverged", "-", "-", *settings]
    figures = ["-" if trial["best"][name] is None else f"{trial['best'][name]:.4f}" for name in (LOSS, metric)]
    return [str(trial["trial"]), *figures, f"{trial['epochs']}/{trial['of']}", *settings]
