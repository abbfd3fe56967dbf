"""Pictures: well-formed, with what they show written beside it."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from quire.bench.picture import _boxes, draw_curve, draw_step, ticks, trace, write_text
from quire.bench.profile import RecordedStep, Span
from quire.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"
STEP = RecordedStep(
    "decode graph", 128, 128, 1000.0, 11000.0,
    [Span("_rms_norm_kernel", 1500.0, 2000.0), Span("nvjet_1", 2000.0, 8000.0), Span("_attend<x & y>", 8000.0, 10000.0)],
    [Span("plan", 500.0, 2000.0), Span("launch", 2000.0, 3000.0), Span("wait", 3000.0, 12000.0)],
)  # fmt: skip


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_step_tells_its_rows_and_their_shares() -> None:
    found = texts(draw_step(STEP, "a step of <8B> & others"))
    assert found[0] == "a step of <8B> & others"
    assert found[1] == "decode graph, 128 tokens of 128 sequences: 10 ms = kernels 8.5 ms + gaps 1.5 ms"
    assert found[2:6] == ["host: plan", "host: launch", "host: wait", "gaps: the device has nothing to do"]
    rows = dict(itertools.pairwise(found))
    assert rows["host"] == "2 ms · 20%"  # the plan from the step's start on, the launch, and no waiting
    assert rows["linear layers"] == "6 ms · 60%"
    assert rows["attention"] == "2 ms · 20%"
    assert rows["norm, rotary, activation"] == "0.5 ms · 5%"
    assert rows["gaps"] == "1.5 ms · 15%"
    assert "sampling" not in rows


def test_nothing_is_drawn_outside_the_picture() -> None:
    svg = draw_step(STEP, "x")
    width = float(ElementTree.fromstring(svg).attrib["width"])
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        for x in re.findall(r"[MH](-?[\d.]+)", path.attrib["d"]):
            assert 0 <= float(x) <= width


def test_a_step_without_host_or_kernels_can_be_drawn() -> None:
    found = texts(draw_step(RecordedStep("eager", 1, 1, 0.0, 1000.0, []), "x"))
    assert "host" not in found
    assert dict(itertools.pairwise(found))["gaps"] == "1 ms · 100%"


def test_short_spans_are_seen_and_neighbours_joined() -> None:
    assert _boxes([(0, 1), (1.2, 2), (5, 5.1)], 0.5) == [(0, 2), (5, 5.5)]
    assert _boxes([(0, 1), (1.2, 2)], 0.0) == [(0, 1), (1.2, 2)]


@pytest.mark.parametrize(
    ("most", "count", "expected"),
    [(9.8, 5, [0, 2, 4, 6, 8]), (1.0, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.036, 4, [0, 0.01, 0.02, 0.03])],
)
def test_ticks_are_round(most: float, count: int, expected: list[float]) -> None:
    assert ticks(most, count) == expected


def test_a_trace_holds_each_span_once() -> None:
    later = RecordedStep("decode graph", 128, 128, 11000.0, 12000.0, [], [STEP.host[-1]])
    events = json.loads(trace([STEP, later], "two steps"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in spans].count("wait") == 1
    (attend,) = (event for event in spans if event["name"].startswith("_attend"))
    assert (attend["ts"], attend["dur"], attend["cat"]) == (8000.0, 2000.0, "attention")


def test_a_curve_has_its_points_and_its_level() -> None:
    points = [(1.0, 0.01), (2.0, 0.012), (4.0, 0.05)]
    svg = draw_curve("t", "told", "x axis", "y axis", [("median", points)], ("3 times", 0.03))
    root = ElementTree.fromstring(svg)
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")]
    assert len(circles) == 3
    assert circles == sorted(circles) and circles[0][1] > circles[1][1] > circles[2][1]
    (dashed,) = (path for path in root.iter(f"{SVG}path") if "stroke-dasharray" in path.attrib)
    (level,) = re.findall(r"M[\d.]+ ([\d.]+)", dashed.attrib["d"])
    assert circles[2][1] < float(level) < circles[1][1]
    assert {"t", "told", "x axis", "y axis", "3 times", "median"} <= set(texts(svg))


def test_a_file_that_cannot_be_written_is_told(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        write_text(tmp_path / "none" / "x.svg", "")
