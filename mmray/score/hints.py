"""What to do where most rows lack something for the same reason: then it is the command that is wrong, not the rows."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mmray.table import Reason

MOST = 0.5  # of the rows


def hints(rows: int, reasons: Mapping[str, int], image_roots: Sequence[str]) -> list[str]:
    """Returns what to do about reasons that most rows have.

    Args:
        rows: of the run, or of a sample of it.
        reasons: `status/REASON` -> rows.
        image_roots: where images are looked for.
    """
    counts = Counter[str]()
    for name, count in reasons.items():
        counts[name.partition("/")[2]] += count
    where = " and ".join(image_roots)
    told = {
        Reason.MISSING: f"most images are not where they are looked for, relative paths beneath {where}; give the "
        "folder that they are relative to with --image-root",
        Reason.NOT_ALLOWED: f"most images lie outside of {where} or may not be opened; allow where they lie with "
        "--image-root, a folder, s3://BUCKET or https://HOST, or give the right to read them",
        Reason.BAD_FORMAT: "most images are of no format that is known; see one with `mmray explain-row`, and name the "
        "right column with --image-column",
        Reason.IMAGE_NULL: "most rows have no image; name the right column with --image-column",
        Reason.TEXT_NULL: "most rows have no text; name the right column with --text-column",
        Reason.TEXT_EMPTY: "most texts hold no word; name the right column with --text-column",
    }
    return [hint for reason, hint in told.items() if counts[reason] > MOST * rows]
