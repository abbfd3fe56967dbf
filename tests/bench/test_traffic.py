"""What a load generator sends, and when."""

import itertools
import json
import math
import random
import statistics

import pytest

from quire.bench.traffic import (
    Item,
    Piece,
    PromptMaker,
    arrival_times,
    fit,
    items_of,
    read_items,
    scale_lengths,
    scale_to_fit,
    trace_times,
)
from quire.errors import ConfigError
from support import shared_data


def write(path, *objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


# -- sources -------------------------------------------------------------------------------------------------------------
def test_csv_with_times_is_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n5.5,7,3\n5,20,0\n")
    items = read_items(path)
    assert [(item.num_prompt, item.num_output, item.arrival_s) for item in items] == [(20, 1, 5.0), (7, 3, 5.5)]
    assert trace_times(items, 2.0) == [0.0, 1.0]


def test_lists_of_lengths_have_no_times(tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text("[[4, 5], [6, 7]]")
    items = read_items(path)
    assert [(item.num_prompt, item.num_output) for item in items] == [(4, 5), (6, 7)]
    assert trace_times(items, 1.0) is None


def test_texts(tmp_path):
    lines = tmp_path / "poem.txt"
    lines.write_text("one\n\ntwo\n")
    assert [item.text for item in read_items(lines)] == ["one", "two"]
    questions = write(tmp_path / "q.jsonl", {"question": "why?"}, {"question": "how?"})
    assert [item.text for item in read_items(questions, "question")] == ["why?", "how?"]
    turns = write(tmp_path / "turns.jsonl", {"turns": ["first", "second"]})
    assert [item.text for item in read_items(turns, "turns")] == ["first"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "x,y\n1,2\n"), ("a.json", "[[1]]"), ("a.jsonl", '{"question": "?"}'), ("a.txt", ""), ("a.json", "{")],
)
def test_what_is_no_workload_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="workload"):
        read_items(tmp_path / name)


def test_missing_workload_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_items(tmp_path / "none.csv")


def test_mooncake_prompts_share_what_their_hashes_share(tmp_path):
    path = write(
        tmp_path / "mooncake.jsonl",
        {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1500, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 7]},
    )
    items = read_items(path)
    one, other = map(PromptMaker(500).token_ids, items)
    assert (len(one), len(other)) == (1200, 1030)
    assert one[:1024] == other[:1024] and one[1024:1030] != other[1024:]
    assert trace_times(items, 1.0) == [0.0, 1.5]
    # scaled to a tenth, they share a tenth of it
    short = [PromptMaker(500).token_ids(scale_lengths(item, 0.1)) for item in items]
    assert list(map(len, short)) == [120, 103]
    assert short[0][:102] == short[1][:102] and short[0][102] != short[1][102]


def test_real_traces_are_read():
    for name, count in (
        ("azure2023_conv_first30min.csv", 1000),
        ("azure2023_code_first30min.csv", 500),
        ("mooncake_conversation_first20min.jsonl", 1000),
        ("ragpulse_first3days.jsonl", 100),
    ):
        items = read_items(shared_data(f"traces/{name}"))
        times = trace_times(items, 1.0)
        assert len(items) >= count and times is not None
        assert times == sorted(times) and times[0] == 0
        assert min(item.num_prompt for item in items) >= 1


# -- scaling -------------------------------------------------------------------------------------------------------------
def test_scaling_keeps_sums_and_at_least_a_token():
    item = Item(tuple(Piece(str(i), 3) for i in range(100)), num_output=3)
    assert scale_lengths(item, 0.1).num_prompt == 30
    assert scale_lengths(item, 0.1).num_output == 1
    assert scale_lengths(Item((Piece("a", 1),), num_output=1), 0.01).num_prompt == 1


def test_everything_fits_after_the_automatic_scale():
    rng = random.Random(0)
    items = items_of([(rng.randint(1, 9000), rng.randint(1, 3000)) for _ in range(300)])
    scale = scale_to_fit(items, 512)
    scaled = [fit(scale_lengths(item, scale), 512) for item in items]
    assert max(item.num_prompt + item.num_output for item in scaled) in (511, 512)
    assert scale_to_fit(items, 100_000) == 1.0


@pytest.mark.parametrize(("prompt", "output"), [(100, 100), (1000, 1), (1, 1000), (199, 2)])
def test_what_is_too_long_is_shrunk_in_proportion(prompt, output):
    (item,) = items_of([(prompt, output)])
    fitted = fit(item, 64)
    assert fitted.num_prompt + fitted.num_output == 64
    assert fitted.num_prompt >= 1 and fitted.num_output >= 1
    maker = PromptMaker(500)
    assert maker.token_ids(fitted) == maker.token_ids(item)[: fitted.num_prompt]


# -- arrivals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variation_asked_for(burstiness):
    times = arrival_times(40_001, 8.0, burstiness, random.Random(1))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.05)
    variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_an_infinite_rate_sends_all_at_once():
    assert arrival_times(3, math.inf, 1.0, random.Random(0)) == [0.0, 0.0, 0.0]


# -- contents ------------------------------------------------------------------------------------------------------------
def test_prompts_follow_from_the_seed():
    items = items_of([(50, 1), (50, 1)])
    first, again, other = ([PromptMaker(300, seed).token_ids(item) for item in items] for seed in (3, 3, 4))
    assert first == again != other
    assert first[0] != first[1]
    assert all(10 <= token_id < 300 for prompt in first for token_id in prompt)


def test_words_stand_for_ids():
    (item,) = items_of([(12, 1)])
    assert len(PromptMaker(300).text(item).split()) == 12
    assert PromptMaker(300).text(Item(text="as it is")) == "as it is"
