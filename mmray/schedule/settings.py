"""What a schedule scores again, and what has to hold before it publishes."""

from pydantic import Field

from mmray.config import Section


class ScheduleConfig(Section):
    """What a tick of a schedule scores again, what has to hold before it publishes, and what it keeps."""

    full: bool = False
    """Score every file again, also those that did not change."""
    key: str | None = None
    """Column whose values tell rows apart: of files that are new or changed, only the rows are scored whose key, image
    cell or text is. For tables that are rewritten as a whole, in the order of the key; a path stands for its image."""
    retry_failed: bool = False
    """Score the files again in which a row failed or lacks a modality."""
    min_rows: int = Field(default=1, ge=1)
    """Publish no fewer rows than this."""
    max_drift: float | None = Field(default=None, gt=0)
    """Publish no new scores whose population stability index against those published is larger; any by default."""
    keep: int = Field(default=7, ge=1)
    """Published lists that stay, and the runs they need; older ones are removed."""
    lease_s: float = Field(default=60.0, gt=0)
    """Seconds without a sign of life after which another tick takes over."""
