"""Token ids of one sequence to text, as they come: what may be shown now, and where a stop string ends it.

Three things keep text back: half a UTF-8 character, the start of what may become a stop string, and nothing else. Text
once given out is never taken back. It does not know stop *tokens* (the core does), logprobs or requests.

    stop ["END"]      tokens "a E" → shown "a "   "N" → ""   "O" → "ENO"   " END" → " ", stopped
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from quire.engine.tokenizer import DecoderKind, Tokenizer
from quire.sampling_params import SamplingParams

# No UTF-8 character has more bytes, so no more tokens of a prompt can hold the start of one.
_MAX_CHAR_BYTES = 4
# How far back the window of a decoder that we do not know reaches.
_WINDOW_PRIME = 6
_REPLACEMENT = "\ufffd"


class StopMatch(NamedTuple):
    """A stop string was completed by the `num_tokens`-th token of an append; later ones do not belong to the sequence."""

    stop_string: str
    num_tokens: int


class TextStream(Protocol):
    """Tokens in, text out."""

    def push(self, token_id: int) -> str:
        """What this token adds to the text, possibly nothing yet."""

    def flush(self) -> str:
        """What is still held back, as it decodes if nothing follows."""


class IncrementalDetokenizer:
    """The text of one sequence.

    tokenizer: None for a model without one; then, and with params.detokenize off, the text stays empty.
    prompt_token_ids: the text continues this prompt: prompt and text put together read as the whole decoded at once.
    params: its stop strings, include_stop_str_in_output, min_tokens, skip_special_tokens. (spaces_between_special_tokens
    has no effect: the `tokenizers` library never puts any.)
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._stream: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = text_stream(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = params.stop_strings if self._stream else ()
        self._max_stop_chars = max(map(len, self._stops), default=1)
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._chunks: list[str] = []
        self._unsent = ""
        self._tail = ""  # the last characters, as far back as a stop string can reach
        self.num_tokens = 0
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All text so far, with what a stream still holds back for a stop string, without half a character."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0] if self._chunks else ""

    def append(self, new_token_ids: Sequence[int], stop_terminated: bool = False) -> StopMatch | None:
        """Take tokens. Returns the stop string that ends the sequence, if one does; then nothing may follow.

        stop_terminated: the last of them is a token that ended the sequence (an eos or a stop_token_ids token): it gives no
        text, unless include_stop_str_in_output. Of several stop strings the one that is complete first counts, the longest
        if they end together; a stop string that ends within the first min_tokens tokens does not.
        """
        assert self.stopped_by is None, "a sequence that stopped goes on"
        if self._stream is None:
            self.num_tokens += len(new_token_ids)
            return None
        silent_at = len(new_token_ids) - 1 if stop_terminated and not self._include_stop else -1
        for i, token_id in enumerate(new_token_ids):
            self.num_tokens += 1
            if i == silent_at or not (new := self._stream.push(token_id)):
                continue
            self._add(new)
            if not self._stops:
                continue
            if self.num_tokens > self._min_tokens and (stop := self._find_stop(len(new))):
                self._stream = None  # what it holds back comes after the stop string
                self.stopped_by = stop
                return StopMatch(stop, i + 1)
            self._tail = self._tail[-self._max_stop_chars :]
        return None

    def take_delta(self, finished: bool) -> str:
        """Text that is new since the last call and safe to show. finished: nothing follows, so nothing is held back."""
        if finished:
            self._finish()
        if finished or not self._stops:
            delta, self._unsent = self._unsent, ""
            return delta
        held = self._num_held()
        delta, self._unsent = self._unsent[: len(self._unsent) - held], self._unsent[len(self._unsent) - held :]
        return delta

    def shown_text(self, finished: bool) -> str:
        """All text that is safe to show: what the deltas up to now add up to, for streams that repeat it all."""
        if finished:
            self._finish()
            return self.text
        return self.text[: len(self.text) - self._num_held()]

    def _finish(self) -> None:
        if self._stream is not None:
            self._add(self._stream.flush())
            self._stream = None

    def _add(self, new: str) -> None:
        self._chunks.append(new)
        self._unsent += new
        if self._stops:
            self._tail += new

    def _find_stop(self, num_new: int) -> str | None:
        """The first stop string that ends within the last num_new characters; cuts the text there."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = self._tail.find(stop, max(0, len(self._tail) - num_new - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start, stop)
                best = found if best is None else min(best, found)
        if best is None:
            return None
        end, start, stop = best
        num_cut = len(self._tail) - (end if self._include_stop else start)
        text = self.text
        self._chunks = [text[: len(text) - num_cut]]
        self._unsent = self._unsent[: max(0, len(self._unsent) - num_cut)]
        return stop

    def _num_held(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        if not self._stops or self._include_stop or self.stopped_by is not None:
            return 0
        held = 0
        for stop in self._stops:
            # A whole stop string may stand in the text where min_tokens let it pass, so less than all of it counts.
            at = self._tail.find(stop[0], max(0, len(self._tail) - len(stop) + 1))
            while at >= 0 and not stop.startswith(self._tail[at:]):
                at = self._tail.find(stop[0], at + 1)
            if at >= 0:
                held = max(held, len(self._tail) - at)
        return min(held, len(self._unsent))


def text_stream(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> TextStream:
    """The stream that decodes what follows a prompt, by the kind of decoder that the tokenizer has."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
    prompt = [token_id for token_id in prompt_token_ids[-64:] if token_id not in skipped]
    if tokenizer.decoder_kind is DecoderKind.BYTE_LEVEL:
        return _ByteLevelStream(tokenizer, skipped, prompt)
    if tokenizer.decoder_kind is DecoderKind.BYTE_FALLBACK:
        return _ByteFallbackStream(tokenizer, skipped, prompt)
    return _WindowStream(tokenizer, skipped, prompt)


class _ByteLevelStream:
    """Every token is bytes, and the text is their UTF-8: a character may begin in one token and end in a later one."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt: Sequence[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside = False  # a character, whose bytes until now the decoder holds
        # A prompt may end inside a character. What it shows itself is not ours.
        for token_id in prompt[-_MAX_CHAR_BYTES:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if not self._is_inside:
            try:
                return data.decode()  # most tokens are whole characters, for which this is four times as fast
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self._is_inside = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallbackStream:
    """Tokens are text, or single bytes: a run of byte tokens is a piece of UTF-8 that a text token ends.

    Each character of a run is shown when it is complete, each byte that is part of none as U+FFFD. The library decodes a
    run as a whole instead, and turns all of it into U+FFFD if any byte is wrong; a stream cannot know that in time.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt: Sequence[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._run = b""
        self._strip = 0
        for token_id in prompt[-_MAX_CHAR_BYTES:]:
            self.push(token_id)
        # The space before the first word is only left out where a text begins.
        self._strip = 0 if prompt else tokenizer.stripped_spaces

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.byte_token_ids:
            self._run += piece
            return self._stripped(self._take_run(final=False))
        return self._stripped(self._take_run(final=True) + piece.decode())

    def flush(self) -> str:
        return self._stripped(self._take_run(final=True))

    def _take_run(self, final: bool) -> str:
        """Text of the run as far as it is decided: all of it if final."""
        text = ""
        while self._run:
            try:
                whole, self._run = self._run, b""
                return text + whole.decode()
            except UnicodeDecodeError as error:
                text += whole[: error.start].decode()
                if error.reason == "unexpected end of data" and not final:
                    self._run = whole[error.start :]
                    return text
                text += _REPLACEMENT * (error.end - error.start)
                self._run = whole[error.end :]
        return text

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            self._strip -= 1
            if text[0] != " ":
                self._strip = 0
            else:
                text = text[1:]
        return text


class _WindowStream:
    """Any decoder: the text of a window of tokens, less the text of the part of it that has been given out.

    The window starts where the last text was given out, so it stays a few tokens long. What ends in U+FFFD waits for the
    rest of its character, but for no longer than a character can last.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt: Sequence[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._ids = list(prompt[-_WINDOW_PRIME:])
        self._given = len(self._ids)  # _ids[:_given] have been given out

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        return self._take(final=False)

    def flush(self) -> str:
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], skip_special_tokens=False)
        after = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        waiting = len(self._ids) - self._given
        if len(after) <= len(before):
            return ""
        if after.endswith(_REPLACEMENT) and waiting < _MAX_CHAR_BYTES and not final:
            return ""
        self._ids, self._given = self._ids[self._given :], waiting
        return after[len(before) :]
