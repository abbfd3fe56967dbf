"""Tool calls in a model's text: found while the text comes, in the forms that chat templates teach.

    hermes        <tool_call>\n{"name": "f", "arguments": {…}}\n</tool_call>         Hermes, Qwen, SmolLM3, minimind
    llama3_json   {"name": "f", "parameters": {…}}; {…}                               Llama 3.x; <|python_tag|> may precede it
    mistral       [TOOL_CALLS] [{"name": "f", "arguments": {…}}, {…}]                 Mistral

A call is made as soon as its name and the `{` of its arguments have been read: from there on its arguments are told as they
come, so they cannot be taken back, and are what the model wrote even where that is not valid JSON (OpenAI's are so too).
What goes wrong before that point makes the whole thing ordinary text, and so does what only begins like a call. Text is
held back while it may become a call, and no longer; how the text is cut into pieces changes nothing. Whitespace next to a
call belongs to the call.

This module does not know which tools a request has offered: a call of a name that is not among them is a call, as in vLLM,
since a client that sees the name can answer that there is no such tool. It knows neither requests nor HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b

from quire.server.tool_text import Brackets, Filter, Marks, read_call

MAX_SPACE = 64  # characters of whitespace that belong to a call, at each place where it may have some
MAX_HELD = 1 << 16  # characters held back for a call whose arguments come before its name


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes its calls: opener, then calls with `separator` between them, then closer.

    is_bare: calls may also begin a text without the opener. list_opener: what may stand between opener and first call.
    id_chars: length of the ids that the format's templates take, 0 for any.
    """

    name: str
    opener: str
    separator: str
    closer: str
    list_opener: str = ""
    arguments: str = "arguments"
    is_bare: bool = False
    id_chars: int = 0

    def opening(self, function: str | None) -> str:
        """What an answer begins with that must be a call, of `function` if that is named. It ends where a token is likely
        to: a space would usually be part of the next one."""
        start = ("" if self.is_bare else self.opener + (" " if self.list_opener else "\n")) + self.list_opener
        return start + ('{"name": "' if function is None else f'{{"name": "{function}", "{self.arguments}":')

    def call_id(self, request_id: str, choice: int, index: int) -> str:
        """Different for each call of each answer of each request."""
        name = blake2b(f"{request_id}/{choice}/{index}".encode(), digest_size=12).hexdigest()
        return name[: self.id_chars] if self.id_chars else f"call_{name}"


HERMES = ToolFormat("hermes", "<tool_call>", "", "</tool_call>")
LLAMA3_JSON = ToolFormat("llama3_json", "<|python_tag|>", ";", "", arguments="parameters", is_bare=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", ",", "]", list_opener="[", id_chars=9)
FORMATS: Mapping[str, ToolFormat] = {found.name: found for found in (HERMES, LLAMA3_JSON, MISTRAL)}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None if it is none that we read."""
    if "<tool_call>" in template:
        # the same marker, with XML inside: Qwen3-Coder's and GLM's
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL  # the newer form is [TOOL_CALLS]name[ARGS]{…}
    return LLAMA3_JSON if "<|python_tag|>" in template or '{"name": function name, "parameters"' in template else None


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of the `index`-th call of an answer. The first one has the name, and no arguments yet."""

    index: int
    name: str | None
    arguments: str


Event = str | CallDelta  # a str is ordinary text


class _State(Enum):
    TEXT = auto()  # until an opener
    HEAD = auto()  # behind an opener or a separator, until there is a call, or none
    ARGUMENTS = auto()
    TAIL = auto()  # behind the arguments
    MEMBERS = auto()  # further members of the call's object, an id perhaps: dropped
    BETWEEN = auto()  # behind a call, which another may follow
    OVER = auto()  # all that is wanted has been read


# The usual opening of a call's object: from here on its arguments can be told.
_SPACE = rf"\s{{0,{MAX_SPACE}}}"
_HEAD = re.compile(
    r'\{ ("type" : "function" , )?"name" : "(?P<name>[^"\\\n]{1,256})" , "(arguments|parameters)" : (?=\{)'.replace(
        " ", _SPACE
    )
)
_FIRST_KEY = re.compile(rf'\{{{_SPACE}"([^"\\]*)"')
_CALL_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})
_SOME_SPACE = re.compile(_SPACE)


class ToolReader:
    """Reads one answer. only_first: what comes behind the first call is dropped. opening: what it has begun with already.

    hidden: special tokens' text that is no part of the answer, where the detokenizer had to leave it in.
    """

    def __init__(
        self, form: ToolFormat, *, only_first: bool = False, hidden: Marks | None = None, opening: str = ""
    ) -> None:
        self.num_calls = 0
        self._form = form
        self._only_first = only_first
        self._filter = Filter(hidden) if hidden else None
        self._openers = Marks([form.opener])
        self._state = _State.HEAD if form.is_bare else _State.TEXT
        self._opener = ""  # what led to HEAD: it is text if there is no call
        self._held = opening  # what is not decided yet
        self._space = ""  # whitespace that is text unless a call follows
        self._is_behind_call = False  # nothing but whitespace has come since the last call
        self._brackets = Brackets()
        self._num_seen = 0  # characters of `_held` that `_brackets` has seen
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """The next piece of the text; what can be told now."""
        self._held += self._filter.feed(text) if self._filter else text
        return self._run()

    def finish(self) -> list[Event]:
        """Nothing follows."""
        if self._filter:
            self._held += self._filter.finish()
        events = self._run()
        while self._state is _State.HEAD:
            self._decline()
            events += self._run()
        if self._state is _State.TEXT:
            self._tell(self._held)
            if not self._is_behind_call:
                self._events.append(self._space)
        # in the other states a call has been told, and at most half of a closing marker is left
        self._held = self._space = ""
        events += [event for event in self._events if event]
        self._events = []
        return events

    def _run(self) -> list[Event]:
        while self._held and self._step():
            pass
        events, self._events = self._events, []
        return events

    def _step(self) -> bool:
        """Takes one step through what is held; False if that needs more text."""
        match self._state:
            case _State.TEXT:
                return self._read_text()
            case _State.HEAD:
                return self._read_head()
            case _State.ARGUMENTS:
                return self._read_arguments()
            case _State.TAIL:
                return self._read_tail()
            case _State.MEMBERS:
                return self._skip_members()
            case _State.BETWEEN:
                return self._read_between()
            case _State.OVER:
                self._held = ""
                return False

    # -- text
    def _read_text(self) -> bool:
        if found := self._openers.find(self._held):
            self._tell(self._held[: found.start()])
            self._begin_head(found[0], found.end())
            return True
        end = len(self._held) - self._openers.num_held(self._held)
        self._tell(self._held[:end])
        self._held = self._held[end:]
        return False

    def _tell(self, text: str) -> None:
        """Ordinary text; whitespace at its end waits for what follows."""
        text = self._space + text
        told = text[: max(len(text.rstrip()), len(text) - MAX_SPACE)]
        self._space = text[len(told) :]
        if told:
            self._is_behind_call = False
            self._events.append(told)

    # -- the opening of a call
    def _begin_head(self, opener: str, end: int) -> None:
        self._state, self._opener, self._held = _State.HEAD, opener, self._held[end:]
        self._brackets, self._num_seen = Brackets(), 0

    def _decline(self) -> None:
        """There is no call: what led here is text, and what follows it is read as any text is."""
        self._state = _State.TEXT
        self._tell(self._opener)

    def _read_head(self) -> bool:
        start = self._start_of_object()
        if start is None:
            return False
        if found := _HEAD.match(self._held, start) if start >= 0 else None:
            self._begin_call(found["name"])
            self._held = self._held[found.end() :]
            self._state, self._brackets = _State.ARGUMENTS, Brackets()
            return True
        if start < 0 or not self._may_be_call(start):
            self._decline()
            return True
        # an unusual order of members: wait for the whole object
        end = self._brackets.find_end(self._held, max(self._num_seen, start))
        self._num_seen = len(self._held)
        if (len(self._held) if end is None else end) - start > MAX_HELD:
            self._decline()
            return True
        if end is None:
            return False
        call = read_call(self._held[start:end], needs_arguments=self._form.is_bare)
        if call is None:
            self._decline()
            return True
        self._begin_call(call[0])
        self._events.append(CallDelta(self.num_calls - 1, None, call[1]))
        self._held = self._held[end:]
        self._end_call()
        return True

    def _start_of_object(self) -> int | None:
        """Where the call's object begins; -1 if it does not, None if that cannot be told yet."""
        at = _spaces(self._held, 0)
        is_first = self._opener == self._form.opener
        if is_first and self._form.list_opener and self._held.startswith(self._form.list_opener, at):
            at = _spaces(self._held, at + len(self._form.list_opener))
        if at == len(self._held):
            return None
        return at if self._held[at] == "{" else -1

    def _may_be_call(self, start: int) -> bool:
        first = _spaces(self._held, start + 1)
        if first < len(self._held) and self._held[first] != '"':
            return False
        key = _FIRST_KEY.match(self._held, start)
        return key is None or key[1] in _CALL_KEYS

    def _begin_call(self, name: str) -> None:
        self._space = ""
        self._is_behind_call = True
        self._events.append(CallDelta(self.num_calls, name, ""))
        self.num_calls += 1

    # -- the rest of it
    def _read_arguments(self) -> bool:
        end = self._brackets.find_end(self._held, 0)
        piece = self._held if end is None else self._held[:end]
        if piece:
            self._events.append(CallDelta(self.num_calls - 1, None, piece))
        self._held = self._held[len(piece) :]
        if end is None:
            return False
        self._state = _State.TAIL
        return True

    def _read_tail(self) -> bool:
        rest = self._held[_spaces(self._held, 0) :]
        if not rest:
            return False
        if rest[0] == ",":
            self._state, self._brackets, self._held = _State.MEMBERS, Brackets(depth=1), rest
        else:  # models forget the last brace now and then
            self._held = rest[1:] if rest[0] == "}" else self._held
            self._end_call()
        return True

    def _skip_members(self) -> bool:
        end = self._brackets.find_end(self._held, 0)
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        self._end_call()
        return True

    def _end_call(self) -> None:
        self._state = _State.OVER if self._only_first else _State.BETWEEN

    def _read_between(self) -> bool:
        form, space = self._form, _spaces(self._held, 0)
        rest = self._held[space:]
        if form.closer and rest.startswith(form.closer):
            self._state, self._held = _State.TEXT, rest[len(form.closer) :]
            return True
        if not rest or (form.closer and form.closer.startswith(rest)):
            return False
        if rest.startswith(form.separator):
            start = _spaces(rest, len(form.separator))
            if start == len(rest):
                return False
            if rest[start] == "{":
                self._space = self._held[:space]
                self._begin_head(form.separator, space + len(form.separator))
                return True
        self._state = _State.TEXT
        return True


def gather(events: Sequence[Event]) -> tuple[str, list[tuple[str, str]]]:
    """What events add up to: the content, and the name and arguments of each call."""
    content: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for event in events:
        if isinstance(event, str):
            content.append(event)
        elif event.name is not None:
            calls.append((event.name, []))
        else:
            calls[event.index][1].append(event.arguments)
    return "".join(content), [(name, "".join(pieces)) for name, pieces in calls]


def _spaces(text: str, at: int) -> int:
    found = _SOME_SPACE.match(text, at)
    assert found
    return found.end()  # behind MAX_SPACE of them at most: what is held back stays short
