"""The benchmarks of the engine on a model of next to nothing: what they report belongs together. No time is judged."""

import argparse
import json
import weakref
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quire import cli
from quire.bench import first_token, rates, startup
from quire.bench import peer as peer_module
from quire.bench.floors import Ceilings
from quire.bench.long_prompt import gap_row
from quire.bench.subject import Subject, decode_params
from quire.bench.traffic import items_of
from quire.config import EngineConfig
from sse_server import Reply, SseServer


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs one; gives its JSON. Ceilings are known, and so floors are."""
    monkeypatch.setattr("quire.bench.subject.measure_ceilings", lambda device, dtype: Ceilings(1e10, 1e11))

    def run(name: str, *options: str) -> dict[str, Any]:
        file = tmp_path / "report.json"
        assert cli.main(["bench", name, "--shape", "dummy", "--device", "cpu", *options, "--json", str(file)]) == 0
        return json.loads(file.read_text())

    return run


def test_throughput_beside_its_floor(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "step.svg"
    found = bench("throughput", "--num-prompts", "5", "--repeat", "2", "--trace", str(trace), "--svg", str(picture))
    (row,) = found["rows"]
    assert row["fastest"] <= row["seconds"] <= row["slowest"]
    assert found["ceilings"] == {"read TB/s": 0.01, "matmul TFLOP/s": 0.1}
    assert found["steps"][0]["way"] == "eager"
    floor_s = found["floor s (of the steps that the last run made)"]
    assert sum(step["steps"] * step["floor ms"] for step in found["steps"]) == pytest.approx(1e3 * floor_s)
    steps_s = sum(step["seconds"] for step in found["steps"])
    assert 0 <= found["s between steps (of the last run)"] < 5.0
    assert row["fastest"] <= steps_s + found["s between steps (of the last run)"] <= row["slowest"]
    parts = found["floor, parts"]
    assert max(parts["weights s"], parts["matmul s"]) + parts["KV s"] <= floor_s <= sum(parts.values())
    step, recorded = found["steps"][0], found["recorded"][0]
    assert step["kernels ms"] + step["gaps ms"] == pytest.approx(recorded["ms/step"])
    assert {"linear layers", "attention", "norm, rotary, activation"} <= {
        kernel["kind"] for kernel in found["step kernels"]
    }
    assert sum(kernel["us/step"] for kernel in found["step kernels"]) == pytest.approx(1e3 * step["kernels ms"])
    assert json.loads(trace.read_text())["traceEvents"]
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert "kernels of a step (eager), by time" in capsys.readouterr().out


def test_throughput_without_a_profile_has_none(bench: Any) -> None:
    found = bench("throughput", "--num-prompts", "2", "--repeat", "1")
    assert "step kernels" not in found and "kernels ms" not in found["steps"][0]


def test_a_peer_answers_a_part_of_the_list_in_batches(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    generated: list[int] = []
    generate = peer_module._generate

    def counted(model: Any, device: str, batch: peer_module.Batch, temperature: float) -> float:
        generated.append(len(batch[0]))
        return generate(model, device, batch, temperature)

    monkeypatch.setattr(peer_module, "_generate", counted)
    options = ["--peer", "transformers", "--peer-requests", "3", "--peer-batch", "2"]
    found = bench("throughput", "--num-prompts", "4", "--repeat", "1", *options)
    assert generated == [2, 2, 1], "a warm-up, a batch, and what is left"
    whole, part, peer = found["rows"]
    assert [row["engine"] for row in found["rows"]] == ["quire", "quire", "transformers"]
    assert [row["requests"] for row in found["rows"]] == [4, 3, 3]
    assert whole["times the peer"] is None and peer["times the peer"] == 1
    assert part["times the peer"] == pytest.approx(peer["seconds"] / part["seconds"])
    # the same useful tokens, whatever the static batch computed beside them
    assert part["output tok/s"] * part["seconds"] == pytest.approx(peer["output tok/s"] * peer["seconds"])


def test_latency_has_a_row_for_each_number_of_requests(bench: Any) -> None:
    found = bench("latency", "--num-requests", "1", "3", "--input-len", "20", "--output-len", "6", "--repeat", "1")
    one, three = found["rows"]
    assert [one["requests"], three["requests"]] == [1, 3]
    assert three["its floor"] > one["its floor"] > 0 and three["floor"] > one["floor"] > 0
    assert one["share"] == pytest.approx(one["floor"] / one["ms per token"])
    assert one["last token ms"] == pytest.approx(one["first token ms"] + 5 * one["ms per token"])


def test_prefill_counts_the_prompts_tokens(bench: Any) -> None:
    found = bench(
        "prefill", "--num-prompts", "3", "--input-len", "50", "--repeat", "1", "--max-num-batched-tokens", "64"
    )
    (row,) = found["rows"]
    assert row["tokens/s"] * row["seconds"] == pytest.approx(150)
    assert sum(step["steps"] * step["tokens/step"] for step in found["steps"]) == 150
    assert row["share"] == pytest.approx(row["floor s"] / row["seconds"])
    assert row["TFLOP/s"] == pytest.approx(found["floor, parts"]["matmul s"] * 0.1 / row["seconds"])


def test_decode_profiles_each_mode(bench: Any) -> None:
    found = bench("decode", "--num-requests", "2", "--input-len", "10", "--output-len", "12", "--repeat", "1")
    assert [row["mode"] for row in found["rows"]] == ["graphs", "eager"]
    assert set(found["modes"]) == {"graphs", "eager"}
    for row in found["rows"]:
        assert row["launched/step"] > 0 and row["kernels ms/step"] > 0
        assert row["share"] == pytest.approx(row["floor"] / row["ms per token"])


def test_a_long_prompt_beside_others(bench: Any) -> None:
    options = ["--prompt-len", "300", "--num-requests", "3", "--input-len", "8", "--steps", "5"]
    found = bench("long-prompt", *options, "--max-num-batched-tokens", "64")
    before, during, after = found["rows"]
    assert [row["gaps"] for row in (before, after)] == [15, 15]
    # 61 tokens of it fit beside the three others in each step
    assert found["steps in which it was read"] == 5 and during["gaps"] == 15
    assert during["within the target"] is None
    assert found["prompt tokens/s"] == pytest.approx(300 / found["prompt read s"])


def test_gaps_within_a_target() -> None:
    row = gap_row("during", [10.0, 20.0, 30.0, 60.0], 30.0)
    assert (row["median ms"], row["longest ms"], row["within the target"]) == (25.0, 60.0, 0.75)
    assert gap_row("after", [], 30.0)["longest ms"] is None


def test_rates_rise_until_the_latency_does(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With latencies as they would be on a machine that saturates at 40 requests a second."""
    real = rates.rate_row

    def saturating(rate: float, answered: list[Any]) -> dict[str, Any]:
        return {**real(rate, answered), "median s/token": 0.01 if rate <= 40 else 0.05}

    monkeypatch.setattr(rates, "rate_row", saturating)
    picture = tmp_path / "curve.svg"
    options = [
        "--first-rate",
        "20",
        "--factor",
        "2",
        "--seconds",
        "0.1",
        "--length-scale",
        "0.1",
        "--svg",
        str(picture),
    ]
    found = bench("rates", *options)
    assert [row["requests/s"] for row in found["rows"]] == [20, 40, 80]
    assert [row["requests"] for row in found["rows"]] == [2, 4, 8]
    assert found["last rate within 3 times the plateau"] == 40
    assert found["plateau, s/token"] == 0.01
    assert sum(1 for element in ElementTree.parse(picture).iter() if element.tag.endswith("circle")) == 6


@pytest.mark.parametrize("processes", ["1", "2"])
def test_rates_over_http(processes: str, tmp_path: Path) -> None:
    """A pretend server whose tokens come every 20 ms, and at the third rate every 200 ms."""

    def behave(path: str, body: Any, count: int) -> Reply:
        return Reply(["x"] * body["max_tokens"], 0.2 if count >= 2 + 2 + 4 else 0.02)

    trace, file, picture = tmp_path / "trace.json", tmp_path / "report.json", tmp_path / "curve.svg"
    trace.write_text(json.dumps([[5, 3], [9, 4]]))
    with SseServer(behave, max_model_len=64) as server:
        options = ["--url", server.url, "--workload", str(trace), "--client-processes", processes]
        options += ["--first-rate", "20", "--factor", "2", "--seconds", "0.1", "--svg", str(picture)]
        assert cli.main(["bench", "rates", *options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["requests"] for row in found["rows"]] == [2, 4, 8]
    fast, _, slow = (row["median s/token"] for row in found["rows"])
    assert 0.018 < fast < 0.2 <= slow
    assert found["last rate within 3 times the plateau"] == 40 and found["device"] == server.url
    assert found["title"] == "pretend: trace.json at rising rates, over HTTP"
    bodies = server.bodies
    assert len(bodies) == 2 + 2 + 4 + 8  # it was warmed up with two
    assert sorted(len(body["prompt"]) for body in bodies[2:4]) == [5, 9]
    assert bodies[0]["ignore_eos"] and bodies[0]["stream"] and bodies[0]["model"] == "pretend"
    assert picture.exists()


def test_rates_over_http_tell_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with SseServer(lambda path, body, count: Reply(status=503, message="too busy"), max_model_len=640) as server:
        assert cli.main(["bench", "rates", "--url", server.url]) != 0
    assert "4 of 4 requests failed: HTTP 503: too busy" in capsys.readouterr().err
    with SseServer() as server:
        assert cli.main(["bench", "rates", "--url", server.url]) == 2
    assert "does not tell how many tokens" in capsys.readouterr().err


def test_a_traces_own_times_are_scaled_to_the_rate() -> None:
    items = list(items_of([(5, 5)] * 4))

    items = [replace(item, arrival_s=at) for item, at in zip(items, (10.0, 10.1, 10.1, 14.0))]
    args = type("Args", (), {"seconds": 2.0, "arrivals": "trace", "seed": 0})
    part, times = rates.choose(items, 2.0, args)
    assert len(part) == 4
    assert times == pytest.approx([0, 0.05, 0.05, 2.0])
    args.arrivals = "poisson"
    part, times = rates.choose(items, 5.0, args)
    assert len(part) == 10 and part[4] == items[0]  # a short trace goes round
    assert times == sorted(times) and times[0] == 0


def test_normalized_latency() -> None:
    answered = [rates.Answered(1.0, 0.5, 10), rates.Answered(4.0, 0.1, 10), rates.Answered(2.0, 0.2, 10)]
    row = rates.rate_row(3.0, answered)
    assert row["median s/token"] == pytest.approx(0.2)
    assert row["mean s/token"] == pytest.approx(0.7 / 3)
    assert row["first token ms, median"] == pytest.approx(200)


def test_a_start_in_parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_environment", lambda cache: None)  # the C kernels are there already
    config = EngineConfig(model=str(tiny_model), load_format="dummy", skip_tokenizer_init=True, device="cpu")
    parts, compiled = startup.offline(config, 4, tiny_model, 120)
    total = parts.pop("offline: from the command to the first token")
    assert sum(parts.values()) == pytest.approx(total)
    assert {"import of torch", "model built", "weights", "KV memory and rows", "first token"} <= set(parts)
    assert all(seconds > 0 for seconds in parts.values())
    assert parts["not accounted for"] < 0.5 * total
    assert compiled == {"kernels": 0, "seconds": 0, "found": 0}


def test_a_start_that_fails_says_why(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model=str(tiny_model / "none"), device="cpu")
    monkeypatch.setattr(startup, "_environment", lambda cache: None)
    with pytest.raises(Exception, match="none"):
        startup.offline(config, 4, tiny_model, 120)


def test_parts_within_parts_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr(first_token.time, "perf_counter", lambda: next(clock))
    parts = first_token.Parts()
    with parts.part("outer"), parts.part("inner"):
        pass
    assert parts.seconds == {"inner": 2.0, "outer": 8.0}


def test_options_for_a_server_are_those_that_are_no_defaults() -> None:
    config = EngineConfig(
        model="m",
        dtype="bfloat16",
        enable_prefix_caching=False,
        enforce_eager=True,
        hf_overrides={"a": 1},
        swap_space=0.0,
    )
    assert startup.engine_options(config) == [
        "--model", "m", '--hf-overrides={"a": 1}', "--dtype=bfloat16", "--swap-space=0.0", "--no-enable-prefix-caching",
        "--enforce-eager",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["throughput", "--num-prompts", "0", "--shape", "dummy"],
        ["latency", "--output-len", "1", "--shape", "dummy"],
        ["prefill", "--input-len", "0", "--shape", "dummy"],
        ["long-prompt", "--steps", "0", "--shape", "dummy"],
        ["long-prompt", "--num-requests", "9", "--max-num-seqs", "9", "--shape", "dummy"],
        ["rates", "--factor", "1", "--shape", "dummy"],
        ["rates", "--arrivals", "trace", "--shape", "dummy"],
        ["rates", "--url", "http://127.0.0.1:1", "--shape", "dummy"],
        ["rates", "--url", "http://127.0.0.1:1", "--client-processes", "0"],
        ["startup", "--input-len", "0", "--shape", "dummy"],
        ["prefill"],
    ],
)
def test_options_that_make_no_sense_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *command]) == 2
    assert capsys.readouterr().err


def test_a_subject_that_is_shut_down_leaves_its_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or there would be none for a peer on the same device."""
    monkeypatch.setattr("quire.bench.subject.measure_ceilings", lambda device, dtype: Ceilings(1e10, 1e11))
    subject = Subject(
        EngineConfig(
            model=str(tiny_model), load_format="dummy", skip_tokenizer_init=True, device="cpu", max_model_len=64
        )
    )
    runner = subject.engine.executor.worker.runner
    held = [weakref.ref(runner.model), weakref.ref(runner.store)]
    del runner
    args = argparse.Namespace(profile=True, trace=None, svg=None)
    subject.tables(args, "", lambda: subject.together([[3, 4], [5, 6]], decode_params(8)))
    subject.shutdown()
    assert [ref() for ref in held] == [None, None]


def test_prompts_of_one_token_have_a_first_step(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.bench.subject.measure_ceilings", lambda device, dtype: Ceilings(1e10, 1e11))
    subject = Subject(
        EngineConfig(
            model=str(tiny_model), load_format="dummy", skip_tokenizer_init=True, device="cpu", max_model_len=64
        )
    )
    timing = subject.together([[3], [5]], decode_params(4))
    first, *others = subject.watch.steps
    assert timing.first_floor_s == subject.watch.floor([first]).seconds > 0
    assert timing.token_floor_s == pytest.approx(subject.watch.floor(others).seconds / 3)
    assert timing.token_s == pytest.approx(timing.decode_s / 3)
    subject.shutdown()
