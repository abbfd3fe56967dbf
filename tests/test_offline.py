"""The batch job: every line once, in order, whatever stops it on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quire import cli, offline
from quire.config import EngineConfig
from quire.engine.llm import LLM
from quire.errors import ConfigError, ModelError, RequestError
from quire.offline import Job, Output, OutputFile
from quire.sampling_params import SamplingParams

SHARED = Path(__file__).parents[2] / "shared" / "data"
STORIES = SHARED / "models" / "stories260K"
QUESTIONS = SHARED / "text" / "gsm8k_test.jsonl"

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}


def as_lines(records):
    return [json.dumps(record).encode() + b"\n" for record in records]


def read_records(path):
    data = Path(path).read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def without_luck(records):
    """What must be equal however often a job was stopped: a new engine's prefix cache is empty."""
    return [{key: value for key, value in record.items() if key != "num_cached_tokens"} for record in records]


# -- lines -----------------------------------------------------------------------------------------------------------------
def job(**options):
    options.setdefault("config", EngineConfig(model="m"))
    return Job(input_format=options.pop("input_format", "jsonl"), **options)


class TestReading:
    def test_text_keeps_all_but_the_line_end(self):
        text = job(input_format="text")
        assert text.read(0, "\ufeff  né \r\n".encode()) == {"prompt": "  né "}
        assert text.read(1, b"\n") == {"prompt": ""}

    @pytest.mark.parametrize(
        "line", [b"{", b"\n", b"[1]", b"5", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]
    )
    def test_bad_json(self, line):
        with pytest.raises(RequestError):
            job().read(0, line)

    @pytest.mark.parametrize(
        ("values", "prompt"),
        [
            ({"prompt": "a", "answer": 5}, "a"),
            ({"prompt": "a", "messages": None}, "a"),
            ({"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [1, 2]}),
        ],
    )
    def test_prompt(self, values, prompt):
        assert job().prompt(values, None) == prompt

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"question": "a"},
            {"prompt": "a", "prompt_token_ids": [1]},
            {"prompt": 5},
            {"messages": [{"role": "user"}]},
        ],
    )
    def test_bad_prompt(self, values):
        with pytest.raises(RequestError):
            job().prompt(values, None)

    def test_another_field(self):
        assert job(text_field="question").prompt({"question": "a", "prompt": "b"}, None) == "a"

    def test_chat_goes_through_the_template(self):
        class Pretend:
            def encode_chat(self, messages):
                return messages

        user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "be brief"}
        mine = {"role": "system", "content": "mine"}
        assert job(chat=True).prompt({"prompt": "a"}, Pretend()) == {"prompt_token_ids": [user]}
        polite = job(system="be brief")
        assert polite.prompt({"prompt": "a"}, Pretend()) == {"prompt_token_ids": [system, user]}
        assert polite.prompt({"messages": [mine, user]}, Pretend()) == {"prompt_token_ids": [mine, user]}
        for wrong in ("a", [1], {"role": "user"}):
            with pytest.raises(RequestError):
                polite.prompt({"messages": wrong}, Pretend())

    def test_params_of_a_line(self):
        base = SamplingParams(temperature=0.5)
        params = job().params(base, {"prompt": "a", "max_tokens": 3, "output_kind": 7, "stop": ["x"]}, 4)
        assert (params.temperature, params.max_tokens, params.stop) == (0.5, 3, ("x",))
        assert params.seed == job().seed(4) != job().seed(5)
        assert job().params(base, {"seed": 9}, 4).seed == 9
        assert job().params(base, {"seed": None}, 4).seed == job().seed(4)
        assert job(text_field="stop").params(base, {"stop": "x"}, 4).stop == ()
        with pytest.raises(RequestError):
            job().params(base, {"max_tokens": 0}, 4)

    def test_options_that_are_wrong_for_all_lines(self):
        with pytest.raises(RequestError):
            job(sampling={"temperature": -1})
        with pytest.raises(ConfigError):
            job(chat=True, config=EngineConfig(model="m", skip_tokenizer_init=True))

    def test_fingerprint(self):
        one = job().fingerprint(b"a\n")
        assert one == job().fingerprint(b"a") == job(config=EngineConfig(model="m", max_num_seqs=3)).fingerprint(b"a\n")
        others = [
            job().fingerprint(b"b\n"),
            job(config=EngineConfig(model="n")).fingerprint(b"a\n"),
            job(config=EngineConfig(model="m", seed=1)).fingerprint(b"a\n"),
            job(sampling={"temperature": 0.5}).fingerprint(b"a\n"),
            job(system="x").fingerprint(b"a\n"),
        ]
        assert len({one, *others}) == 6


# -- the output file ---------------------------------------------------------------------------------------------------------
INPUT = as_lines({"prompt": str(i)} for i in range(5))


@pytest.fixture
def partial(tmp_path):
    """Answers to the first three lines of INPUT, the second one an error."""
    path = tmp_path / "out.jsonl"
    records = [{"index": i, "text": "x", "fingerprint": job().fingerprint(INPUT[i])} for i in range(3)]
    records[1]["error"] = "no"
    path.write_bytes(b"".join(as_lines(records)))
    return path


class TestResume:
    def test_goes_on_behind_what_is_there(self, partial):
        lines = iter(INPUT)
        with OutputFile(partial) as output:
            assert output.resume(job(), lines) == 1
            assert output.num_lines == 3 and next(lines) == INPUT[3]
            output.write({"index": 3})
        assert [record["index"] for record in read_records(partial)] == [0, 1, 2, 3]

    @pytest.mark.parametrize("torn", [b"{", b'{"index": 3, "text": "a', b'{"index": 3}'])
    def test_torn_last_line_is_cut(self, partial, torn):
        whole = partial.read_bytes()
        partial.write_bytes(whole + torn)
        with OutputFile(partial) as output:
            output.resume(job(), iter(INPUT))
        assert partial.read_bytes() == whole

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lines": [INPUT[0], b"{}\n", *INPUT[2:]]}, "line 2 answers another prompt"),
            ({"lines": INPUT[1:]}, "line 1 answers another prompt"),
            ({"lines": INPUT[:2]}, "line 3 has no line in the input"),
            ({"job": job(sampling={"temperature": 0.5})}, "line 1 was made with another model or other options"),
            ({"write": lambda old: old.split(b"\n", 1)[1]}, "line 1 has index 1, not 0"),
            ({"write": lambda old: old + b"7\n"}, "line 4 is not a result"),
            ({"write": lambda old: b"\n" + old}, "line 1 is not a result"),
            ({"write": lambda old: b'{"index": 0}\n'}, "line 1 is not a result"),
            ({"write": lambda old: b"a letter"}, "line 1 is not a result"),
            ({"write": lambda old: old + b'{"index": 4, '}, "line 4 is not a result"),
        ],
    )
    def test_what_does_not_belong_is_refused_and_left_alone(self, partial, change, message):
        partial.write_bytes(change.get("write", lambda old: old)(partial.read_bytes()))
        before = partial.read_bytes()
        with OutputFile(partial) as output, pytest.raises(ConfigError, match=message):
            output.resume(change.get("job", job()), iter(change.get("lines", INPUT)))
        assert partial.read_bytes() == before

    def test_restart(self, partial):
        with OutputFile(partial, restart=True) as output:
            assert output.resume(job(), iter(INPUT)) == 0
        assert partial.read_bytes() == b""

    def test_second_writer_is_refused(self, partial):
        before = partial.read_bytes()
        with OutputFile(partial), pytest.raises(ConfigError, match="another process is writing"):
            OutputFile(partial, restart=True)
        assert partial.read_bytes() == before
        OutputFile(partial).close()

    def test_complete_job_loads_no_model(self, partial):
        def load():
            raise AssertionError

        with OutputFile(partial) as output:
            summary = offline.run(job(), INPUT[:3], output, load)
        assert (summary.num_lines, summary.num_kept, summary.num_failed) == (3, 3, 1)
        assert summary.describe() == ["3 lines (3 kept from before, 1 failed); nothing was left to do"]

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot open the output"):
            OutputFile(tmp_path / "none" / "out.jsonl")

    def test_full_disk(self):
        with (
            Output(open("/dev/full", "wb", buffering=0)) as output,
            pytest.raises(offline.CapacityError, match="No space"),
        ):
            output.write({"index": 0})


# -- with an engine --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(TINY))
    return str(path)


class TestRun:
    """In process, with a tiny random model and room for two sequences."""

    @pytest.fixture(autouse=True)
    def prepare(self, tiny, tmp_path):
        self.path = tmp_path / "out.jsonl"
        self.options = {
            "model": tiny,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_num_seqs": 2,
            "num_threads": 1,
        }
        self.options |= {"num_gpu_blocks_override": 64, "swap_space": 0.0}

    def run(self, lines, **options):
        one = job(
            config=EngineConfig(**self.options), sampling=options.pop("sampling", {"temperature": 1.0}), **options
        )
        with OutputFile(self.path) as output:
            self.summary = offline.run(one, lines, output, lambda: LLM(**self.options))
        return read_records(self.path)

    def test_records(self):
        lines = as_lines(
            [{"prompt_token_ids": [1, 2, 3], "id": {"a": "\ud800"}, "max_tokens": 2}, {"prompt_token_ids": [4]}]
        )
        first, second = self.run(lines)
        assert first["id"] == {"a": "\ud800"} and "id" not in second
        assert first["finish_reason"] == "length" and "text" not in first
        assert (first["num_prompt_tokens"], first["num_output_tokens"]) == (3, 2) == (3, len(first["token_ids"]))
        assert (self.summary.num_prompt_tokens, self.summary.num_output_tokens) == (4, 18)
        assert self.summary.kv_blocks == 64 and self.summary.kv_blocks_lost == 0

    def test_order_is_the_input_s_and_lines_are_read_lazily(self):
        """The first answer is long, the others short: they wait for it, but not more of them than may."""
        ahead = []

        def lines():
            for i in range(200):
                ahead.append(i - len(read_records(self.path)))
                yield as_lines([{"prompt_token_ids": [1 + i % 50], "max_tokens": 100 if i == 0 else 1}])[0]

        records = self.run(lines(), sampling={"ignore_eos": True})
        assert [record["index"] for record in records] == list(range(200))
        assert max(ahead) == offline.UNWRITTEN * 2 - 1

    def test_wrong_lines_do_not_harm_others(self):
        good = {"prompt_token_ids": [5, 6], "seed": 3}
        wrong = [
            {"prompt_token_ids": [5] * 200},
            {"prompt_token_ids": [64]},
            {"prompt_token_ids": []},
            {"prompt": "text"},
            {**good, "temperature": -1, "id": "t"},
            {**good, "n": 3},
            {"nothing": 1},
        ]
        lines = [line for bad in [*as_lines(wrong), b"{\n", b"\n"] for line in (bad, as_lines([good])[0])]
        records = self.run(lines)
        assert [record["index"] for record in records] == list(range(18))
        assert ["error" in record for record in records] == [True, False] * 9
        assert len({tuple(record["token_ids"]) for record in records[1::2]}) == 1
        assert records[8]["id"] == "t" and "temperature" in records[8]["error"]
        assert self.summary.num_failed == 9

    def test_several_answers_to_a_prompt(self):
        (record,) = self.run(as_lines([{"prompt_token_ids": [1, 2, 3]}]), sampling={"n": 2, "temperature": 1.0})
        assert record["num_output_tokens"] == sum(len(one["token_ids"]) for one in record["outputs"]) == 32
        assert record["outputs"][0]["token_ids"] != record["outputs"][1]["token_ids"]

    def test_logprobs(self):
        (record,) = self.run(as_lines([{"prompt_token_ids": [1, 2, 3], "logprobs": 2, "prompt_logprobs": 0}]))
        assert [entry[0]["token_id"] for entry in record["logprobs"]] == record["token_ids"]
        assert all(len(entry) in (2, 3) and entry[0]["logprob"] < 0 for entry in record["logprobs"])
        assert record["prompt_logprobs"][0] is None and record["prompt_logprobs"][2][0]["token_id"] == 3

    def test_resumed_anywhere_equals_unbroken(self):
        lines = as_lines({"prompt_token_ids": [i + 1, i + 2], "max_tokens": 1 + i % 7} for i in range(12))
        unbroken = self.path.read_bytes() if self.run(lines) else b""
        ends = [i + 1 for i, byte in enumerate(unbroken) if byte == 10]
        for cut in (0, 5, ends[0], ends[4] + 9, ends[10] - 1, ends[10]):
            self.path.write_bytes(unbroken[:cut])
            self.run(lines)
            assert self.path.read_bytes() == unbroken

    def test_seed_changes_draws(self):
        lines = as_lines([{"prompt_token_ids": [1]}] * 2)
        first, second = self.run(lines)
        assert first["token_ids"] != second["token_ids"]
        self.options["seed"] = 0
        assert self.run(lines) == [first, second]

    def test_draws_are_those_of_llm_generate(self):
        prompts = [[1, 2], [3], [4, 5, 6]]
        records = self.run(as_lines({"prompt_token_ids": prompt} for prompt in prompts))
        with LLM(**self.options) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=1.0))
        assert [record["token_ids"] for record in records] == [output.outputs[0].token_ids for output in outputs]


def test_summary_tells_what_was_lost():
    summary = offline.Summary(num_lines=3, kv_blocks=10, kv_blocks_free=7, kv_blocks_cached=2)
    assert summary.describe()[-1] == "KV blocks: 7 free + 2 cached = 10 total - 1 LOST"
    assert summary.as_dict()["kv_blocks_lost"] == 1


# -- the real command -----------------------------------------------------------------------------------------------------
real_data = pytest.mark.skipif(
    not (STORIES.is_dir() and QUESTIONS.is_file()), reason=f"real data is absent: {STORIES}, {QUESTIONS}"
)


def command(*argv):
    base = [sys.executable, "-m", "quire", "generate", "--model", str(STORIES), "--num-threads", "1"]
    return [*base, "--num-gpu-blocks-override", "512", *map(str, argv)]


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop_at(argv, path, num_lines, how):
    """Starts a command and sends it `how` as soon as its output has so many lines."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while count_lines(path) < num_lines:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(how)
    _, err = process.communicate()
    return process.returncode, err


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b"".join(QUESTIONS.read_bytes().splitlines(keepends=True)[:200]))
    return path


@real_data
def test_killed_twice_then_every_line_once(questions, tmp_path):
    once, thrice = tmp_path / "once.jsonl", tmp_path / "thrice.jsonl"
    options = ["--field", "question", questions, "--max-num-seqs", 16, "--max-tokens", 16, "--temperature", 0.8]
    subprocess.run(command(*options, "-o", once), check=True, capture_output=True)
    reached = []
    for num_lines in (20, 110):
        code, _ = stop_at(command(*options, "-o", thrice), thrice, num_lines, signal.SIGKILL)
        assert code == -signal.SIGKILL
        reached.append(count_lines(thrice))
        if num_lines == 20:  # as if the kill had come in the middle of a write
            with open(thrice, "ab") as file:
                file.write(b'{"index": %d, "text": "half' % reached[0])
    assert 20 <= reached[0] < reached[1] < 200
    result = subprocess.run(command(*options, "-o", thrice, "--json", "-"), check=True, capture_output=True, text=True)
    summary = json.loads(result.stdout)
    assert (summary["num_lines"], summary["num_kept"], summary["num_failed"]) == (200, reached[1], 0)
    assert summary["kv_blocks"] == 512 and summary["kv_blocks_lost"] == 0
    assert f"200 lines ({reached[1]} kept from before)" in result.stderr
    records = read_records(thrice)
    assert [record["index"] for record in records] == list(range(200))
    assert without_luck(records) == without_luck(read_records(once))


@real_data
def test_interrupted(questions, tmp_path):
    out = tmp_path / "out.jsonl"
    argv = command("--field", "question", questions, "--max-num-seqs", 1, "--max-tokens", 4, "-o", out)
    code, err = stop_at(argv, out, 1, signal.SIGINT)
    assert code == 130
    assert f"stopped after {count_lines(out)} lines; the same command goes on from there" in err
    assert "Traceback" not in err
    read_records(out)


@real_data
def test_stdin_to_stdout():
    argv = command("--n", 2, "--temperature", 1, "--token-ids", "--stop", ".", "--max-tokens", 40)
    result = subprocess.run(argv, input="Once upon a time\nThe\n", check=True, capture_output=True, text=True)
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["num_prompt_tokens"] == 5 and len(first["outputs"]) == len(second["outputs"]) == 2
    for one in first["outputs"]:
        assert one["text"] and "." not in one["text"] and one["token_ids"]
    assert "2 lines in" in result.stderr


@real_data
def test_nobody_reads_on():
    process = subprocess.Popen(command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"Once upon a time\n" * 5)
    process.stdin.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert "Traceback" not in err and "BrokenPipe" not in err


@real_data
class TestCommand:
    """In process: what the command makes of its options."""

    def run(self, *argv):
        return cli.main(command(*argv)[3:])

    def test_text_errors_and_exit_code(self, tmp_path, capsys):
        prompts, out, summary = tmp_path / "in.txt", tmp_path / "out.jsonl", tmp_path / "summary.json"
        prompts.write_text("Once upon a time\n" + "long " * 600 + "\n")
        argv = [prompts, "-o", out, "--json", summary]
        assert self.run(*argv) == 1
        good, bad = read_records(out)
        assert good["text"].startswith(", there was a little girl named Lily")
        assert "tokens" in bad["error"] and bad["index"] == 1
        assert json.loads(summary.read_text())["num_failed"] == 1
        assert "2 lines (1 failed)" in capsys.readouterr().err
        assert self.run(*argv) == 1, "a job that goes on ends as an unbroken one does"
        assert "nothing was left to do" in capsys.readouterr().err
        prompts.write_text("Twice\n")
        assert self.run(*argv) == 2
        assert "--restart" in capsys.readouterr().err
        assert self.run(*argv, "--restart") == 0
        assert len(read_records(out)) == 1

    def test_model_without_chat_template(self, tmp_path, capsys):
        prompts = tmp_path / "in.txt"
        prompts.write_text("Hi\n")
        assert self.run(prompts, "-o", tmp_path / "out.jsonl", "--chat") == 2
        assert "chat template" in capsys.readouterr().err
        with pytest.raises(ModelError):
            self.run(prompts, "-o", tmp_path / "out.jsonl", "--chat", "--debug")

    def test_files_that_cannot_be(self, tmp_path, capsys):
        prompts = tmp_path / "in.txt"
        assert self.run(prompts) == 2
        assert "cannot open the input" in capsys.readouterr().err
        prompts.write_text("Hi\n")
        assert self.run(prompts, "-o", prompts, "--restart") == 2
        assert "both input and output" in capsys.readouterr().err
        assert prompts.read_text() == "Hi\n"

    def test_output_that_is_no_file(self, tmp_path):
        prompts = tmp_path / "in.txt"
        prompts.write_text("Hi\n")
        assert self.run(prompts, "-o", os.devnull) == 0


def test_count_lines(tmp_path):
    path = tmp_path / "x"
    for text, count in ((b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3)):
        path.write_bytes(text)
        assert cli._count_lines(str(path)) == count
    assert cli._count_lines("-") is None
