"""A server's /metrics over time, and a picture of it: KV slots by state, the queue, tokens a second.

Reads Prometheus' text form, of Quire or of vLLM (whose names have the same endings). matplotlib is loaded when a picture is
drawn. Does not know requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.bench.http import HttpError, Target
from quire.errors import ConfigError

SLOT_STATES = ("filled", "reserved", "waste", "cached", "pending", "free")
COLOURS = {
    "filled": "#2166ac",
    "reserved": "#67a9cf",
    "waste": "#d6604d",
    "cached": "#a6dba0",
    "pending": "#dfc27d",
    "free": "#f0f0f0",
}
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_slots_shared")

_LINE = re.compile(r"^(?:quire|vllm):(\w+)(?:\{(.*)\})?\s+(\S+)")
_STATE = re.compile(r'\bstate="(\w+)"')


@dataclass
class Sample:
    """What /metrics said at one moment, `time_s` after the start. num_sent: requests that the client had on their way."""

    time_s: float
    num_sent: int = 0
    gauges: dict[str, float] = field(default_factory=dict)
    slots: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"time_s": round(self.time_s, 3), "num_sent": self.num_sent, **self.gauges, "slots": self.slots}


def read_metrics(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """GAUGES by name, and slots by state, of a text in Prometheus' form; each summed over the models that it tells of."""
    gauges: dict[str, float] = {}
    slots: dict[str, float] = {}
    for line in text.splitlines():
        if (match := _LINE.match(line)) is None:
            continue
        name, labels, value = match.groups()
        state = _STATE.search(labels or "")
        try:
            number = float(value)
        except ValueError:
            continue
        if name in GAUGES:
            gauges[name] = gauges.get(name, 0.0) + number
        elif name == "kv_slots" and state is not None:
            slots[state[1]] = slots.get(state[1], 0.0) + number
    return gauges, slots


async def sample(target: Target, time_s: float, num_sent: int, timeout_s: float = 10.0) -> Sample:
    """One look at /metrics. A server without it, or too busy for it, gives a sample with nothing of its own in it."""
    found = Sample(time_s, num_sent)
    with contextlib.suppress(OSError, HttpError, TimeoutError):
        async with asyncio.timeout(timeout_s), target.open("GET", "/metrics") as response:
            if response.status == 200:
                found.gauges, found.slots = read_metrics((await response.read()).decode("utf-8", "replace"))
    return found


async def watch(
    target: Target,
    samples: list[Sample],
    now_s: Callable[[], float],
    num_sent: Callable[[], int],
    interval_s: float = 1.0,
) -> None:
    """Adds a sample every `interval_s`, until it is cancelled."""
    while True:
        samples.append(await sample(target, now_s(), num_sent()))
        await asyncio.sleep(interval_s - now_s() % interval_s)


def tokens_per_second(times: Iterable[float], bin_s: float = 1.0) -> tuple[list[float], list[float]]:
    """Middles of bins from 0 to the last time, and events a second in each."""
    counts: dict[int, int] = {}
    for time_s in times:
        counts[int(time_s / bin_s)] = counts.get(int(time_s / bin_s), 0) + 1
    bins = range(max(counts, default=-1) + 1)
    return [(i + 0.5) * bin_s for i in bins], [counts.get(i, 0) / bin_s for i in bins]


# -- the picture -------------------------------------------------------------------------------------------------------------
def check_can_plot() -> None:
    """Raises ConfigError if matplotlib is missing: better before a run than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'quire[bench]'") from error


def plot(path: str | Path, title: str, samples: Sequence[Sample], token_times: Sequence[float]) -> list[Path]:
    """Draws the run as FILE.svg and FILE.png, or as the one that FILE's ending names. Returns what was written.

    Raises ConfigError if matplotlib is missing or the file cannot be written.
    """
    check_can_plot()
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    is_named = path.suffix.lower() in (".svg", ".png")
    paths = [path] if is_named else [path.with_name(path.name + ending) for ending in (".svg", ".png")]
    figure = Figure(figsize=(9, 8), layout="constrained")
    memory, queue, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    figure.suptitle(textwrap.fill(title, 100), fontsize=11)
    _draw_memory(memory, samples)
    _draw_queue(queue, samples)
    middles, rates = tokens_per_second(token_times)
    speed.plot(middles, rates, color=COLOURS["filled"], linewidth=1.2)
    speed.set(ylabel="output tokens / s", xlabel="seconds", ylim=(0, None))
    for axes in (memory, queue, speed):
        axes.grid(alpha=0.25)
        axes.margins(x=0)
    # the same run gives the same file
    with matplotlib.rc_context({"svg.hashsalt": "quire"}):
        for one in paths:
            try:
                figure.savefig(one, dpi=130, metadata={"Date": None} if one.suffix == ".svg" else None)
            except OSError as error:
                raise ConfigError(f"cannot write the plot {one}: {error.strerror}") from error
    return paths


def _draw_memory(axes: Any, samples: Sequence[Sample]) -> None:
    told = [sample for sample in samples if sample.slots]
    if not told:
        told = [sample for sample in samples if "kv_cache_usage_perc" in sample.gauges]
        values = [100 * sample.gauges["kv_cache_usage_perc"] for sample in told]
        axes.plot([sample.time_s for sample in told], values, color=COLOURS["filled"])
        axes.set(ylabel="KV cache in use, %", ylim=(0, 100))
        return
    times = [sample.time_s for sample in told]
    layers = [[sample.slots.get(state, 0.0) for sample in told] for state in SLOT_STATES]
    axes.stackplot(times, layers, labels=SLOT_STATES, colors=[COLOURS[state] for state in SLOT_STATES])
    shared = _series(told, "kv_slots_shared")
    if any(shared):
        axes.plot(times, shared, color="black", linestyle="--", linewidth=1, label="saved by sharing")
    axes.set(ylabel="KV slots (tokens)", ylim=(0, None))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=7, fontsize=8, frameon=False)


def _draw_queue(axes: Any, samples: Sequence[Sample]) -> None:
    times = [sample.time_s for sample in samples]
    axes.plot(times, [sample.num_sent for sample in samples], color="#999999", linewidth=1, label="sent, not answered")
    told = [sample for sample in samples if "num_requests_running" in sample.gauges]
    times = [sample.time_s for sample in told]
    axes.plot(times, _series(told, "num_requests_running"), color=COLOURS["filled"], label="running")
    axes.plot(times, _series(told, "num_requests_waiting"), color=COLOURS["waste"], label="waiting")
    axes.set(ylabel="requests", ylim=(0, None))
    axes.legend(loc="upper right", fontsize=8)


def _series(samples: Sequence[Sample], name: str) -> list[float]:
    return [sample.gauges.get(name, 0.0) for sample in samples]


def waste_ratio(samples: Iterable[Sample]) -> float | None:
    """Internal waste / slots of held blocks, summed over all samples; None if they tell of none."""
    sums = dict.fromkeys(("filled", "reserved", "waste"), 0.0)
    for sample in samples:
        for state in sums:
            sums[state] += sample.slots.get(state, 0.0)
    held = sum(sums.values())
    return sums["waste"] / held if held else None
