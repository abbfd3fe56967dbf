"""Numbers from records, against numbers worked out by hand."""

import random

import numpy as np
import pytest

from quire.bench.load import Record
from quire.bench.summary import Summary, is_good, parse_goodput, percentile
from quire.errors import ConfigError


def record(*token_s, sent_s=0.0, num_output=None, error=None, **more):
    count = len(token_s) if num_output is None else num_output
    return Record(0, sent_s=sent_s, token_s=list(token_s), num_output=count, num_prompt=10, error=error, **more)


def test_one_request():
    one = record(1.5, 1.7, 2.1, sent_s=1.0)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2e_s == pytest.approx(1.1)
    assert one.tpot_s == pytest.approx(0.3)
    assert one.gaps_s == pytest.approx([0.2, 0.4])


def test_an_answer_of_one_token_has_no_time_per_further_token():
    assert record(0.5).tpot_s is None
    assert record(0.5).gaps_s == []


def test_tokens_that_came_together_count_as_many():
    assert record(1.0, 2.0, num_output=5).tpot_s == pytest.approx(0.25)


def test_percentiles_are_numpys():
    values = [random.Random(i).random() for i in range(77)]
    for percent in (0, 12.5, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([4.0], 99) == 4.0


def test_summary():
    records = [
        record(1.0, 2.0),
        record(0.5, 1.0, 1.5, 2.0),
        record(error="HTTP 429: full"),
        record(error="HTTP 429: full"),
    ]
    summary = Summary(records, 4.0, {"ttft": 0.6})
    facts = summary.facts()
    assert facts["requests_ok"] == 2 and facts["requests_failed"] == 2
    assert facts["requests_per_s"] == 0.5
    assert facts["output_tokens_per_s"] == 1.5
    assert facts["total_tokens_per_s"] == 6.5
    # (2.0 / 2 + 2.0 / 4) / 2
    assert facts["normalized_latency_ms_per_token"] == pytest.approx(750)
    assert facts["goodput_requests_per_s"] == 0.25 and facts["goodput_share"] == 0.25
    assert facts["errors"] == {"HTTP 429: full": 2}
    ttft, tpot, itl, e2e = summary.latency_rows()
    assert (ttft["mean"], ttft["median"], ttft["max"]) == pytest.approx((750, 750, 1000))
    assert tpot["mean"] == pytest.approx(750)
    assert itl["mean"] == pytest.approx(625) and itl["median"] == pytest.approx(500)
    assert e2e["p99"] == pytest.approx(2000)


def test_a_run_without_answers_has_no_latencies():
    summary = Summary([record(error="x")], 1.0, {})
    assert summary.normalized_s is None
    assert all(row["mean"] is None for row in summary.latency_rows())
    assert summary.facts()["requests_ok"] == 0


def test_goodput_needs_every_limit():
    limits = parse_goodput(["ttft:500", "tpot:200", "e2e:1000"])
    assert limits == {"ttft": 0.5, "tpot": 0.2, "e2e": 1.0}
    assert is_good(record(0.5, 0.7, 0.9), limits)
    assert not is_good(record(0.6, 0.7), limits)  # first token
    assert not is_good(record(0.1, 0.4), limits)  # between tokens
    assert not is_good(record(0.4, 0.6, 0.8, 1.0, 1.1), limits)  # the end
    assert is_good(record(0.4), limits)  # one token: no time between
    assert not is_good(record(0.4, error="x"), limits)


@pytest.mark.parametrize("limit", ["ttft", "ttft:", "first:3", "ttft:-1", "ttft:1e3", "ttft:nan"])
def test_what_is_no_limit_is_refused(limit):
    with pytest.raises(ConfigError, match="goodput"):
        parse_goodput([limit])
