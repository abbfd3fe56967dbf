"""/metrics over time: read, sampled, drawn."""

import asyncio
import sys
import time

import pytest

from quire.bench import timeline
from quire.bench.http import Target
from quire.bench.timeline import Sample, plot, read_metrics, tokens_per_second, waste_ratio, watch
from quire.errors import ConfigError
from sse_server import SseServer

METRICS = """\
# HELP quire:num_requests_running requests that run
quire:num_requests_running{model_name="m"} 3.0
quire:num_requests_waiting{model_name="m"} 1e1
quire:kv_cache_usage_perc{model_name="m"} 0.25
quire:kv_slots{model_name="m",state="filled"} 70.0
quire:kv_slots{model_name="m",state="waste"} 10.0
quire:kv_slots{model_name="m",state="free"} 20.0
quire:kv_slots_all{model_name="m"} 100.0
quire:kv_slots_shared{model_name="m"} 16.0
quire:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 4.0
process_open_fds 9.0
"""


def samples(slots=True):
    held = {"filled": 9.0, "waste": 1.0} if slots else {}
    return [Sample(float(i), i, {"num_requests_running": i, "kv_cache_usage_perc": 0.1}, held) for i in range(4)]


def test_metrics_are_read():
    gauges, slots = read_metrics(METRICS)
    assert gauges == {
        "num_requests_running": 3,
        "num_requests_waiting": 10,
        "kv_cache_usage_perc": 0.25,
        "kv_slots_shared": 16,
    }
    assert slots == {"filled": 70, "waste": 10, "free": 20}


def test_vllms_metrics_are_read_too():
    assert read_metrics('vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 3.0')[0] == {
        "num_requests_running": 5
    }


@pytest.mark.parametrize("metrics", [METRICS, ""])
def test_a_server_is_watched(metrics):
    found: list[Sample] = []

    async def run(url):
        watcher = asyncio.create_task(watch(Target.from_url(url), found, time.perf_counter, lambda: 7, interval_s=0.02))
        while len(found) < 3:
            await asyncio.sleep(0.005)
        watcher.cancel()

    with SseServer(metrics=metrics) as server:
        asyncio.run(run(server.url))
    assert [sample.num_sent for sample in found[:3]] == [7, 7, 7]
    assert found[0].time_s < found[1].time_s
    assert found[0].slots == ({"filled": 70, "waste": 10, "free": 20} if metrics else {})


def test_tokens_per_second():
    assert tokens_per_second([0.1, 0.2, 2.9]) == ([0.5, 1.5, 2.5], [2, 0, 1])
    assert tokens_per_second([]) == ([], [])


def test_waste_is_of_what_is_held():
    assert waste_ratio(samples()) == pytest.approx(0.1)
    assert waste_ratio(samples(slots=False)) is None


@pytest.mark.parametrize("slots", [True, False])
def test_both_pictures_are_drawn(slots, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot(tmp_path / "run.1", "a run", samples(slots), [0.5, 1.5])
    assert [path.name for path in paths] == ["run.1.svg", "run.1.png"]
    assert b"<svg" in paths[0].read_bytes() and paths[1].read_bytes().startswith(b"\x89PNG")
    before = paths[0].read_bytes()
    plot(tmp_path / "run.1", "a run", samples(slots), [0.5, 1.5])
    assert paths[0].read_bytes() == before


def test_one_picture_is_drawn_where_its_ending_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    assert [path.name for path in plot(tmp_path / "run.png", "a run", [], [])] == ["run.png"]
    with pytest.raises(ConfigError, match="cannot write the plot"):
        plot(tmp_path / "no" / "run.png", "a run", [], [])


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"quire\[bench\]"):
        timeline.check_can_plot()
