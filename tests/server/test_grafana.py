"""docs/grafana.json: a dashboard that Grafana can import, of metrics that there are."""

import json
import re

import pytest

from support import ROOT

# What a server tells at /metrics, without the prefix `quire:`; counters without _total, histograms without _bucket.
GAUGES = {
    *("num_requests_running", "num_requests_waiting", "num_requests_queued", "num_sequences_running", "engine_up"),
    *("kv_cache_usage_perc", "kv_blocks", "kv_blocks_all", "kv_slots", "kv_slots_all", "kv_slots_shared"),
    "kv_internal_waste_ratio",
}
COUNTERS = {
    *(
        "num_preemptions",
        "preemptions",
        "swapped_blocks",
        "copied_blocks",
        "recomputed_tokens",
        "steps",
        "computed_tokens",
    ),
    *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens"),
    *("forked_requests", "client_prompt_tokens", "client_generation_tokens"),
    *("request_success", "request_errors", "request_aborts", "engine_restarts"),
}
HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens"),
}
KNOWN = (
    GAUGES
    | {f"{name}_total" for name in COUNTERS}
    | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
)


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((ROOT / "docs" / "grafana.json").read_text())


def expressions(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_every_panel_says_what_it_shows(dashboard):
    for panel in dashboard["panels"]:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"] and panel["targets"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)


def test_every_metric_is_one_that_a_server_tells(dashboard):
    found = {name for text in expressions(dashboard) for name in re.findall(r"quire:(\w+)", text)}
    assert found <= KNOWN, found - KNOWN
    # and what no other engine tells is shown
    assert {
        "kv_slots",
        "kv_internal_waste_ratio",
        "kv_slots_shared",
        "copied_blocks_total",
        "recomputed_tokens_total",
    } <= found
    unused = GAUGES | {f"{name}_total" for name in COUNTERS} | {f"{name}_bucket" for name in HISTOGRAMS}
    assert not unused - found, "metrics that no panel shows"


def test_every_query_is_of_the_chosen_model(dashboard):
    for text in expressions(dashboard):
        assert text.count("quire:") == text.count('model_name="$model"'), text
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")


def test_data_source_is_a_choice(dashboard):
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "model"]
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
