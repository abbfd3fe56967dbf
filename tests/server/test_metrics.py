"""What /metrics tells, under the names that vLLM's users have on their dashboards."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quire.server.metrics import Distribution
from quire.server.protocol import NO_EFFECT
from support import ROOT


def test_a_distribution_counts_into_cumulative_buckets() -> None:
    found = Distribution((1, 2, 5))
    for value, times in ((0.5, 1), (1, 1), (3, 2), (100, 1)):
        found.observe(value, times)
    assert found.buckets() == [("1.0", 2.0), ("2.0", 2.0), ("5.0", 4.0), ("+Inf", 5.0)]
    assert found.sum == pytest.approx(107.5)


def test_names_of_vllm_with_our_prefix(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    expected = {
        "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"],
        "counter": [
            *("num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens"),
            *("client_generation_tokens", "client_prompt_tokens", "forked_requests"),
            *("request_success", "preemptions", "swapped_blocks", "copied_blocks", "recomputed_tokens"),
        ],
        "histogram": [
            *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
            *("request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
        ],
    }
    for kind, names in expected.items():
        for name in names:
            assert families[f"quire:{name}"].type == kind
            assert all(sample.labels["model_name"] == "tiny" for sample in families[f"quire:{name}"].samples)
    assert {sample.labels["state"] for sample in families["quire:kv_slots"].samples} == {
        *("filled", "reserved", "waste", "cached", "pending", "free")
    }


def test_slots_and_tokens_add_up(server: Any) -> None:
    before = server.wait_until_empty()
    with server.http() as http:
        body: dict[str, Any] = {"prompt": ["one", "two"], "n": 2, "max_tokens": 7, "ignore_eos": True}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            response.read()
    after = server.wait_until_empty()

    def grown(name: str) -> float:
        return float(after[f"quire:{name}"] - before[f"quire:{name}"])

    assert grown("prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert grown("generation_tokens_total") == 2 * usage["completion_tokens"] == 56
    assert grown('request_success_total{finished_reason="length"}') == 8
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 4
    assert grown("inter_token_latency_seconds_count") >= 2 * 2 * 6
    assert grown("request_generation_tokens_sum") == 56
    states = [value for name, value in after.items() if name.startswith("quire:kv_slots{")]
    assert len(states) == 6 and sum(states) == after["quire:kv_slots_all"] == 4096 * 16


def test_preemptions_by_kind(make_server: Callable[..., Any]) -> None:
    """Too few blocks for all that run: some make room, by recomputation and by swapping, and are answered all the same."""
    server = make_server("--num-gpu-blocks-override", "24", "--max-model-len", "256", "--preemption-mode", "forks")
    with server.http() as http:
        body = {"prompt": ["one", "two", "three", "four"], "max_tokens": 120, "ignore_eos": True}
        for n in (1, 2):
            found = http.post("/v1/completions", json={**body, "n": n}).json()
            assert found["usage"]["completion_tokens"] == 4 * n * 120
    counts = server.wait_until_empty()
    told = {name: count for name, count in counts.items() if name.startswith("quire:preemptions_total{")}
    assert all('cause="' in name and 'reason="' in name for name in told)
    assert sum(count for name, count in told.items() if 'cause="out of blocks"' in name) == sum(told.values())
    by_kind = {
        kind: sum(count for name, count in told.items() if f'kind="{kind}"' in name) for kind in ("recompute", "swap")
    }
    assert min(by_kind.values()) > 0
    assert counts["quire:num_preemptions_total"] == sum(by_kind.values())
    assert counts["quire:recomputed_tokens_total"] > 0
    assert counts['quire:swapped_blocks_total{direction="out"}'] > 0
    server.stop()


def test_the_dashboard_asks_for_metrics_that_there_are(http: httpx.Client) -> None:
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    told = set(re.findall(r"quire:\w+", http.get("/metrics").text))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"quire:\w+", expression)}
    assert len(asked) > 20 and asked <= told


def test_the_documented_fields_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "server.md").read_text()
    (section,) = re.findall(r"\*\*accepted without effect\*\*:(.*?)\.\n- ", text, re.DOTALL)
    assert set(re.findall(r"`([\w.]+)`", section)) == NO_EFFECT
