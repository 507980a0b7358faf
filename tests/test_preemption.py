"""A node that says when it will be gone: training saves where it is, goes on elsewhere, and ends the same."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kill import Nodes
from models import colour_table
from processes import wait_for

from mmray.bundle import load_bundle
from mmray.config import Config
from mmray.config_file import parse_config
from mmray.train.job import train_model

WORKER = b"RayTrainWorker"
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


def config(rows: Path, storage: Path) -> Config:
    return parse_config(
        {
            "table": {"train": str(rows)},
            "image": {"size": 32},
            "task": {"kind": "multiclass"},
            "train": {"epochs": 2, "batch_size": 4, "storage": str(storage), "name": "run"},
        },
        "test",
    )


def test_a_notice_that_a_node_is_about_to_go_saves_the_epoch_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = colour_table(tmp_path / "rows", rows=2400)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    checkpoints = tmp_path / "taken" / "run" / "checkpoints"
    nodes = Nodes()
    try:
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, nodes.environment[name])
        with ThreadPoolExecutor(1) as thread:  # nodes can only be started in the main one
            training = thread.submit(train_model, config(rows, tmp_path / "taken"))
            wait_for(lambda: nodes.actors(WORKER) or training.done())
            (node,) = set(nodes.actors(WORKER).values())
            drain(nodes, node)
            wait_for(lambda: [*checkpoints.glob("*.step-*")] or training.done())
            seen = [path.name for path in checkpoints.glob("epoch-*")]
            nodes.replace(node)
            taken = training.result()
        whole = train_model(config(rows, tmp_path / "whole"))
    finally:
        nodes.stop()
    assert len(seen) == 1
    assert taken.history == whole.history
    assert load_bundle(taken.bundle).fingerprint == load_bundle(whole.bundle).fingerprint


def drain(nodes: Nodes, node: Any) -> None:
    """Says that a node will soon be gone, as a provider of spot instances does."""
    address = nodes.environment["RAY_ADDRESS"]
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "drain-node",
        "--address",
        address,
        "--node-id",
        node.node_id,
    ]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", "60"]
    subprocess.run(command, env=nodes.environment, check=True, capture_output=True)
