"""Pictures that need no library: a step's timeline and a curve, as SVG that reads well in a README; and a trace of steps for
browsers (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from quire.bench.profile import KINDS, RecordedStep, Span, kind_of, short_name
from quire.errors import ConfigError

# Okabe and Ito's colours, which nearly everybody can tell apart
KIND_COLOURS = dict(zip(KINDS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f")))
PHASE_COLOURS = {"plan": "#56b4e9", "launch": "#b8860b", "outputs": "#6a51a3", "wait": "#d9d9d9"}
GAP_COLOUR = "#a50f15"
INK, FAINT, GRID = "#1f2328", "#656d76", "#d0d7de"

WIDTH, LEFT, RIGHT = 960, 210, 28
ROW, PITCH = 22, 34
MERGED_PX = 0.4  # spans nearer than this are drawn as one

Point = tuple[float, float]


def write_text(path: str | Path, text: str) -> None:
    """Raises ConfigError if the file cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


# -- a step ------------------------------------------------------------------------------------------------------------------
def draw_step(step: RecordedStep, title: str) -> str:
    """The SVG of one step: what the host did, kernels by kind, gaps; each row with its milliseconds and share of the step."""
    duration_us = max(step.duration_us, 1e-9)
    top = 92
    rows: list[tuple[str, float, list[tuple[str, list[Span]]]]] = []  # label, microseconds, (colour, spans)
    phases = {name: [_clip(span, step) for span in step.host if span.name == name] for name in PHASE_COLOURS}
    phases = {name: spans for name, spans in phases.items() if spans}
    host_us = sum(_total(spans) for name, spans in phases.items() if name != "wait")
    if phases:
        rows.append(("host", host_us, [(PHASE_COLOURS[name], spans) for name, spans in phases.items()]))
    own_us = step.exclusive_us()
    for kind in KINDS:
        chosen = [(span, own) for span, own in zip(step.kernels, own_us) if kind_of(span.name) == kind]
        if chosen:
            spans = [span for span, _ in chosen]
            rows.append((kind, sum(own for _, own in chosen), [(KIND_COLOURS[kind], spans)]))
    rows.append(("gaps", step.gaps_us, [(GAP_COLOUR, step.gaps())]))

    bottom = top + PITCH * len(rows)
    scale = (WIDTH - LEFT - RIGHT) / duration_us
    found = [_text(20, 30, title, size=17, weight="600")]
    told = (
        f"{step.way}, {step.num_tokens:,} tokens of {step.num_sequences:,} sequences: {_ms(duration_us)} "
        f"= kernels {_ms(step.busy_us)} + gaps {_ms(step.gaps_us)}"
    )
    found.append(_text(20, 50, told, size=13, fill=FAINT))
    at = 20.0
    shown = [(f"host: {name}", PHASE_COLOURS[name]) for name in phases]
    for label, colour in (*shown, ("gaps: the device has nothing to do", GAP_COLOUR)):
        found.append(f'<rect x="{at:g}" y="65" width="11" height="11" rx="2" fill="{colour}"/>')
        found.append(_text(at + 16, 75, label, size=12, fill=FAINT))
        at += 34 + 6.4 * len(label)
    for tick in ticks(duration_us / 1e3):
        x = LEFT + tick * 1e3 * scale
        found.append(f'<path d="M{x:.1f} {top - 4}V{bottom}" stroke="{GRID}"/>')
        found.append(_text(x, bottom + 16, f"{tick:g}", size=12, fill=FAINT, anchor="middle"))
    found.append(_text(LEFT - 12, bottom + 16, "ms", size=12, fill=FAINT, anchor="end"))
    for i, (label, us, parts) in enumerate(rows):
        y = top + PITCH * i
        found.append(_text(LEFT - 12, y + 9, label, size=13, anchor="end"))
        found.append(_text(LEFT - 12, y + 22, f"{_ms(us)} · {us / duration_us:.0%}", size=11, fill=FAINT, anchor="end"))
        for colour, spans in parts:
            boxes = _boxes([(LEFT + (s.start_us - step.start_us) * scale, LEFT + (s.end_us - step.start_us) * scale)
                            for s in spans], 0.5 if label != "gaps" else 0.0)  # fmt: skip
            if boxes:
                path = "".join(f"M{left:.1f} {y}H{right:.1f}v{ROW}H{left:.1f}z" for left, right in boxes)
                found.append(f'<path d="{path}" fill="{colour}"/>')
    return _page(bottom + 32, title, found)


def _clip(span: Span, step: RecordedStep) -> Span:
    return Span(span.name, max(span.start_us, step.start_us), min(span.end_us, step.end_us))


def _total(spans: Iterable[Span]) -> float:
    return sum(span.end_us - span.start_us for span in spans)


def _boxes(ranges: Sequence[Point], least: float) -> list[Point]:
    """Left and right edges in pixels, at least `least` wide, so that short kernels are seen; neighbours become one.

    least 0.5: [(0, 1), (1.2, 2), (5, 5.1)] -> [(0, 2), (5, 5.5)]. With 0 nothing is widened or joined: areas stay true.
    """
    found: list[Point] = []
    for left, right in sorted(ranges):
        right = max(right, left + least)
        if least and found and left - found[-1][1] < MERGED_PX:
            found[-1] = (found[-1][0], max(found[-1][1], right))
        else:
            found.append((left, right))
    return found


def _ms(us: float) -> str:
    return f"{us / 1e3:.3g} ms"


def trace(steps: Sequence[RecordedStep], title: str) -> str:
    """The steps in Chrome's trace format (JSON): rows for steps, the host's phases and kernels."""
    threads = ("steps", "host", "kernels")
    events: list[dict[str, object]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": title}}]
    for number, name in enumerate(threads):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": name}})

    def add(thread: str, span: Span, category: str) -> None:
        us = {"ts": span.start_us, "dur": span.end_us - span.start_us}
        name = short_name(span.name)
        events.append({"name": name, "cat": category, "ph": "X", "pid": 0, "tid": threads.index(thread), **us})

    told: set[Span] = set()
    for step in steps:
        add("steps", Span(f"{step.way}, {step.num_tokens} tokens", step.start_us, step.end_us), step.way)
        for span in step.kernels:
            add("kernels", span, kind_of(span.name))
        for span in step.host:
            if span not in told:  # it may last into the next step
                told.add(span)
                add("host", span, span.name)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


# -- a curve -----------------------------------------------------------------------------------------------------------------
def draw_curve(
    title: str,
    told: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[str, Sequence[Point]]],
    level: tuple[str, float] | None = None,
) -> str:
    """An SVG of up to three named series of points over one another, from 0 on; `level`: a dashed line and what it is."""
    height, left, right, top, bottom = 420, 76, 28, 92, 366
    most_x = max((x for _, points in series for x, _ in points), default=1.0) or 1.0
    most_y = max([y for _, points in series for _, y in points] + ([level[1]] if level else [0.0])) or 1.0
    most_x, most_y = most_x * 1.04, most_y * 1.06

    def place(point: Point) -> Point:
        return left + point[0] / most_x * (WIDTH - left - right), bottom - point[1] / most_y * (bottom - top)

    found = [_text(20, 30, title, size=17, weight="600"), _text(20, 50, told, size=13, fill=FAINT)]
    for tick in ticks(most_x):
        x, _ = place((tick, 0))
        found.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="{GRID}"/>')
        found.append(_text(x, bottom + 18, f"{tick:g}", size=12, fill=FAINT, anchor="middle"))
    for tick in ticks(most_y, 5):
        _, y = place((0, tick))
        found.append(f'<path d="M{left} {y:.1f}H{WIDTH - right}" stroke="{GRID}"/>')
        found.append(_text(left - 8, y + 4, f"{tick:g}", size=12, fill=FAINT, anchor="end"))
    found.append(_text((left + WIDTH - right) / 2, bottom + 40, x_label, size=13, anchor="middle"))
    middle = (top + bottom) / 2
    found.append(
        f'<g transform="rotate(-90 22 {middle:g})">{_text(22, middle + 4, y_label, size=13, anchor="middle")}</g>'
    )
    if level is not None:
        _, y = place((0, level[1]))
        found.append(f'<path d="M{left} {y:.1f}H{WIDTH - right}" stroke="{FAINT}" stroke-dasharray="6 4"/>')
        found.append(_text(left + 6, y - 6, level[0], size=12, fill=FAINT))
    at = 20.0
    for (name, points), colour in zip(series, ("#0072b2", "#d55e00", "#009e73")):
        placed = [place(point) for point in points]
        if placed:
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
            found.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        found += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in placed]
        found.append(f'<rect x="{at:g}" y="65" width="11" height="11" rx="2" fill="{colour}"/>')
        found.append(_text(at + 16, 75, name, size=12, fill=FAINT))
        at += 34 + 6.4 * len(name)
    return _page(height, title, found)


# -- SVG ---------------------------------------------------------------------------------------------------------------------
def ticks(most: float, count: int = 8) -> list[float]:
    """From 0 to at most `most`, about `count` of them at 1, 2 or 5 times a power of ten: ticks(9.8, 5) is 0, 2, 4, 6, 8."""
    rough = most / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [float(f"{i * step:.12g}") for i in range(int(most / step + 1e-9) + 1)]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    fill: str = INK,
    weight: str = "400",
    anchor: str = "start",
) -> str:
    more = f' font-weight="{weight}"' if weight != "400" else ""
    more += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"{more}>{escape(text)}</text>'


def _page(height: float, title: str, parts: Sequence[str]) -> str:
    """With its own background: it reads the same in a light and in a dark page."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" fill="#ffffff" stroke="{GRID}"/>',
            *parts,
            "</svg>\n",
        ]
    )
