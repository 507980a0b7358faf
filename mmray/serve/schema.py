"""What a request and its answer hold."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmray.config import Section, TextConfig

RETRY_AFTER_S = 1
"""Of an answer that says to try again."""


class ImageInput(Section):
    """An image: its bytes, or where it is. Exactly one of the fields."""

    base64: str | None = None
    """The file's bytes."""
    path: str | None = None
    """A path beneath the endpoint's image roots, if it has any."""
    url: str | None = None
    """A URI beneath the endpoint's image roots, if it has any; nothing is fetched from elsewhere."""

    @model_validator(mode="after")
    def _one(self) -> "ImageInput":
        if len(self.model_fields_set) != 1 or self.cell() is None:
            raise ValueError("give exactly one of base64, path and url")
        return self

    def cell(self) -> bytes | str | None:
        """Returns what a table's image cell would hold."""
        if self.base64 is None:
            return self.path if self.path is not None else self.url
        try:
            return base64.b64decode(self.base64, validate=True)
        except (binascii.Error, ValueError):
            return self.base64.encode("utf-8", "replace")  # the bytes of no image: a fault of this item alone


class Item(Section):
    """One row to score; what is left out counts as absent."""

    text: str | None = None
    """The text."""
    image: ImageInput | None = None
    """The image."""

    def cells(self, modalities: Sequence[str]) -> dict[str, list[Any]]:
        """Returns one row of cells by modality."""
        found = {"text": self.text, "image": None if self.image is None else self.image.cell()}
        return {name: [found[name]] for name in modalities}

    def ignored(self, modalities: Sequence[str]) -> list[str]:
        """Returns a warning for each modality that is given and that the model does not know."""
        given = {"text": self.text, "image": self.image}
        unread = [name for name, value in given.items() if value is not None and name not in modalities]
        return [f"the {name} is ignored: the model does not read it" for name in unread]

    def cut(self, text: TextConfig) -> list[str]:
        """Returns a warning where the model reads the beginning of the text only."""
        size = 0 if self.text is None else len(self.text.encode("utf-8", "replace"))
        if size <= text.max_bytes:
            return []
        return [f"the text is cut: the model reads {text.max_bytes:,} bytes of {size:,}"]


class ScoreRequest(Item):
    """One item, or several under `items`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "a red car"}, {"items": [{"text": "a red car"}, {"text": "a cat"}]}]}
    )

    items: tuple[Item, ...] | None = None
    """Several rows to score; each has its own status in the answer."""

    @model_validator(mode="after")
    def _one_or_several(self) -> "ScoreRequest":
        if self.items is not None and (self.text is not None or self.image is not None):
            raise ValueError("give one item (text, image) or several (items), not both")
        if self.items == ():
            raise ValueError("items is empty; give at least one")
        return self

    def all_items(self) -> tuple[Item, ...]:
        """Returns the items to score."""
        return (Item(text=self.text, image=self.image),) if self.items is None else self.items


class Result(BaseModel):
    """What the model says of one item; the columns of a scored table, by the same names."""

    score: float | None
    predicted_label: str | list[str] | None = None
    probabilities: dict[str, float] | None = None
    image_weight: float | None = None
    modalities_used: str
    status: str
    reason: str | None
    reason_detail: str | None
    warnings: list[str] = Field(default_factory=list)

    @classmethod
    def of(cls, row: Mapping[str, Any], labels: Sequence[str]) -> "Result":
        """Takes a row of a scored table."""
        probabilities = row.get("probabilities")
        named = None if probabilities is None else dict(zip(labels, probabilities, strict=True))
        return cls(**{**row, "probabilities": named})


class ScoreResponse(BaseModel):
    """The answer to a request, a result for each item in its order."""

    results: list[Result]
    fingerprint: str
    """Which model answered."""
    request_id: str
    milliseconds: float


class Problem(BaseModel):
    """Why a request was not answered."""

    code: str
    message: str
    request_id: str = ""
    """Empty where the request did not get as far as having one."""
