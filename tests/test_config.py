"""Configuration: what is accepted, and what a mistake is answered with."""

from pathlib import Path

import pytest

from mmray.config import BagEncoderConfig, Config, WeightedSumConfig
from mmray.config_file import load_config, parse_config
from mmray.errors import ConfigError
from mmray.store import open_store

RECIPES = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.toml"))


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def test_a_file_and_overrides_make_one_config(tmp_path: Path) -> None:
    path = write(tmp_path, '[table]\ntrain = "rows"\n[train]\nepochs = 3\n')
    config = load_config(
        path,
        [
            "train.learning_rate=1e-2",
            "model.fusion.kind=weighted_sum",
            "model.fusion.alpha=gated",
            "table.label_column=y",
        ],
    )
    assert config.train.epochs == 3
    assert config.train.learning_rate == 0.01
    assert config.model.fusion == WeightedSumConfig(alpha="gated")
    assert config.table.label_column == "y"


def test_the_kind_of_an_encoder_chooses_its_settings(tmp_path: Path) -> None:
    path = write(tmp_path, '[table]\ntrain = "rows"\n[model.text_encoder]\nkind = "bag"\nembedding_dim = 7\n')
    assert load_config(path).model.text_encoder == BagEncoderConfig(embedding_dim=7)


def test_a_configuration_may_lie_in_a_bucket(s3: str) -> None:
    open_store(s3).create("configs/run.toml", b'[table]\ntrain = "rows"\n')
    assert load_config(f"{s3}/configs/run.toml", ["train.epochs=3"]).train.epochs == 3
    with pytest.raises(ConfigError, match="no configuration file at 's3://"):
        load_config(f"{s3}/configs/none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tabel]\n", "unknown key 'tabel'; did you mean 'table'?"),
        ('[table]\ntrain = "x"\nlable_column = "y"\n', "'table.lable_column'; did you mean 'label_column'?"),
        ('[table]\ntrain = "x"\n[model.fusion]\nkind = "weighted_sum"\nalhpa = "fixed"\n', "did you mean 'alpha'?"),
        ('[table]\ntrain = "x"\n[model.text_encoder]\nkind = "gru"\nhiden_dim = 3\n', "did you mean 'hidden_dim'?"),
        ('[table]\ntrain = "x"\n[task]\nkind = "binry"\n', "'binary', 'multiclass', 'multilabel', 'regression'"),
        ('[table]\ntrain = "x"\n[train]\nepochs = -1\n', "train.epochs: Input should be greater than or equal to 0"),
        (
            '[table]\ntrain = "x"\n[train]\nlearning_rate = nan\n',
            "train.learning_rate: Input should be a finite number",
        ),
        ('[table]\ntrain = "x"\nimage_column = ""\ntext_column = ""\n', "both empty; keep at least one"),
        ('[table]\ntrain = "x"\n[train]\nprecision = "fp16"\n', "needs train.use_gpu = true"),
        ('[table]\ntrain = "x"\n[model]\nwidth = 6\n[model.fusion]\nkind = "attention"\n', "does not divide"),
        ('[table]\ntrain = "x"\n[train]\nbatch_size = 2\nnum_workers = 2\n', "use at least 4"),
        ('[table]\ntrain = "x"\n[train]\nbatch_size = 8\nnum_workers = [1, 2]\naccumulation = 3\n', "use at least 12"),
        ('[table]\ntrain = "x"\n[train]\nnum_workers = [3, 2]\n', "num_workers"),
        ('[table]\ntrain = "x"\n[model.image_encoder]\nkind = "cnn"\nchannels = [0]\n', "channels.0"),
        ("", "'table' is missing"),
        ("[table\n", "is not TOML"),
    ],
)
def test_a_mistake_names_the_key_and_what_would_be_right(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at 'nowhere.toml'; see jobs/configs/"):
        load_config("nowhere.toml")


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set takes section\.key=value"):
        load_config(write(tmp_path, '[table]\ntrain = "x"\n'), [override])


def test_a_config_survives_json_and_cannot_be_changed() -> None:
    config = parse_config({"table": {"train": "x"}, "model": {"text_encoder": {"kind": "gru"}}}, "test")
    assert Config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 5  # type: ignore[misc]


def test_every_setting_has_a_line_of_documentation() -> None:
    undocumented = []
    pending = [Config]
    while pending:
        section = pending.pop()
        for name, field in section.model_fields.items():
            annotation = field.annotation
            members = getattr(annotation, "__args__", (annotation,))
            pending += [m for m in members if isinstance(m, type) and hasattr(m, "model_fields")]
            if not field.description and name != "kind":
                undocumented.append(f"{section.__name__}.{name}")
    assert undocumented == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_ready_recipe_is_valid(recipe: Path) -> None:
    assert load_config(str(recipe)).table.train


def test_there_are_ready_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"article", "openclipart", "pretrained", "regression"}


def test_a_setting_of_the_usual_kind_needs_no_kind(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[table]\ntrain = "t"\n')
    config = load_config(str(path), ["model.text_encoder.pooling=max", "model.fusion.alpha=gated"])
    assert (config.model.text_encoder.kind, config.model.fusion.kind) == ("lstm", "weighted_sum")
    assert config.model_dump()["model"]["text_encoder"]["pooling"] == "max"
    with pytest.raises(ConfigError, match=r"unknown key 'model\.fusion\.alfa'; did you mean 'alpha'"):
        load_config(str(path), ["model.fusion.alfa=gated"])


def test_another_kind_on_the_command_line_leaves_behind_what_only_the_old_one_had(tmp_path: Path) -> None:
    recipe = str(Path(__file__).parents[1] / "jobs" / "configs" / "openclipart.toml")
    config = load_config(recipe, ["model.fusion.kind=concat", "model.text_encoder.kind=gru"])
    assert config.model.fusion.kind == "concat"
    assert config.model.text_encoder.kind == "gru"
    assert config.model.text_encoder.hidden_dim == 128  # which both have


@pytest.mark.parametrize("text", ["[binary]\n", "lstm = 1\n", "[model]\nbag = 1\n"])
def test_a_kind_in_the_place_of_a_key_is_an_unknown_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.toml").write_text(f'{text}[table]\ntrain = "x"\n')
    with pytest.raises(ConfigError, match=r"unknown key '(binary|lstm|model\.bag)'"):
        load_config(str(tmp_path / "run.toml"))
