"""The knobs of tuning: settings worth trying, the values they may have, and points in the space of several.

Reads a `Config` -> gives settings by key, a dictionary for each trial.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmray.config import Config
from mmray.errors import ConfigError, nearest


def _logarithmic(low: float, high: float) -> Callable[[float], float]:
    return lambda share: float(f"{low * (high / low) ** share:.3g}")


def _even(low: float, high: float) -> Callable[[float], float]:
    return lambda share: round(low + (high - low) * share, 2)


def _one_of(*values: Any) -> Callable[[float], Any]:
    return lambda share: values[min(int(share * len(values)), len(values) - 1)]


@dataclass(frozen=True)
class Knob:
    """A setting that is worth trying, and its values."""

    key: str
    value: Callable[[float], Any]
    """The quantile function of its distribution: a number between 0 and 1 -> a value."""
    modalities: tuple[str, ...] = ()
    """Without these it does nothing."""


KNOBS = {
    "learning_rate": Knob("train.learning_rate", _logarithmic(3e-4, 1e-2)),
    "weight_decay": Knob("train.weight_decay", _logarithmic(1e-3, 0.5)),
    "dropout": Knob("model.dropout", _even(0.0, 0.7)),
    "word_dropout": Knob("train.word_dropout", _even(0.0, 0.7), ("text",)),
    "auxiliary_weight": Knob("train.auxiliary_weight", _even(0.0, 1.0), ("image", "text")),
    "modality_dropout": Knob("model.modality_dropout", _even(0.0, 0.6), ("image", "text")),
    "batch_size": Knob("train.batch_size", _one_of(32, 64, 128)),
    "width": Knob("model.width", _one_of(64, 128, 256)),
    "alpha": Knob("model.fusion.alpha", _one_of("fixed", "learned", "gated"), ("image", "text")),
}
USUAL = ("learning_rate", "weight_decay", "dropout", "word_dropout", "auxiliary_weight")


def chosen(config: Config, knobs: Sequence[str]) -> Sequence[str]:
    """Returns the names of knobs to turn; refuses those that there are not, or that do nothing here."""
    for name in knobs:
        if name not in KNOBS:
            raise ConfigError(f"--knobs: there is no {name!r}{nearest(name, KNOBS)}; there are {', '.join(KNOBS)}")
        if not _applies(config, KNOBS[name]):
            raise ConfigError(f"--knobs: {KNOBS[name].key} does nothing in this configuration; leave {name} out")
    return list(dict.fromkeys(knobs)) or [name for name in USUAL if _applies(config, KNOBS[name])]


def _applies(config: Config, knob: Knob) -> bool:
    return set(knob.modalities) <= set(config.table.modalities) and _own(config, knob.key) is not None


def _own(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def sampled(config: Config, knobs: Sequence[str], trials: int) -> list[dict[str, Any]]:
    """Returns the settings of each trial: the configuration's own, then points of a scrambled Sobol sequence.

    It fills the space more evenly than independent draws do (Bousquet et al. 2017, "Critical hyper-parameters: no
    random, no cry"), and its first points do not depend on how many follow.
    """
    engine = torch.quasirandom.SobolEngine(len(knobs), scramble=True, seed=config.train.seed)  # type: ignore[no-untyped-call]
    found = [{KNOBS[name].key: _own(config, KNOBS[name].key) for name in knobs}]
    for _ in range(trials - 1):
        (point,) = engine.draw(1, dtype=torch.float64).tolist()
        found.append({KNOBS[name].key: KNOBS[name].value(share) for name, share in zip(knobs, point, strict=True)})
    return found
