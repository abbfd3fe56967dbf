"""Marks and JSON objects in a text that comes in pieces: what reading tool calls needs. Knows no format of theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

_ANY_SPACE = re.compile(r"\s*")
_JSON = json.JSONDecoder()


def read_call(text: str, *, needs_arguments: bool) -> tuple[str, str] | None:
    """Name and arguments of a call's complete object, its members in any order; None if it is none.

    The arguments are the model's own text of the object. Some models write that object as a string, or none at all.
    """
    members: dict[str, tuple[object, str]] = {}
    try:
        at = _space_end(text, 1)
        while text[at] != "}":
            key, at = _JSON.raw_decode(text, at)
            at = _space_end(text, at)
            if text[at] != ":" or not isinstance(key, str):
                return None
            start = _space_end(text, at + 1)
            value, at = _JSON.raw_decode(text, start)
            members[key] = value, text[start:at]
            at = _space_end(text, at)
            if text[at] == ",":
                at = _space_end(text, at + 1)
            elif text[at] != "}":
                return None
        name, _ = members.get("name", (None, ""))
        given = members.get("arguments", members.get("parameters"))
        if not isinstance(name, str) or not name or (given is None and needs_arguments):
            return None
        value, exact = given or (None, "null")
        if isinstance(value, str):
            value, exact = json.loads(value or "{}"), value or "{}"
    except (ValueError, IndexError, RecursionError):
        return None
    if value is None:
        return name, "{}"
    return (name, exact) if isinstance(value, dict) else None


def _space_end(text: str, at: int) -> int:
    found = _ANY_SPACE.match(text, at)
    assert found
    return found.end()


class Brackets:
    """Finds where an object closes, over pieces of its text. Knows strings and counts brackets; the rest may be anything."""

    _MARK = re.compile(r'["\\{}\[\]<]')
    _STRING_MARK = re.compile(r'["\\]')

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_string = False
        self._is_escaped = False  # the next character is

    def find_end(self, text: str, at: int) -> int | None:
        """Reads text[at:]; the index behind the bracket that closes the first one. A "<" outside of strings ends the object
        too, before it: JSON has none there, and models that forget a bracket go on with a marker."""
        if self._is_escaped and at < len(text):
            at, self._is_escaped = at + 1, False
        while found := (self._STRING_MARK if self._is_string else self._MARK).search(text, at):
            at = found.end()
            match found[0]:
                case '"':
                    self._is_string = not self._is_string
                case "\\":
                    if self._is_string:
                        self._is_escaped = at == len(text)
                        at += 1
                case "{" | "[":
                    self._depth += 1
                case "<":
                    return found.start()
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return at
        return None


class Marks:
    """Finds given strings in a text that comes in pieces. Without any, finds nothing."""

    def __init__(self, marks: Collection[str]) -> None:
        names = sorted(marks, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._beginnings = frozenset(mark[:length] for mark in marks for length in range(1, len(mark)))
        self._longest = max(map(len, self._beginnings), default=0)

    def find(self, text: str, at: int = 0) -> re.Match[str] | None:
        return self._pattern.search(text, at)

    def num_held(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a mark."""
        lengths = range(min(self._longest, len(text)), 0, -1)
        return next((length for length in lengths if text[-length:] in self._beginnings), 0)


class Filter:
    """Takes strings out of a text that comes in pieces."""

    def __init__(self, hidden: Marks) -> None:
        self._marks = hidden
        self._held = ""

    def feed(self, text: str) -> str:
        text = self._held + text
        shown, at = [], 0
        while found := self._marks.find(text, at):
            shown.append(text[at : found.start()])
            at = found.end()
        rest = text[at:]
        end = len(rest) - self._marks.num_held(rest)
        self._held = rest[end:]
        return "".join([*shown, rest[:end]])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held
