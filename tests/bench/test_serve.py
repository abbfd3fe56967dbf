"""`quire bench serve` against a pretend server: what is sent, what is counted, what is told."""

import json
import signal
import subprocess
import sys
import time

import pytest

from quire import cli
from sse_server import Reply, SseServer

TRACE = "arrival_s,prompt_tokens,output_tokens\n10.0,400,40\n10.1,800,80\n10.3,100,1\n99.0,5,5\n"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def bench(server, *argv, status=0):
    assert cli.main(["bench", "serve", "--url", server.url, *argv]) == status


def measured(tmp_path, server, *argv, status=0):
    bench(server, *argv, "--json", str(tmp_path / "out.json"), status=status)
    return json.loads((tmp_path / "out.json").read_text())


def test_numbers_are_those_of_what_was_streamed(tmp_path):
    metrics = 'quire:num_requests_running 2.0\nquire:kv_slots{state="filled"} 3.0\nquire:kv_slots{state="waste"} 1.0\n'
    pause_s = 0.02
    with SseServer(lambda path, body, count: Reply(["x"] * 5, pause_s, cached=4), metrics) as server:
        found = measured(tmp_path, server, "--num-prompts", "6", "--goodput", "ttft:2000", "e2e:5000")
    assert found["requests_ok"] == 6 and found["requests_failed"] == 0
    assert found["output_tokens"] == 30 and found["prompt_tokens"] == 60 and found["cached_prompt_tokens"] == 24
    assert found["goodput_share"] == 1.0
    assert found["output_tokens_per_s"] == pytest.approx(30 / found["duration_s"])
    assert found["kv_internal_waste_share"] == 0.25
    assert found["timeline"][0]["num_requests_running"] == 2.0
    rows = {row["ms"]: row for row in found["rows"]}
    assert rows["TTFT"]["median"] >= 1000 * pause_s * 0.9
    assert rows["E2E"]["median"] >= 1000 * pause_s * 5 * 0.9
    assert rows["E2E"]["mean"] / 5 == pytest.approx(found["normalized_latency_ms_per_token"])


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_first_token_is_no_empty_delta(endpoint, tmp_path):
    with SseServer(lambda path, body, count: Reply(["x"] * 2)) as server:
        path = tmp_path / "records.jsonl"
        bench(server, "--endpoint", endpoint, "--num-prompts", "2", "--records", str(path))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(record["token_s"]) for record in records] == [2, 2]
    assert all(record["ttft_s"] > 0 and len(record["itl_s"]) == 1 for record in records)


def test_each_failure_is_counted_by_its_reason(tmp_path):
    replies = [
        Reply(status=429, message="the queue is full"),
        Reply(ends_early=True),
        Reply(breaks=True),
        Reply(tokens=[]),
        Reply(pause_s=5.0),
        Reply(),
    ]
    with SseServer(lambda path, body, count: replies[count]) as server:
        argv = ("--num-prompts", "6", "--num-warmups", "0", "--timeout", "0.5", "--max-concurrency", "1")
        found = measured(tmp_path, server, *argv, status=1)
    assert found["requests_ok"] == 1
    assert found["errors"] == {
        "HTTP 429: the queue is full": 1,
        "the stream ended without [DONE]": 1,
        "error in the stream: the engine has died": 1,
        "the answer is empty": 1,
        "no complete answer within 0.5 s": 1,
    }


class WholeServer(SseServer):
    """Answers by a reply's `message`."""

    async def _stream(self, writer, is_chat, reply):
        self._chunk(writer, reply.message.encode())
        writer.write(b"0\r\n\r\n")


def test_answers_in_one_piece_are_timed_by_their_end(tmp_path):
    def behave(path, body, count):
        assert body["stream"] is False and "stream_options" not in body
        what = {"message": {"content": "xy"}} if "chat" in path else {"text": "xy"}
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
        answer = {"choices": [{"index": 0, **what, "finish_reason": "length"}], "usage": usage}
        return Reply(message=json.dumps(answer if count < 3 else {"choices": []}))

    for endpoint in ("completions", "chat"):
        with WholeServer(behave) as server:
            argv = ("--no-stream", "--num-prompts", "3", "--endpoint", endpoint, "--offline-s", "0.5")
            path = tmp_path / "records.jsonl"
            found = measured(tmp_path, server, *argv, "--records", str(path), status=1)
        assert found["requests_ok"] == 2 and found["errors"] == {"what came is no answer": 1}
        assert found["output_tokens"] == 4 and found["prompt_tokens"] == 14 and found["cached_prompt_tokens"] == 6
        assert found["times_offline"] == pytest.approx(found["duration_s"] / 0.5)
        rows = {row["ms"]: row for row in found["rows"]}
        assert rows["TTFT"]["mean"] is rows["TPOT"]["mean"] is None and rows["E2E"]["mean"] > 0
        assert json.loads(path.read_text().splitlines()[0])["finish_reason"] == "length"


def test_several_processes_send_what_one_would(tmp_path):
    argv = ("--num-prompts", "7", "--num-warmups", "0", "--seed", "3", "--max-concurrency", "4")
    found, sent = [], []
    for more in ((), ("--client-processes", "3")):
        with SseServer(lambda path, body, count: Reply(["x"] * 5, 0.01, cached=4)) as server:
            path = tmp_path / "records.jsonl"
            found.append(measured(tmp_path, server, *argv, *more, "--records", str(path)))
        sent.append(sorted(json.dumps(body) for body in server.bodies))
        assert server.most_at_once <= 5  # one more for /metrics
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["index"] for record in records] == list(range(7))
        assert all(len(record["token_s"]) == 5 and record["error"] is None for record in records)
        assert all(0 <= record["sent_s"] < record["token_s"][0] for record in records)
    assert sent[0] == sent[1]
    for name in ("requests_ok", "output_tokens", "prompt_tokens", "cached_prompt_tokens"):
        assert found[0][name] == found[1][name] > 0


def test_tokens_are_counted_where_the_server_tells_no_usage(tmp_path):
    with SseServer(lambda path, body, count: Reply(["x"] * 7, with_usage=False)) as server:
        assert measured(tmp_path, server, "--num-prompts", "1")["output_tokens"] == 7


def test_lengths_are_sent_as_token_ids_that_go_on_to_their_length(tmp_path):
    workload = tmp_path / "lengths.json"
    workload.write_text("[[30, 4], [20, 9]]")
    with SseServer() as server:
        argv = ("--workload", str(workload), "--num-warmups", "0", "--seed", "5", "--extra-body", '{"top_k": 3}')
        found = measured(tmp_path, server, *argv)
        bench(server, *argv)
    one, other, *again = server.bodies
    assert len(one["prompt"]) == 30 and one["max_tokens"] == 4 and one["ignore_eos"] is True and one["top_k"] == 3
    assert one["stream_options"] == {"include_usage": True} and one["model"] == "pretend"
    assert again == [one, other]  # the same seed sends the same
    assert found["answers_shorter_than_asked"] == 2


def test_texts_are_sent_as_chats(tmp_path):
    workload = tmp_path / "q.jsonl"
    workload.write_text('{"question": "why?"}\n')
    with SseServer() as server:
        bench(server, "--workload", str(workload), "--field", "question", "--max-tokens", "9", "--num-warmups", "0")
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "why?"}]
    assert body["max_tokens"] == 9 and "ignore_eos" not in body


def test_a_trace_is_replayed_at_its_times_and_scaled_to_the_context(trace, tmp_path):
    with SseServer(max_model_len=88) as server:
        path = tmp_path / "records.jsonl"
        argv = ("--workload", trace, "--first-seconds", "60", "--length-scale", "auto", "--num-warmups", "0")
        bench(server, *argv, "--records", str(path), "--time-scale", "0.5")
    assert [(len(body["prompt"]), body["max_tokens"]) for body in server.bodies] == [(40, 4), (80, 8), (10, 1)]
    sent = [json.loads(line)["sent_s"] for line in path.read_text().splitlines()]
    assert [time_s - sent[0] for time_s in sent] == pytest.approx([0, 0.05, 0.15], abs=0.04)


def test_requests_beyond_the_context_are_shrunk(trace, tmp_path):
    with SseServer() as server:
        argv = ("--workload", trace, "--max-model-len", "220", "--request-rate", "inf", "--num-warmups", "0")
        found = measured(tmp_path, server, *argv)
    lengths = [(len(body["prompt"]), body["max_tokens"]) for body in server.bodies]
    assert lengths == [(200, 20), (200, 20), (100, 1), (5, 5)]
    assert found["requests_shrunk_to_fit"] == 2


def test_no_more_than_max_concurrency_are_on_their_way(tmp_path):
    with SseServer(lambda path, body, count: Reply(pause_s=0.01)) as server:
        found = measured(tmp_path, server, "--num-prompts", "9", "--max-concurrency", "2", "--num-warmups", "0")
    assert server.most_at_once <= 3  # one more for /metrics
    assert found["waited_for_concurrency_ms_mean"] > 10


def test_what_came_until_ctrl_c_is_told(tmp_path):
    with SseServer(lambda path, body, count: Reply(pause_s=30.0 if count else 0.0)) as server:
        argv = [
            "--url",
            server.url,
            "--num-prompts",
            "2",
            "--num-warmups",
            "0",
            "--max-concurrency",
            "1",
            "--json",
            "-",
        ]
        command = [sys.executable, "-m", "quire", "bench", "serve", *argv]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            while len(server.bodies) < 2:
                time.sleep(0.01)
            client.send_signal(signal.SIGINT)
            found = json.loads(client.communicate(timeout=30)[0])
    assert client.returncode == 130
    assert found["requests_ok"] == 1 and found["errors"] == {"interrupted": 1}


def test_what_several_processes_have_until_ctrl_c_is_told(tmp_path):
    workload = tmp_path / "lengths.json"
    workload.write_text("[[5, 1], [5, 1], [5, 2]]")
    with SseServer(lambda path, body, count: Reply(pause_s=30.0 if body["max_tokens"] == 2 else 0.0)) as server:
        argv = ("--url", server.url, "--workload", str(workload), "--num-warmups", "0", "--client-processes", "2")
        command = [sys.executable, "-m", "quire", "bench", "serve", *argv, "--json", "-"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            while len(server.bodies) < 3:
                time.sleep(0.01)
            client.send_signal(signal.SIGINT)
            found = json.loads(client.communicate(timeout=30)[0])
    assert client.returncode == 130
    assert found["requests_ok"] <= 2 and found["errors"] == {"interrupted": 3 - found["requests_ok"]}


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    with SseServer() as server:
        found = measured(tmp_path, server, "--num-prompts", "2", "--plot", str(tmp_path / "run"))
    assert found["plots"].split(", ") == [str(tmp_path / "run.svg"), str(tmp_path / "run.png")]
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--request-rate", "0"], "not a number above 0"),
        (["--num-prompts", "-1"], "not a whole number"),
        (["--length-scale", "big"], "--length-scale"),
        (["--length-scale", "auto"], "needs --max-model-len"),
        (["--goodput", "speed:3"], "goodput"),
        (["--vocab-size", "5"], "--vocab-size"),
        (["--first-seconds", "5", "--workload", "LIST"], "tells no times"),
        (["--prompt-kind", "ids", "--endpoint", "chat"], "--prompt-kind ids needs"),
        (["--extra-body", "[1]"], "not a JSON object"),
        (["--client-processes", "3", "--max-concurrency", "2"], "at least --client-processes"),
        (["--offline-s", "0"], "not a number above 0"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[[1, 1]]")
    argv = [str(tmp_path / "list.json") if word == "LIST" else word for word in argv]
    with SseServer() as server:
        bench(server, *argv, status=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_no_server_is_one_line(capsys):
    assert cli.main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers at 127.0.0.1:9" in capsys.readouterr().err


def test_a_server_that_refuses_token_ids_is_told_how_to_go_on(capsys):
    def behave(path, body, count):
        is_text = isinstance(body["prompt"], str)
        return Reply() if is_text else Reply(status=400, message="prompt must be a string")

    with SseServer(behave) as server:
        bench(server, "--num-prompts", "2", status=2)
        assert "--prompt-kind text" in capsys.readouterr().err
        bench(server, "--num-prompts", "2", "--prompt-kind", "text")


def test_the_client_is_measured_and_loads_no_torch(tmp_path):
    program = (
        "import sys\nfrom quire import cli\nstatus = cli.main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\nsys.exit(status)"
    )
    argv = ["bench", "serve", "--self-check", "--json", "-"]
    result = subprocess.run([sys.executable, "-c", program, *argv], check=True, capture_output=True, text=True)
    rows = json.loads(result.stdout)["rows"]
    assert rows[0]["tokens"] == 64_000 and rows[0]["tokens/s"] > 2_000
