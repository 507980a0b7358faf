"""Tuning: what is tried, who is stopped, what is not done twice, and what a user reads."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import ray
from models import colour_table, small_bundle, small_config

from mmray.bundle import load_bundle, save_bundle
from mmray.cli import main
from mmray.config import Config
from mmray.config_file import load_config
from mmray.errors import ConfigError
from mmray.knobs import KNOBS, USUAL, chosen, sampled
from mmray.train.job import train_model
from mmray.tune import cutoffs, tune, variant


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_table(tmp_path_factory.mktemp("rows"), rows=120)


def trial(*losses: float, of: int) -> dict[str, Any]:
    return {"epochs": len(losses), "of": of, "history": [{"validation_loss": loss} for loss in losses]}


def finish(config: Config, number: int, settings: dict[str, Any], *losses: float) -> None:
    """Leaves a trial as one that has ended, an accuracy of 1 - loss in each epoch."""
    config = variant(config, number, settings)
    history = [{"epoch": k, "validation_loss": loss, "accuracy": 1 - loss} for k, loss in enumerate(losses, 1)]
    bundle = small_bundle(config)
    object.__setattr__(bundle, "metrics", {"history": history})
    save_bundle(bundle, f"{config.train.storage}/{config.train.name}/bundle")


def test_the_configuration_comes_first_and_the_trials_before_do_not_change_with_their_number() -> None:
    config = small_config()
    few, many = sampled(config, USUAL, 3), sampled(config, USUAL, 12)
    train = config.train
    assert few[0] == {
        "train.learning_rate": train.learning_rate, "train.weight_decay": train.weight_decay, "model.dropout": 0.1,
        "train.word_dropout": train.word_dropout, "train.auxiliary_weight": train.auxiliary_weight,
    }  # fmt: skip
    assert many[:3] == few
    assert len({json.dumps(settings) for settings in many}) == 12
    other = variant(config, 2, few[2])
    assert (other.train.name, other.train.learning_rate) == ("tune-2", few[2]["train.learning_rate"])
    assert other.model.image_encoder == config.model.image_encoder


@pytest.mark.parametrize("name", KNOBS)
def test_every_value_of_a_knob_is_one_that_a_model_can_have(name: str) -> None:
    knob = KNOBS[name]
    values = [knob.value(share) for share in (0.0, 0.3, 0.5, 0.7, 0.999999)]
    assert len(set(values)) > 2
    section, *_, setting = knob.key.split(".")
    for value in values:
        raw = variant(small_config(), 1, {knob.key: value}).model_dump()[section]
        assert raw.get("fusion", {}).get(setting, raw.get(setting)) == value
        assert len(str(value)) <= 8, "it can be typed"


def test_points_fill_the_range_of_a_knob_evenly() -> None:
    rates = sorted(settings["train.learning_rate"] for settings in sampled(small_config(), ["learning_rate"], 9)[1:])
    assert [sum(low <= rate < low * 33.34**0.25 for rate in rates) for low in (3e-4, 7.2e-4, 1.74e-3, 4.17e-3)] == [
        2
    ] * 4


def test_a_knob_that_is_unknown_or_does_nothing_is_refused_or_left_out(rows: Path) -> None:
    pictures = small_config(table={"text_column": None})
    assert chosen(pictures, []) == ["learning_rate", "weight_decay", "dropout"]
    with pytest.raises(ConfigError, match=r"train.word_dropout does nothing in this configuration"):
        chosen(pictures, ["word_dropout"])
    concat = small_config(model={**small_config().model.model_dump(), "fusion": {"kind": "concat"}})
    with pytest.raises(ConfigError, match=r"model.fusion.alpha does nothing in this configuration; leave alpha out"):
        tune(concat, 2, ["dropout", "alpha"])
    with pytest.raises(ConfigError, match="there is no 'learning_rates'; did you mean 'learning_rate'"):
        tune(concat, 2, ["learning_rates"])
    with pytest.raises(ConfigError, match="--trials 0, --parallel 1: give 1 or more"):
        tune(concat, 0)


def test_at_a_ninth_and_a_third_of_the_epochs_one_trial_in_three_goes_on() -> None:
    long = [trial(*[loss - k / 100 for k in range(18)], of=18) for loss in (0.9, 0.7, 0.8)]
    assert cutoffs(long[:2]) == {}, "two others say nothing"
    assert cutoffs(long) == pytest.approx({2: 0.69, 6: 0.65})
    stopped = [trial(0.95, 0.75, of=18), trial(0.95, 0.5, of=18)]
    assert cutoffs([*long, *stopped]) == pytest.approx({2: 0.69, 6: 0.65}), "the second best of five"
    assert cutoffs([*long, {"diverged": "a loss that is no number"}]) == cutoffs(long)
    assert cutoffs([*long, trial(math.nan, math.nan, of=18)]) == cutoffs(long)
    assert set(cutoffs([trial(0.5, 0.4, of=2)] * 3)) == {1}
    assert cutoffs([trial(0.5, of=1)] * 3) == {}


def test_what_is_finished_answers_at_once_as_a_table_with_flags_and_a_bundle(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        f'[table]\ntrain = "{rows}"\n[train]\nstorage = "{tmp_path}"\nepochs = 3\n[task]\nkind = "multiclass"\n'
    )
    config = load_config(str(recipe))
    settings = sampled(config, ["dropout", "width"], 4)
    for number, losses in enumerate([(0.7, 0.5, 0.6), (0.6, 0.25, 0.3), (math.nan,), (0.8,)]):
        finish(config, number, settings[number], *losses)
    figures = tmp_path / "figures.json"
    flags = ["--trials", "4", "--knobs", "dropout", "width", "--json", str(figures)]
    assert main(["tune", str(recipe), *flags]) == 0
    assert not ray.is_initialized()
    said = capsys.readouterr()
    dropout, width = settings[1]["model.dropout"], settings[1]["model.width"]
    assert [line.split() for line in said.out.splitlines()] == [
        ["trial", "validation_loss", "accuracy", "epochs", "dropout", "width"],
        ["1", "0.2500", "0.7500", "3/3", str(dropout), str(width)],
        ["0", "0.5000", "0.5000", "3/3", *map(str, settings[0].values())],
        ["3", "0.8000", "0.2000", "1/3", *map(str, settings[3].values())],
        ["2", "diverged", "-", "-", *map(str, settings[2].values())],
        ["best:", "trial", "1,", "--set", f"model.dropout={dropout}", "--set", f"model.width={width}"],
        [f"{tmp_path}/tune-1/bundle"],
    ]
    assert "trial 3: validation_loss 0.8000, stopped after 1 of 3 epochs" in said.err
    best = json.loads(figures.read_text())["trials"][0]
    assert (best["trial"], best["best"]["epoch"], best["settings"]) == (1, 2, settings[1])
    assert main(["tune", str(recipe), *flags, "--set", "train.weight_decay=0.3"]) == 2, "these are other trials"
    assert "give another train.name" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_hopeless_trial_that_was_interrupted_is_stopped_where_it_was_and_a_diverged_one_is_survived(
    ray_cluster: None, rows: Path, tmp_path: Path
) -> None:
    train = {"learning_rate": 1e30, "epochs": 3, "storage": str(tmp_path), "max_failures": 0}
    config = small_config(table={"train": str(rows)}, train=train)
    settings = sampled(config, ["learning_rate"], 5)
    for number in (1, 2, 3):  # better than anything that can be learned in an epoch
        finish(config, number, settings[number], 0.1, 0.1, 0.1 * number)
    whole = train_model(variant(config, 4, settings[4]), cutoffs={1: 0.0})
    fingerprint = load_bundle(whole.bundle).fingerprint
    for lost in (tmp_path / "tune-4" / "bundle").iterdir():  # as if the driver had been killed after the epoch
        lost.unlink()
    epochs: list[dict[str, Any]] = []
    found = tune(config, 5, ["learning_rate"], parallel=2, on_epoch=epochs.append)
    assert [trial["trial"] for trial in found["trials"]][-2:] == [4, 0]
    stopped, diverged = found["trials"][-2:]
    assert "loss" in diverged["diverged"]
    assert (stopped["epochs"], stopped["of"], stopped["history"]) == (1, 3, whole.history)
    assert {entry["trial"] for entry in epochs} == {0}, "an epoch that is done is not done again"
    assert load_bundle(stopped["bundle"]).fingerprint == fingerprint
