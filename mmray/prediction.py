"""What a model says of rows, and the columns of a scored table that say it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmray.table import Fault, Reason, Status


@dataclass(frozen=True)
class Prediction:
    """What the model says of B rows."""

    outputs: NDArray[np.float32]
    """[B, K]: the probability of each label, or the value [B, 1] of a regression; NaN where nothing was present."""
    present: Mapping[str, NDArray[np.bool_]]
    """Modality -> [B]: whether it was used."""
    faults: Mapping[str, Sequence[Fault | None]]
    """Modality -> B entries: why it was not."""
    image_weight: NDArray[np.float32] | None
    """[B]: alpha of each row, where the fusion has one."""
    alone: Mapping[str, NDArray[np.float32]]
    """Modality -> [B, K]: the outputs with all other modalities withheld; empty unless asked for."""
    at_alpha: Mapping[float, NDArray[np.float32]] = field(default_factory=dict)
    """Alpha -> [B, K]: the outputs at this weight of the image; empty unless asked for, or where there is none."""

    @classmethod
    def concatenate(cls, parts: Sequence["Prediction"]) -> "Prediction":
        """Joins predictions of rows that were predicted apart; at least one."""
        first = parts[0]
        weights = [part.image_weight for part in parts if part.image_weight is not None]
        return cls(
            np.concatenate([part.outputs for part in parts]),
            {name: np.concatenate([part.present[name] for part in parts]) for name in first.present},
            {name: [fault for part in parts for fault in part.faults[name]] for name in first.faults},
            np.concatenate(weights) if weights else None,
            {name: np.concatenate([part.alone[name] for part in parts]) for name in first.alone},
            {alpha: np.concatenate([part.at_alpha[alpha] for part in parts]) for alpha in first.at_alpha},
        )

    def head(self, rows: int) -> "Prediction":
        """Returns the prediction of the first rows."""
        return Prediction(
            self.outputs[:rows],
            {name: mask[:rows] for name, mask in self.present.items()},
            {name: faults[:rows] for name, faults in self.faults.items()},
            None if self.image_weight is None else self.image_weight[:rows],
            {name: view[:rows] for name, view in self.alone.items()},
            {alpha: view[:rows] for alpha, view in self.at_alpha.items()},
        )

    def columns(self, names: Iterable[str], task: str, labels: Sequence[str]) -> Iterator[Sequence[Any]]:
        """Yields the named columns of `output_fields`, B values each, for a task and its labels."""
        outputs, statuses = self.outputs, self._statuses()
        scored = [status is not Status.FAILED for status, _, _ in statuses]
        for name in names:
            match name:
                case "score":
                    score = outputs[:, 1] if task == "binary" else outputs.max(axis=1)
                    yield _nullable(score, scored)
                case "predicted_label" if task == "multilabel":
                    chosen = [[labels[int(k)] for k in np.flatnonzero(row >= 0.5)] for row in outputs]
                    yield _nullable(chosen, scored)
                case "predicted_label":
                    safe = np.where(np.isfinite(outputs), outputs, -1)
                    yield _nullable([labels[k] for k in safe.argmax(axis=1)], scored)
                case "probabilities":
                    yield _nullable(outputs, scored)
                case "image_weight":
                    weight = self.image_weight
                    yield _nullable(weight, scored) if weight is not None else [None] * len(scored)
                case "modalities_used":
                    modalities = sorted(self.present)
                    masks = zip(*(self.present[modality] for modality in modalities), strict=True)
                    yield ["+".join(m for m, used in zip(modalities, mask, strict=True) if used) for mask in masks]
                case "status":
                    yield [status.value for status, _, _ in statuses]
                case "reason":
                    yield [reason for _, reason, _ in statuses]
                case "reason_detail":
                    yield [detail for _, _, detail in statuses]

    def _statuses(self) -> list[tuple[Status, str | None, str | None]]:
        """Returns status, reason and detail of each row."""
        finite = [bool(row.all()) for row in np.isfinite(self.outputs)]
        names = sorted(self.faults)
        return [_row_status([(name, self.faults[name][k]) for name in names], finite[k]) for k in range(len(finite))]


def _row_status(found: Sequence[tuple[str, Fault | None]], finite: bool) -> tuple[Status, str | None, str | None]:
    faults = [(name, fault) for name, fault in found if fault is not None]
    detail = "; ".join(f"{name}: {fault.reason.value}: {fault.detail}" for name, fault in faults)[:256] or None
    if len(faults) == len(found):
        return Status.FAILED, faults[0][1].reason.value, detail
    if not finite:
        return Status.FAILED, Reason.NONFINITE_OUTPUT.value, detail
    if faults:
        return Status.DEGRADED, faults[0][1].reason.value, detail
    return Status.OK, None, None


def _nullable(values: Any, keep: Sequence[bool]) -> list[Any]:
    return [value if kept else None for value, kept in zip(values, keep, strict=True)]
