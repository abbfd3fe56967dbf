"""`quire chat`: a conversation, in a terminal or by pipe.

    Terminal (lines in, text out) <──> Chat (history, /commands) <──> ChatModel (an engine here, or a server)

Each turn sends the whole conversation again; the prefix cache finds what was there before, so that a turn costs what is new
in it (/stats tells). With a terminal on both sides there are prompts, line editing and a history; otherwise every line of
stdin is a turn, answers alone go to stdout, and everything else to stderr. Does not know how text is generated.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from quire.chat_models import ChatModel, Message, TurnStats
from quire.errors import QuireError, RequestError

BLOCK = '"""'
HISTORY_LINES = 2000
FAILED = 1
NOT_SETTABLE = ("n", "logprobs", "prompt_logprobs", "detokenize", "truncate_prompt_tokens")  # no use in a chat

ParseSetting = Callable[[str, str], dict[str, Any]]


class Face(Protocol):
    """What the user sees and types into."""

    is_interactive: bool

    def ask(self, prompt: str) -> str | None:
        """A line; None at the end of input. KeyboardInterrupt at Ctrl-C."""

    def write(self, text: str) -> None:
        """A piece of an answer, shown at once."""

    def notice(self, text: str) -> None:
        """Something that is not an answer."""


class Terminal:
    """stdin, stdout and stderr. Line editing and its history where both ends are a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        if self.is_interactive:
            _load_line_editing()

    def ask(self, prompt: str) -> str | None:
        if self.is_interactive:
            try:
                return input(prompt)
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def write(self, text: str) -> None:
        sys.stdout.write(without_controls(text) if self.is_interactive else text)
        sys.stdout.flush()

    def notice(self, text: str) -> None:
        self._console.print(without_controls(text), style="dim", markup=False)


def without_controls(text: str) -> str:
    """Without control characters but newline and tab: a model must not move the cursor, or set the terminal's title."""
    return "".join(char for char in text if char in "\n\t" or not (char < " " or "\x7f" <= char <= "\x9f"))


def _load_line_editing() -> None:
    """History is kept in XDG_STATE_HOME, readable by its owner alone."""
    import atexit
    import readline

    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state) / "quire" / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # a chat goes without a history where it cannot be kept
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        readline.read_history_file(path)
        atexit.register(_save_history, path)


def _save_history(path: Path) -> None:
    import readline

    with contextlib.suppress(OSError):
        readline.write_history_file(path)


def read_turn(ask: Callable[[str], str | None]) -> str | None:
    """One turn's text: a line; further ones after a backslash at its end; or everything between two \"\"\". None at the end."""
    line = ask("> ")
    if line is None:
        return None
    if line.startswith(BLOCK):
        return _read_block(line.removeprefix(BLOCK), ask)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        if (more := ask("... ")) is None:
            break
        lines.append(more)
    return "\n".join(lines)


def _read_block(first: str, ask: Callable[[str], str | None]) -> str:
    lines: list[str] = []
    line: str | None = first
    while line is not None:
        if line.endswith(BLOCK):
            lines.append(line.removesuffix(BLOCK))
            break
        lines.append(line)
        line = ask("... ")
    return "\n".join(lines).strip("\n")


class Chat:
    """A conversation with `model`. `sampling` is as a ChatModel takes it; `parse_setting` reads what /set changes of it."""

    def __init__(
        self,
        model: ChatModel,
        face: Face,
        parse_setting: ParseSetting,
        sampling: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        self.model = model
        self.face = face
        self.system = system
        self.messages: list[Message] = []  # the user's and the model's, in turn
        self.sampling = dict(sampling or {})
        self.num_failed = 0
        self._parse_setting = parse_setting
        self._stats: TurnStats | None = None
        self._saved: set[Path] = set()
        self._has_told_template = False
        for name in NOT_SETTABLE:
            if name in self.sampling:
                raise RequestError(f"{name} has no use in a chat", param=name)

    # -- the loop --------------------------------------------------------------------------------------------------------
    def run(self) -> int:
        """Until the end of input, or /quit. Returns the exit code: 1 if a turn of a script has failed."""
        if self.face.is_interactive:
            self.face.notice(f"{self.model.name}. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.")
        self._tell_template()
        while True:
            try:
                text = read_turn(self.face.ask)
            except KeyboardInterrupt:
                if not self.face.is_interactive:
                    raise
                self.face.notice("\nCtrl-D leaves.")
                continue
            if text is None:
                if self.face.is_interactive:
                    self.face.write("\n")
                break
            if not text.strip():
                continue
            if not text.startswith("/"):
                self._say(text)
            elif text.split()[0] in ("/quit", "/exit"):
                break
            else:
                self._command(text)
        return FAILED if self.num_failed and not self.face.is_interactive else 0

    def _say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        if not self._answer():
            self.messages.pop()

    def _answer(self) -> bool:
        """Streams an answer to the last message and keeps it, however far it got. False if there was nothing of it."""
        said: list[str] = []
        stats = self._stats = TurnStats()
        was_stopped, failure = False, None
        try:
            with contextlib.closing(self.model.answer(self._history(), self.sampling, stats)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    self.face.write(piece)
        except KeyboardInterrupt:
            if not self.face.is_interactive:
                raise
            was_stopped = True
        except QuireError as error:
            failure = error
        text = "".join(said)
        if text or not (was_stopped or failure):
            self.face.write("" if text.endswith("\n") and not self.face.is_interactive else "\n")
        self._tell_template()
        if was_stopped:
            self.face.notice("(stopped)" if text else "\n(stopped before it began; the question is taken back)")
        elif failure is not None:
            self.num_failed += 1
            self.face.notice(f"error: {failure}" + ("" if text else "\n(the question is taken back)"))
        elif stats.finish_reason == "length":
            self.face.notice("(at its limit of length: see max_tokens under /set)")
        if not text and (was_stopped or failure):
            return False
        self.messages.append({"role": "assistant", "content": text})
        return True

    def _history(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def _tell_template(self) -> None:
        """Once, when it shows: a server's model may show it only with its first answer."""
        if not self.model.has_template and not self._has_told_template:
            self._has_told_template = True
            self.face.notice(
                f"{self.model.name} has no chat template: it goes on with what you write, and that is all."
            )

    # -- commands --------------------------------------------------------------------------------------------------------
    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        command = getattr(self, f"do_{name}", None) if name.isidentifier() else None
        if command is None:
            known = [member.removeprefix("do_") for member in dir(self) if member.startswith("do_")] + ["quit"]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them"
            self._refuse(f"there is no command /{name}; {hint} (a text that begins with / needs a space before it)")
            return
        try:
            command(rest.strip())
        except QuireError as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> None:
        self.num_failed += 1
        self.face.notice(why)

    def do_help(self, _: str) -> None:
        """/help                this list"""
        members = (getattr(self, name) for name in dir(self) if name.startswith("do_"))
        lines = [inspect.getdoc(member) or "" for member in members]
        notes = [
            "/quit                leave, as Ctrl-D does",
            "",
            'A \\ at the end of a line, or """ around several, go on.',
        ]
        self.face.notice("\n".join([*lines, *notes]))

    def do_system(self, text: str) -> None:
        """/system TEXT         set the system message; without TEXT, take it away"""
        self.system = text or None
        self.face.notice("(the system message is set)" if text else "(there is no system message)")

    def do_clear(self, _: str) -> None:
        """/clear               forget the conversation, not the system message"""
        self.messages.clear()
        self.face.notice("(cleared)")

    def do_undo(self, _: str) -> None:
        """/undo                take back the last question and its answer"""
        if not self.messages:
            raise RequestError("there is nothing to take back")
        del self.messages[-2:]
        self.face.notice(f"(taken back; {len(self.messages) // 2} turns are left)")

    def do_retry(self, _: str) -> None:
        """/retry               answer the last question again"""
        if not self.messages:
            raise RequestError("there is nothing to answer again")
        before = self.messages.pop()
        if not self._answer():
            self.messages.append(before)

    def do_stats(self, _: str) -> None:
        """/stats               what the last answer took, and what is in the KV cache"""
        lines = _describe(self._stats) if self._stats is not None else ["no answer yet"]
        self.face.notice("\n".join([*lines, self.model.describe_memory()]))

    def do_save(self, name: str) -> None:
        """/save FILE           write the conversation as JSON"""
        if not name:
            raise RequestError("/save needs the name of a file")
        path = Path(name).expanduser()
        if path.exists() and path not in self._saved:
            raise RequestError(f"{path} is there already: choose another name")
        document = {"model": self.model.name, "sampling": self.sampling, "messages": self._history()}
        try:
            path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror}") from error
        self._saved.add(path)
        self.face.notice(f"(saved {len(self.messages)} messages in {path})")

    def do_set(self, words: str) -> None:
        """/set NAME VALUE      change a sampling parameter, as in /set temperature 0.5; alone, tell what is set"""
        name, _, value = words.partition(" ")
        name = name.replace("-", "_")
        if name in NOT_SETTABLE:
            raise RequestError(f"{name} has no use in a chat")
        if name and not value.strip():
            raise RequestError(f"/set {name} needs a value")
        if name:
            self.sampling |= self._parse_setting(name, value.strip())
        shown = ", ".join(f"{name}={value!r}" for name, value in self.sampling.items())
        self.face.notice(f"({shown or 'everything is as the model recommends'})")


def _describe(stats: TurnStats) -> list[str]:
    """An answer's costs, in words."""
    lines = []
    if stats.num_prompt is not None:
        line = f"prompt: {stats.num_prompt:,} tokens"
        if stats.num_cached is not None:
            share = stats.num_cached / max(stats.num_prompt, 1)
            line += f", {stats.num_cached:,} of them found in the prefix cache ({share:.0%})"
        lines.append(line)
    if stats.first_s is not None:
        line = f"answer: {stats.num_output:,} tokens, the first after {stats.first_s * 1000:,.0f} ms"
        if (speed := stats.tokens_per_s) is not None:
            line += f", then {speed:,.1f} a second"
        lines.append(line + (f" (ended by {stats.finish_reason})" if stats.finish_reason else ""))
    return lines or ["the last question has no answer"]
