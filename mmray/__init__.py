"""Trains a model that fuses an image and a text into one prediction, and scores very large tables with it on Ray.

In a notebook, with a bundle that `mmray train` printed, and a table to score:

>>> import mmray, pyarrow
>>> predictor = mmray.load_predictor(bundle)
>>> some = pyarrow.table({"image_path": [None], "text": ["the red square"]})
>>> predictor.score(some).select(["status", "reason"]).to_pylist()
[{'status': 'degraded', 'reason': 'IMAGE_NULL'}]
>>> result = mmray.score_table(bundle, table, output)
>>> result.ledger.rows, result.ledger.statuses
(40, {'ok': 40})
>>> result.read(["id", "score"]).to_pandas().shape
(40, 2)
>>> mmray.verify_output(output, level=2).passed
True

`train_model`, `evaluate_bundle` and `forecast` are functions too; each says in its docstring what it takes and gives.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_config": "mmray.config_file",
    "ScoreConfig": "mmray.options",
    "load_predictor": "mmray.predictor",
    "train_model": "mmray.train.job",
    "forecast": "mmray.score.forecast",
    "score_table": "mmray.score.job",
    "verify_output": "mmray.score.verify",
    "evaluate_bundle": "mmray.evaluate",
}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: importing the package has no effect, and brings neither ray nor torch.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'mmray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
