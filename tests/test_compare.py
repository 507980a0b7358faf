"""Comparison: every fusion there is, and a table of means and spreads."""

from pathlib import Path
from typing import get_args

import pytest
from models import small_config

from mmray.cli import main
from mmray.compare import KINDS, compare_fusions, comparison_text, summarised, variant
from mmray.config import FusionConfig
from mmray.errors import ConfigError, TableError


def run(fusion: str, seed: int, fused: float, image: float, text: float) -> dict[str, object]:
    views = {"all modalities": fused, "image only": image, "text only": text, "late average": (image + text) / 2}
    metrics = {view: {"accuracy": value} for view, value in views.items()}
    return {"fusion": fusion, "seed": seed, "metric": "accuracy", "rows": 1000, "metrics": metrics}


def test_every_kind_of_fusion_is_compared() -> None:
    union, _ = get_args(FusionConfig)
    assert set(KINDS) == {section().kind for section in get_args(union)}


def test_each_run_has_its_name_seed_and_fusion_and_the_configs_own_fusion_keeps_its_settings() -> None:
    fusion = {"kind": "weighted_sum", "alpha": "gated"}
    config = small_config(model={**small_config().model.model_dump(), "fusion": fusion}, train={"name": "shop"})
    own, other = variant(config, "weighted_sum", 2), variant(config, "attention", 0)
    assert own.model.fusion == config.model.fusion
    assert (own.train.name, own.train.seed) == ("shop-weighted_sum-2", 2)
    assert (other.train.name, other.train.seed, other.model.fusion.kind) == ("shop-attention-0", 0, "attention")
    assert other.model.image_encoder == config.model.image_encoder


def test_the_table_has_means_spreads_and_the_gain_over_the_better_modality_of_the_same_run() -> None:
    runs = [run("concat", 0, 0.8, 0.5, 0.7), run("concat", 1, 0.7, 0.68, 0.6)]
    summary = summarised(runs)["concat"]
    assert summary["all modalities"] == pytest.approx((0.75, 0.1 / 2**0.5))
    assert summary["gain"] == pytest.approx((0.06, 0.08 / 2**0.5))
    first, heads, line = comparison_text({"runs": runs, "summary": summarised(runs)}).splitlines()
    assert first == "accuracy on 1,000 rows, mean and standard deviation of 2 seeds"
    assert heads.split()[-1] == "gain"
    assert line.split("  ")[0] == "concat"
    assert [value.strip() for value in line[14:].split("   ") if value.strip()] == [
        "0.750 +- 0.071", "0.590 +- 0.127", "0.650 +- 0.071", "0.620 +- 0.028", "0.060 +- 0.057"
    ]  # fmt: skip


def test_a_model_of_one_modality_has_no_gain() -> None:
    runs = [run("concat", 0, 0.8, 0.5, 0.7)]
    runs[0]["metrics"] = {"all modalities": {"accuracy": 0.8}}
    assert summarised(runs)["concat"] == {
        "all modalities": (0.8, 0.0), "image only": None, "text only": None, "late average": None, "gain": None
    }  # fmt: skip


def test_what_cannot_be_compared_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match="give --split or --table"):
        compare_fusions(small_config(), KINDS, 3)
    with pytest.raises(ConfigError, match=r"--split needs table.split_column"):
        compare_fusions(small_config(), KINDS, 3, split="test")
    with pytest.raises(TableError, match="no such table"):
        compare_fusions(small_config(), KINDS, 3, table="nowhere")
    with pytest.raises(ConfigError, match="--seeds: 0 runs are none to compare"):
        compare_fusions(small_config(), KINDS, 0, table="rows")


def test_a_fusion_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[1] / "jobs" / "configs" / "openclipart.toml")
    assert main(["compare", recipe, "--split", "test", "--kinds", "concat", "sum"]) == 2
    assert "no fusion is called sum; there are weighted_sum, concat" in capsys.readouterr().err
