"""The picture of the ablation's curves."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "zoo"


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("curves")
    sys.modules.pop("curves", None)


def test_lines_go_through_their_points(curves, monkeypatch, tmp_path):
    found = {"softmax": {"250": 8.0, "500": 4.0}, "lit": {"250": 4.0, "500": 2.0}, "teacher": 1.0}
    (tmp_path / "results.json").write_text(json.dumps(found))
    files = [str(tmp_path / "results.json"), str(tmp_path / "x.svg")]
    monkeypatch.setattr(sys, "argv", ["curves.py", *files])
    curves.main()
    text = (tmp_path / "x.svg").read_text()
    ElementTree.fromstring(text)
    lines = [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line, colour in re.findall(r'points="([^"]*)"[^>]*stroke="([^"]*)"', text)
        if colour in curves.COLOURS
    ]
    (first, second) = lines
    assert first[1][0] == second[1][0] == curves.WIDTH - curves.RIGHT
    assert first[0][0] == pytest.approx((curves.LEFT + curves.WIDTH - curves.RIGHT) / 2, abs=0.1)
    halved = first[1][1] - first[0][1]  # down, and as far for every halving
    assert halved > 0
    assert second[1][1] - second[0][1] == pytest.approx(halved, abs=0.2)
    assert second[0][1] == pytest.approx(first[1][1], abs=0.1)
    for name in ("softmax", "lit", "teacher"):
        assert f">{name}</text>" in text


def test_a_distance_below_0_is_refused(curves):
    with pytest.raises(ValueError, match=r"curves: expected distances above 0, got -0\.1"):
        curves.draw({"lit": {1: 0.3, 2: -0.1}})
