"""deploy/grafana/mmray.json shows metrics that there are: mmray's own as its code names them, Ray's as Ray's do."""

import json
import re
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).parents[1]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "mmray.json").read_text())
SUFFIXES = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}


def defined() -> dict[str, list[str]]:
    """mmray's metrics as Prometheus sees them: each with the names it comes under."""
    code = "\n".join(file.read_text() for file in (ROOT / "mmray").rglob("*.py"))
    found = re.findall(r'\b(Counter|Gauge|Histogram)\(\s*"(mmray_\w+)"', code)
    return {name: [f"ray_{name}{suffix}" for suffix in SUFFIXES[kind]] for kind, name in found}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return shown + [v["definition"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]


def shown() -> set[str]:
    """The metrics in the dashboard."""
    return set(re.findall(r"\bray_(?!io_cluster)\w+", "\n".join(expressions())))


def test_every_metric_of_mmray_is_shown_by_a_name_it_comes_under() -> None:
    names = defined()
    assert {name for name in shown() if name.startswith("ray_mmray_")} <= {
        name for all in names.values() for name in all
    }
    assert [name for name, all in names.items() if not shown() & {*all}] == []


def test_every_other_metric_is_one_that_rays_own_dashboards_show() -> None:
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = set(re.findall(r"\bray_\w+", "\n".join(file.read_text() for file in folder.glob("*_panels.py"))))
    others = {name for name in shown() if not name.startswith("ray_mmray_")}
    assert others
    assert others <= known


def test_every_query_is_of_the_cluster_that_is_chosen() -> None:
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            queried = re.findall(r"\bray_(?!io_cluster)\w+(\{[^}]*)?", target["expr"])
            assert queried
            assert all('ray_io_cluster=~"$cluster"' in where for where in queried), target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")


def test_panels_have_a_place_of_their_own() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        (at["x"] + column, at["y"] + line)
        for at in (panel["gridPos"] for panel in everything)
        for column in range(at["w"])
        for line in range(at["h"])
    ]
    assert len({*cells}) == len(cells)
    assert max(x for x, _ in cells) < 24
