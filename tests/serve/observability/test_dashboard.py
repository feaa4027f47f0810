"""The Grafana dashboard asks for what the server has, and its panels have their places."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.support.exposition import SERVED

FILE = Path(__file__).parents[3] / "docker" / "grafana" / "pcae-serve.json"
DASHBOARD = json.loads(FILE.read_text())
PANELS = DASHBOARD["panels"]
PLOTS = [panel for panel in PANELS if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PLOTS for target in panel["targets"]]


@pytest.mark.parametrize("expression", sorted(set(EXPRESSIONS)))
def test_every_series_that_is_asked_for_is_there(expression: str) -> None:
    names = re.findall(r"\b(?:pcae|process)_\w+", expression)
    assert names
    assert [name for name in names if name not in SERVED] == []
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
        for label, value in re.findall(r'(\w+)="([^"]*)"', matchers):
            assert any(labels.get(label) == value for labels in SERVED[name]), (name, label, value)
    labels = {label for name in names for sample in SERVED[name] for label in sample}
    for by in re.findall(r"by \(([^)]*)\)", expression):
        assert set(by.split(", ")) <= labels, by
    assert expression.count("(") == expression.count(")")


def test_what_an_operator_asks_first_has_a_panel() -> None:
    titles = " | ".join(panel["title"].lower() for panel in PLOTS)
    for wanted in (
        "attainment", "effective accuracy", "accuracy debt", "degraded share", "outcomes",
        "latency", "by stage", "by tier", "queue depth", "predicted wait", "batch fill",
        "prediction error", "wasted compute", "memory", "open files",
    ):  # fmt: skip
        assert wanted in titles
    shown = set(re.findall(r"\bpcae_\w+", " ".join(EXPRESSIONS)))
    assert {name for name in SERVED if name.startswith("pcae_")} - shown == {
        "pcae_stage_seconds_count", "pcae_stage_seconds_sum", "pcae_batch_size_bucket",
        "pcae_prediction_error_ratio_count", "pcae_prediction_error_ratio_sum",
    }  # fmt: skip


def test_every_panel_has_a_number_of_its_own() -> None:
    assert {id_: n for id_, n in Counter(p["id"] for p in PANELS).items() if n > 1} == {}


def test_panels_lie_side_by_side_on_the_grid() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        return {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}

    for one, other in combinations(PANELS, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    assert all(0 <= x < 24 for panel in PANELS for x, _ in cells(panel))


def test_the_data_source_is_the_viewers_choice() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    # of a data source's own number, which no other Grafana has, there is none
    uids = set(re.findall(r'"uid": "([^"]*)"', json.dumps([PANELS, DASHBOARD["templating"]])))
    assert uids == {"${datasource}"}
    used = set(re.findall(r"\$(\w+)", " ".join(EXPRESSIONS))) - {"__rate_interval"}
    assert used <= set(variables)
    for name in used:
        [series] = re.findall(r"label_values\((\w+)", variables[name]["query"]["query"])
        assert series in SERVED
        assert "allValue" not in variables[name]  # .* would take in every other server's processes
