"""A store that refuses, breaks off and does not answer costs time: the weather never becomes a row's fate."""

from pathlib import Path

import pytest
from faults import KINDS, faulty, upload
from models import colour_table, saved_bundle, score_in_process

from mmray.options import ScoreConfig
from mmray.score.verify import verify_output


def test_every_row_is_scored_once_in_a_store_that_fails_one_request_in_eight(
    s3: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = colour_table(tmp_path / "rows", rows=60)
    saved_bundle(tmp_path / "bundle", rows)
    bundle, table = upload(tmp_path / "bundle", s3, "bundle"), upload(rows, s3, "rows")
    with faulty(s3_server, share=1 / 8, seed=2) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        ledger = score_in_process(bundle, table, f"{s3}/scored", ScoreConfig(precision="fp32", slice_rows=5))
        assert {kind for _, kind in store.faults} == set(KINDS), "there was weather of every kind"
        assert store.faults["PUT", "unanswered"], "also where a slice was committed"
        assert ledger.statuses == {"ok": 60}
        assert verify_output(f"{s3}/scored", 2).passed
