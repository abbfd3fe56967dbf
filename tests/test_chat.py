"""`quire chat`: the conversation and its commands; an engine behind it, a server behind it; by pipe and in a terminal."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from quire import cli
from quire.chat import Chat, read_turn, without_controls
from quire.chat_models import LocalModel, RemoteModel, TurnStats, as_continuation
from quire.config import EngineConfig
from quire.errors import ConfigError, EngineDeadError, RequestError
from quire.options import parse_sampling_setting
from sse_server import Reply, SseServer
from support import TINY_CONFIG, assert_nothing_leaked, shared_data


# -- the conversation ------------------------------------------------------------------------------------------------------
class PretendModel:
    """Says how many messages it was sent. A question "stop" is stopped by Ctrl-C, "fail" fails, "die" after a word."""

    name = "pretend"
    has_template = True

    def __init__(self):
        self.sent = []
        self.sampling = {}

    def answer(self, messages, sampling, stats):
        self.sent.append([dict(message) for message in messages])
        self.sampling = dict(sampling)
        question = messages[-1]["content"]
        if question == "fail":
            raise RequestError("too long")
        stats.num_prompt, stats.num_cached, stats.num_output, stats.first_s, stats.total_s = 40, 30, 5, 0.5, 2.5
        yield f"{len(self.sent)}:"
        if question == "stop":
            raise KeyboardInterrupt
        if question == "die":
            raise EngineDeadError("gone")
        yield question

    def describe_memory(self):
        return "KV cache: much"

    def close(self):
        pass


class PretendFace:
    def __init__(self, lines, is_interactive=True):
        self.lines = list(lines)
        self.is_interactive = is_interactive
        self.written, self.notices = "", []

    def ask(self, prompt):
        line = self.lines.pop(0) if self.lines else None
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def write(self, text):
        self.written += text

    def notice(self, text):
        self.notices.append(text)


def talk(*lines, **options):
    face = PretendFace(lines, options.pop("is_interactive", True))
    chat = Chat(PretendModel(), face, parse_sampling_setting, **options)
    chat.status = chat.run()
    return chat, face


def contents(chat):
    return [message["content"] for message in chat.messages]


def test_each_turn_sends_the_whole_conversation():
    chat, face = talk("one", "two", system="Be brief.")
    assert [[m["content"] for m in sent] for sent in chat.model.sent] == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "1:one", "two"],
    ]
    assert [m["role"] for m in chat.model.sent[1]] == ["system", "user", "assistant", "user"]
    assert face.written == "1:one\n2:two\n\n"


def test_ctrl_c_keeps_what_was_said():
    chat, face = talk("stop", "go on")
    assert contents(chat) == ["stop", "1:", "go on", "2:go on"]
    assert "(stopped)" in face.notices


def test_ctrl_c_at_the_prompt_only_clears_the_line():
    chat, _ = talk(KeyboardInterrupt, "one")
    assert contents(chat) == ["one", "1:one"]


def test_ctrl_c_ends_a_script():
    with pytest.raises(KeyboardInterrupt):
        talk("stop", is_interactive=False)


def test_a_question_that_cannot_be_answered_is_taken_back():
    chat, face = talk("fail", "die", is_interactive=False)
    assert contents(chat) == ["die", "2:"]
    assert chat.status == 1
    assert any("too long" in notice for notice in face.notices) and any("gone" in notice for notice in face.notices)


def test_clear_undo_retry_system():
    chat, _ = talk("a", "b", "/undo", "/retry", "/system New.", "c", "/system", "d")
    assert contents(chat) == ["a", "3:a", "c", "4:c", "d", "5:d"]
    assert [sent[0]["role"] for sent in chat.model.sent] == ["user", "user", "user", "system", "user"]
    chat, face = talk("a", "/clear", "/undo", "/retry", "/quit", "never read")
    assert contents(chat) == []
    assert face.notices[-2:] == ["there is nothing to take back", "there is nothing to answer again"]


def test_an_answer_that_cannot_be_given_again_stays():
    chat, _ = talk("a")
    chat.messages[0] = {"role": "user", "content": "fail"}
    chat.do_retry("")
    assert contents(chat) == ["fail", "1:a"]


def test_set_changes_sampling():
    chat, face = talk("/set temperature 0.5", "/set stop END", "/set ignore-eos yes", "/set max_tokens none", "x")
    assert chat.model.sampling == {"temperature": 0.5, "stop": ["END"], "ignore_eos": True, "max_tokens": None}
    assert face.notices[-1] == "(temperature=0.5, stop=['END'], ignore_eos=True, max_tokens=None)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature", "needs a value"),
        ("/set temperature hot", "'hot'"),
        ("/set temperature -1", "temperature must be"),
        ("/set ignore_eos maybe", "yes or no"),
        ("/set n 2", "no use in a chat"),
        ("/set debug yes", "there is no parameter debug"),
        ("/sats", "did you mean /stats?"),
        ("/etc/passwd is a file", "needs a space before it"),
        ("/save", "needs the name"),
        ("/save /nowhere/at/all", "cannot write"),
    ],
)
def test_a_wrong_command_says_why_and_changes_nothing(line, message):
    chat, face = talk(line, is_interactive=False)
    assert message in face.notices[-1]
    assert chat.sampling == {} and not chat.model.sent
    assert chat.status == 1


def test_stats_tell_what_was_found_and_how_fast_it_was():
    _, face = talk("/stats", "a", "/stats")
    assert face.notices[-2] == "no answer yet\nKV cache: much"
    assert face.notices[-1].splitlines() == [
        "prompt: 40 tokens, 30 of them found in the prefix cache (75%)",
        "answer: 5 tokens, the first after 500 ms, then 2.0 a second",
        "KV cache: much",
    ]


def test_help_names_every_command():
    _, face = talk("/help")
    for name in ("help", "system", "clear", "undo", "retry", "stats", "save", "set", "quit"):
        assert f"/{name}" in face.notices[-1]


def test_save_writes_messages_and_overwrites_nothing_of_others(tmp_path):
    path, other = tmp_path / "chat.json", tmp_path / "other"
    other.write_text("precious")
    talk("a", f"/save {path}", "b", f"/save {path}", f"/save {other}", system="S")
    saved = json.loads(path.read_text())
    assert [message["content"] for message in saved["messages"]] == ["S", "a", "1:a", "b", "2:b"]
    assert saved["model"] == "pretend" and other.read_text() == "precious"


@pytest.mark.parametrize(
    ("lines", "turn"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['"""', "never ended"], "never ended"),
        ([], None),
    ],
)
def test_turns_of_several_lines(lines, turn):
    rest = iter(lines)
    assert read_turn(lambda prompt: next(rest, None)) == turn


def test_a_model_cannot_steer_the_terminal():
    assert without_controls("a\x1b[2J\x07b\x9b31m\tc\n\x7fé") == "a[2Jb31m\tc\né"


def test_continuation_is_text_alone():
    messages = [
        {"role": role, "content": text} for role, text in (("user", "Once"), ("assistant", " upon"), ("user", "a"))
    ]
    assert as_continuation(messages) == "Once upon\na"


# -- an engine behind it -----------------------------------------------------------------------------------------------------
@pytest.fixture
def chat_model(tmp_path):
    """Random weights under a real tokenizer with a chat template, as options of `quire chat`."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = TINY_CONFIG | {"vocab_size": 6400, "max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = shared_data("tokenizers/minimind")
    return [str(directory), "--tokenizer", str(tokenizer), "--load-format", "dummy", "--num-threads", "1"]


def quire_chat(argv, lines, status=0):
    command = [sys.executable, "-m", "quire", "chat", *argv]
    done = subprocess.run(
        command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    return done


def test_a_script_gets_answers_alone_and_finds_its_prefix(chat_model):
    lines = ["Tell me about pages and quires, and how they are bound.", "/stats", "And?", "/stats"]
    done = quire_chat([*chat_model, "--max-tokens", "6", "--temperature", "0"], lines)
    assert "prompt:" not in done.stdout and ">" not in done.stdout.replace("<|", "")
    found = [
        tuple(map(int, re.findall(r"\d+", line)[:2])) for line in done.stderr.splitlines() if line.startswith("prompt:")
    ]
    (first, hit_first), (second, hit_second) = found
    assert hit_first == 0 and second > first
    assert hit_second >= first // 16 * 16 > 0
    assert "6 tokens, the first after" in done.stderr


def test_a_model_without_a_template_goes_on_with_the_text(stories):
    lines = ["Once upon a time", "/retry"]
    argv = [str(stories), "--max-tokens", "12", "--temperature", "0", "--num-threads", "1"]
    done = quire_chat(argv, lines)
    assert "has no chat template" in done.stderr
    assert done.stdout.splitlines()[0] == done.stdout.splitlines()[1] == ", there was a little girl named Lily. She"


def test_a_conversation_that_is_too_long_says_so(chat_model):
    done = quire_chat([*chat_model, "--max-model-len", "32"], ["word " * 50], status=1)
    assert "max_model_len=32" in done.stderr and "taken back" in done.stderr
    assert done.stdout == ""


def test_an_answer_left_early_frees_its_blocks(chat_model):
    directory, _, tokenizer, *_ = chat_model
    model = LocalModel(EngineConfig(model=directory, tokenizer=tokenizer, load_format="dummy", num_threads=1))
    stats = TurnStats()
    with contextlib.closing(model.answer([{"role": "user", "content": "x"}], {"ignore_eos": True}, stats)) as pieces:
        next(pieces)
    assert stats.num_output >= 1 and stats.finish_reason is None
    assert_nothing_leaked(model._engine)
    assert model._engine.scheduler.counts.tokens < 64  # it was not quietly run to its end
    before = signal.getsignal(signal.SIGINT)
    answer = model.answer([{"role": "user", "content": "x"}], {"ignore_eos": True}, stats)
    next(answer)
    for _ in range(3):  # out of impatience
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    assert signal.getsignal(signal.SIGINT) is before
    assert_nothing_leaked(model._engine)
    assert next(model.answer([{"role": "user", "content": "x"}], {"ignore_eos": True}, stats))
    model.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--model", "b"], "two models"),
        (["m", "--n", "2"], "no use in a chat"),
        (["m", "--temperature", "-1"], "temperature must be"),
        (["--url", "http://127.0.0.1:9", "--max-num-seqs", "3"], "max_num_seqs is the server's"),
        (["--url", "http://127.0.0.1:9"], "cannot chat with http://127.0.0.1:9"),
        (["--url", "http://:x"], "cannot chat with"),
    ],
)
def test_a_wrong_option_is_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("quire.chat_models.LocalModel.__init__", lambda self, config: None)
    monkeypatch.setattr("quire.chat_models.LocalModel.close", lambda self: None)
    assert cli.main(["chat", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


# -- a server behind it --------------------------------------------------------------------------------------------------------
def test_a_server_is_asked_as_openais_clients_do():
    with SseServer(lambda path, body, count: Reply(["Hel", "lo"], cached=8)) as server:
        done = quire_chat(["--url", server.url, "--temperature", "0.5", "--system", "S"], ["Hi", "/stats", "More"])
    assert done.stdout == "Hello\nHello\n"
    first, second = server.bodies
    assert first["model"] == "pretend" and first["temperature"] == 0.5 and "max_tokens" not in first
    assert [message["content"] for message in second["messages"]] == ["S", "Hi", "Hello", "More"]
    assert "prompt: 10 tokens, 8 of them found in the prefix cache (80%)" in done.stderr


def test_a_servers_errors_are_told_and_the_chat_goes_on():
    replies = [Reply(status=429, message="the queue is full"), Reply(["wor"], breaks=True), Reply(["fine"])]
    with SseServer(lambda path, body, count: replies[count]) as server:
        done = quire_chat(["--url", server.url], ["a", "b", "c"], status=1)
    assert done.stdout == "wor\nfine\n"
    assert "HTTP 429: the queue is full" in done.stderr and "the engine has died" in done.stderr
    assert [message["content"] for message in server.bodies[2]["messages"]] == ["b", "wor", "c"]


def test_a_server_without_a_chat_template_is_given_the_text():
    def behave(path, body, count):
        is_chat = path.endswith("/chat/completions")
        return Reply(status=400, message="this model has no chat template") if is_chat else Reply([" upon"])

    with SseServer(behave) as server:
        done = quire_chat(["--url", server.url], ["Once", "a time"])
    assert done.stdout == " upon\n upon\n"
    assert done.stderr.count("has no chat template") == 1
    assert [body.get("prompt") for body in server.bodies] == [None, "Once", "Once upon\na time"]


def test_leaving_an_answer_hangs_up():
    with SseServer(lambda path, body, count: Reply(["x" * 1000] * 2000, pause_s=0.001)) as server:
        model = RemoteModel(server.url)
        with contextlib.closing(model.answer([{"role": "user", "content": "?"}], {}, TurnStats())) as pieces:
            next(pieces)
        model.close()
        deadline = time.monotonic() + 10
        while not server.num_gone and time.monotonic() < deadline:
            time.sleep(0.01)
    assert server.num_gone == 1


def test_keys_are_sent():
    model = RemoteModel.__new__(RemoteModel)
    with SseServer() as server:
        model.__init__(server.url, api_key="secret")
    assert model._http.headers["Authorization"] == "Bearer secret"
    model.close()
    with pytest.raises(ConfigError):
        RemoteModel(server.url)


# -- in a terminal -------------------------------------------------------------------------------------------------------------
class TerminalSession:
    """A command on a terminal of its own: `expect` waits for a text to be shown since the last one that was expected.

    Python's readline misses a Ctrl-C in the instant between its prompt and its waiting: `press` presses it again.
    """

    def __init__(self, command, env):
        self.main, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""

    def expect(self, text, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            ready, _, _ = select.select([self.main], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"no {text!r} in {self.shown!r}")
            try:
                self.shown += os.read(self.main, 65536).decode("utf-8", "replace")
            except OSError as error:
                raise AssertionError(f"it ended, without {text!r}, with {self.shown!r}") from error
        before, _, self.shown = self.shown.partition(text)
        return before

    def send(self, text):
        os.write(self.main, text.encode())

    def press(self, key, text):
        for _ in range(30):
            self.send(key)
            with contextlib.suppress(TimeoutError):
                return self.expect(text, timeout_s=1)
        raise TimeoutError(text)


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(chat_model, tmp_path):
    argv = [*chat_model, "--ignore-eos", "--max-model-len", "512"]
    session = TerminalSession(
        [sys.executable, "-m", "quire", "chat", *argv], {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    )
    try:
        session.expect("Ctrl-D leaves.")
        session.expect("> ")
        session.send("/set max_tokens 4\n")
        session.expect("max_tokens=4")
        session.expect("> ")
        session.send("Hello there\\\n")
        session.expect("... ")
        session.send("and everywhere\n")
        session.expect("at its limit of length")
        session.expect("> ")
        session.send("/set max_tokens none\n")
        session.expect("> ")
        session.send("Go on\n")
        session.expect("Go on\r\n")
        time.sleep(0.05)
        session.send("\x03")
        shown = session.expect("> ")
        assert "stopped" in shown or "limit" in shown
        session.send("/stats\n")
        session.expect("found in the prefix cache")
        session.expect("> ")
        session.press("\x03", "Ctrl-D leaves.")
        session.expect("> ")
        session.send("\x04")
        assert session.process.wait(30) == 0
    finally:
        session.process.kill()
        session.process.wait()
        os.close(session.main)
    history = tmp_path / "quire" / "chat_history"
    assert "Hello there" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
