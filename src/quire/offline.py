"""The batch job: a file of prompts in, a file of answers out, one line each, in the same order, in bounded memory.

    lines ──> Job.read ──> engine (so many at once that it stays full) ──> records in input order ──> output, flushed

Every line of output carries a fingerprint of the job and of its input line. That is all that a job remembers: after a kill
at any moment, `Output.resume` cuts a torn last line, checks the others against the input, and the job goes on behind them.
What a line's answer depends on (its text, the options, the seed and its index) is the same whenever it runs.

Does not know the command line, nor what runs inside the engine.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from quire.config import EngineConfig
from quire.engine.input import numbered_seed
from quire.errors import CapacityError, ConfigError, RequestError
from quire.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from quire.sampling_params import RequestOutputKind, SamplingParams, over_recommended, recommended_sampling

if TYPE_CHECKING:  # they load torch; a job that is already done needs none
    from quire.engine.engine import Engine
    from quire.engine.llm import LLM
    from quire.engine.progress import GenerationProgress
    from quire.engine.tokenizer import Tokenizer

InputFormat = Literal["text", "jsonl"]
Record = dict[str, Any]

# In units of max_num_seqs. One more full batch waits in the engine, so that a row that gets free is filled at once.
# Answers behind a slow line wait for their turn; the second number bounds how many, the first one how many run.
IN_ENGINE = 2
UNWRITTEN = 16

# Engine options that change when and how fast something is computed, not what: a job may go on with other ones.
_ONLY_SPEED = frozenset(
    {"device", "attention_backend", "max_num_seqs", "max_num_batched_tokens", "max_steps_in_flight", "block_size"}
    | {"gpu_memory_utilization", "num_gpu_blocks_override", "swap_space", "preemption_mode", "enable_prefix_caching"}
    | {"enforce_eager", "num_threads"}
)
_LINE_PARAMS = frozenset(f.name for f in dataclasses.fields(SamplingParams)) - {"output_kind"}
_MIN_LOGPROB = -9999.0  # JSON has no infinity


# -- what is asked for -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Job:
    """What becomes of each line.

    sampling: what is asked for over the model's recommendations; a JSON line's own parameters come on top.
    input_format: "text" (a line is a prompt) or "jsonl": {"prompt": …}, {"prompt_token_ids": …} or {"messages": …}, with an
        "id" and sampling parameters if wanted. Other keys are the caller's own and are left alone.
    text_field: another key for the prompt's text; the three above are then not looked at.
    chat: a text is a user's message, sent through the chat template. system: the system message of each chat, and implies
        `chat`. with_token_ids: tell the tokens of answers too.
    """

    config: EngineConfig
    sampling: Mapping[str, Any] = field(default_factory=dict)
    input_format: InputFormat = "text"
    text_field: str | None = None
    chat: bool = False
    system: str | None = None
    with_token_ids: bool = False

    def __post_init__(self) -> None:
        if self.is_chat and self.config.skip_tokenizer_init:
            raise ConfigError("chat needs a tokenizer, and skip_tokenizer_init leaves it out")
        SamplingParams(**self.sampling)  # what is wrong for every line is told before anything runs

    @property
    def is_chat(self) -> bool:
        return self.chat or self.system is not None

    # -- identity
    @cached_property
    def _digest(self) -> str:
        told = {
            f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config) if f.name not in _ONLY_SPEED
        }
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        return _short_hash(json.dumps([told, own], sort_keys=True, default=str).encode())

    def fingerprint(self, line: bytes) -> str:
        """Of this job and a line of its input: "3f9a1c2b-77e0d1a4"."""
        return "-".join((self._digest, _short_hash(line.rstrip(b"\r\n"))))

    def seed(self, index: int) -> int:
        """For the draws of a line that names no seed itself: by the engine's seed and the line's place, whatever ran before."""
        return numbered_seed(self.config.seed, index)

    # -- a line
    def read(self, index: int, line: bytes) -> dict[str, Any]:
        """A line as keys and values. Raises RequestError if it isn't that."""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"not UTF-8: {error.reason} at byte {error.start}") from error
        if index == 0:
            text = text.removeprefix("\ufeff")  # some editors begin a file with a byte-order mark
        if self.input_format == "text":
            return {self.text_field or "prompt": text.rstrip("\r\n")}
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise RequestError(f"a line must be a JSON object, not {type(values).__name__}")
        return values

    def prompt(self, values: Mapping[str, Any], tokenizer: Tokenizer | None) -> str | dict[str, Any]:
        """What to send to the engine for a line. Raises RequestError."""
        keys = (self.text_field,) if self.text_field else ("prompt", "prompt_token_ids", "messages")
        given = [key for key in keys if values.get(key) is not None]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else f"has none of them, but {', '.join(values) or 'nothing'}"
            raise RequestError(f"a line needs one of {', '.join(keys)}; this one {found}", param="prompt")
        key, value = given[0], values[given[0]]
        if key == "prompt_token_ids" and not self.text_field:
            return {key: value}
        if key == "messages" and not self.text_field:
            return self._chat_prompt(value, tokenizer)
        if not isinstance(value, str):
            raise RequestError(f"{key} must be a text, not {type(value).__name__}", param="prompt")
        return self._chat_prompt([{"role": "user", "content": value}], tokenizer) if self.is_chat else value

    def _chat_prompt(self, messages: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
        if tokenizer is None:
            raise RequestError("messages need a tokenizer, and skip_tokenizer_init left it out", param="messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise RequestError("messages must be a list of objects", param="messages")
        if self.system is not None and not any(message.get("role") == "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        return {"prompt_token_ids": tokenizer.encode_chat(messages)}

    def params(self, base: SamplingParams, values: Mapping[str, Any], index: int) -> SamplingParams:
        """`base` with the line's own parameters, and always with a seed. Raises RequestError."""
        own = {name: values[name] for name in _LINE_PARAMS & values.keys() if name != self.text_field}
        params = replace(base, **own)
        return params if params.seed is not None else replace(params, seed=self.seed(index))


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


# -- from lines to records -----------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Line:
    """A line that was read and is not yet written. `head`: what its record begins with; `record`: None while it runs."""

    index: int
    fingerprint: str
    head: Record
    params: SamplingParams | None = None
    record: Record | None = None

    def fail(self, message: str) -> None:
        self.record = {**self.head, "error": message, "fingerprint": self.fingerprint}


def answer(job: Job, llm: LLM, lines: Iterator[tuple[int, bytes]], progress: GenerationProgress) -> Iterator[Record]:
    """Yields a record for each (index, line), in their order, each as soon as those before it are there.

    A line that cannot be served gives a record with "error". Raises what the engine raises for the job as a whole.
    """
    engine = llm.engine
    recommended = recommended_sampling(engine.model.generation)
    base = SamplingParams(**over_recommended(recommended, job.sampling))
    base = replace(base, output_kind=RequestOutputKind.FINAL_ONLY)
    most_running, most_unwritten = (times * engine.config.max_num_seqs for times in (IN_ENGINE, UNWRITTEN))
    running: dict[str, _Line] = {}
    unwritten: deque[_Line] = deque()
    is_read = False
    while True:
        while not is_read and len(running) < most_running and len(unwritten) < most_unwritten:
            if (item := next(lines, None)) is None:
                is_read = True
                break
            line = _start(job, engine, base, *item)
            unwritten.append(line)
            if line.record is None:
                running[str(line.index)] = line
            else:
                progress.advance(None)
        if not unwritten:
            return
        for output in engine.step() if running else ():
            line = running.pop(output.request_id)
            assert line.params is not None
            line.record = _record(job, line, output, has_text=engine.tokenizer is not None and line.params.detokenize)
            progress.advance(output)
        progress.show_usage(engine)
        while unwritten and (record := unwritten[0].record) is not None:
            unwritten.popleft()
            yield record


def _start(job: Job, engine: Engine, base: SamplingParams, index: int, raw: bytes) -> _Line:
    """Reads a line and gives it to the engine; a line that is wrong has its record already."""
    line = _Line(index, job.fingerprint(raw), {"index": index})
    try:
        values = job.read(index, raw)
        if values.get("id") is not None:
            line.head["id"] = values["id"]
        line.params = job.params(base, values, index)
        engine.add_request(str(index), job.prompt(values, engine.tokenizer), line.params)
    except RequestError as error:
        line.fail(str(error))
    return line


def _record(job: Job, line: _Line, output: RequestOutput, *, has_text: bool) -> Record:
    failed = [completion for completion in output.outputs if completion.finish_reason in ("error", "abort")]
    if failed:
        line.fail(f"the engine could not finish it: {failed[0].stop_reason or failed[0].finish_reason}")
        assert line.record is not None
        return line.record
    assert line.params is not None
    with_ids = job.with_token_ids or not has_text
    parts = [_completion(completion, has_text, with_ids) for completion in output.outputs]
    record: Record = line.head | (parts[0] if line.params.n == 1 else {"outputs": parts})
    record["num_prompt_tokens"] = len(output.prompt_token_ids or ())
    record["num_output_tokens"] = sum(len(completion.token_ids) for completion in output.outputs)
    record["num_cached_tokens"] = output.num_cached_tokens
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [entry and _logprobs(entry) for entry in output.prompt_logprobs]
    record["fingerprint"] = line.fingerprint
    return record


def _completion(completion: CompletionOutput, has_text: bool, with_ids: bool) -> Record:
    part: Record = {"text": completion.text} if has_text else {}
    if with_ids:
        part["token_ids"] = list(completion.token_ids)
    part["finish_reason"] = completion.finish_reason
    if completion.stop_reason is not None:
        part["stop_reason"] = completion.stop_reason
    if completion.logprobs is not None:
        part["logprobs"] = [_logprobs(entry) for entry in completion.logprobs]
    return part


def _logprobs(entry: TokenLogprobs) -> list[Record]:
    """The token itself first, then the likeliest others."""

    def one(token_id: int, found: Logprob) -> Record:
        known = {"token_id": token_id, "logprob": max(found.logprob, _MIN_LOGPROB), "rank": found.rank}
        return known if found.decoded_token is None else {"token": found.decoded_token, **known}

    return [one(token_id, found) for token_id, found in entry.items()]


# -- where records go ------------------------------------------------------------------------------------------------------
class Output:
    """Records as JSON lines into a stream, which cannot be gone on with. It owns the stream."""

    def __init__(self, stream: BinaryIO, name: str = "output") -> None:
        self.name = name
        self.num_lines = 0
        self._stream = stream

    def resume(self, job: Job, lines: Iterator[bytes]) -> int:
        """Takes from `lines` those that are answered here; returns how many of these had failed."""
        return 0

    def write(self, record: Record) -> None:
        """Appends a line and flushes it. Raises CapacityError if it has no room."""
        # JSON may spell half of a surrogate pair, which UTF-8 cannot: it goes back to the spelling \udxxx
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._stream.write(line)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CapacityError(f"cannot write to {self.name}: {error.strerror}") from error
        self.num_lines += 1

    def close(self) -> None:
        """Frees the stream, and with it a file's lock."""
        self._stream.close()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutputFile(Output):
    """Records in a file of one's own: locked against a second writer, and gone on with after a kill.

    restart: forget what is there. Raises ConfigError if the file cannot be written or another process does.
    """

    def __init__(self, path: str | Path, *, restart: bool = False) -> None:
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        except OSError as error:
            raise ConfigError(f"cannot open the output {path}: {error.strerror}") from error
        super().__init__(self._file, str(path))
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"another process is writing {path}: wait for it, or choose another output") from error
        if restart:
            self._file.truncate(0)

    def resume(self, job: Job, lines: Iterator[bytes]) -> int:
        """Keeps the complete lines, which must be answers of `job` to the first of `lines`, and cuts a torn one behind them.

        Raises ConfigError if they aren't; the file is then untouched.
        """
        num_failed = end = 0
        for kept in self._file:
            if not kept.endswith(b"\n"):
                # a file that this program never wrote may lack its last newline too
                start = b'{"index": %d' % self.num_lines
                if kept[: len(start)] != start[: len(kept)]:
                    raise self._refusal("is not a result of this command")
                break
            num_failed += self._check(job, kept, next(lines, None))
            self.num_lines += 1
            end += len(kept)
        self._file.seek(end)
        self._file.truncate()
        return num_failed

    def _check(self, job: Job, kept: bytes, line: bytes | None) -> bool:
        """Whether the answer is an error."""
        try:
            record = json.loads(kept)
            index, (digest, _) = record["index"], record["fingerprint"].split("-")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._refusal("is not a result of this command") from error
        if index != self.num_lines:
            raise self._refusal(f"has index {index}, not {self.num_lines}")
        if line is None:
            raise self._refusal("has no line in the input, which is shorter now")
        wanted = job.fingerprint(line)
        if record["fingerprint"] != wanted:
            same_job = wanted.startswith(f"{digest}-")
            raise self._refusal(
                "answers another prompt than that line of the input"
                if same_job
                else "was made with another model or other options"
            )
        return "error" in record

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f"cannot go on with {self.name}: its line {self.num_lines + 1} {what}; "
            "choose another output, or --restart to overwrite it"
        )


# -- the whole job -----------------------------------------------------------------------------------------------------------
@dataclass(slots=True, kw_only=True)
class Summary:
    """What a run did. Lines count the whole output, tokens and seconds this run alone; loading the model isn't in elapsed_s."""

    num_lines: int = 0
    num_kept: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    load_s: float = 0.0
    elapsed_s: float = 0.0
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens whose KV was found in the prefix cache."""
        return self.num_cached_tokens / max(self.num_prompt_tokens, 1)

    @property
    def kv_blocks_lost(self) -> int:
        """Blocks that nobody had given back when everything had ended. Anything but 0 is a bug."""
        return self.kv_blocks - self.kv_blocks_free - self.kv_blocks_cached

    def speed(self, num_tokens: int) -> float:
        """Tokens a second."""
        return num_tokens / max(self.elapsed_s, 1e-9)

    def take(self, record: Record) -> None:
        self.num_lines += 1
        self.num_failed += "error" in record
        self.num_prompt_tokens += record.get("num_prompt_tokens", 0)
        self.num_output_tokens += record.get("num_output_tokens", 0)
        self.num_cached_tokens += record.get("num_cached_tokens") or 0

    def take_engine(self, engine: Engine) -> None:
        """Of an engine that has ended all its requests."""
        pool = engine.kv.pool
        self.num_preemptions = engine.scheduler.counts.preemptions.total()
        self.kv_blocks, self.kv_blocks_cached = pool.num_blocks, pool.num_cached
        self.kv_blocks_free = pool.num_free - pool.num_cached

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "prompt_tokens_per_s": self.speed(self.num_prompt_tokens),
            "output_tokens_per_s": self.speed(self.num_output_tokens),
            "prefix_hit_rate": self.prefix_hit_rate,
            "kv_blocks_lost": self.kv_blocks_lost,
        }

    def describe(self) -> Sequence[str]:
        """Lines for people."""
        notes = [f"{self.num_kept:,} kept from before"] if self.num_kept else []
        notes += [f"{self.num_failed:,} failed"] if self.num_failed else []
        first = f"{self.num_lines:,} lines" + (f" ({', '.join(notes)})" if notes else "")
        if not self.kv_blocks:
            return [f"{first}; nothing was left to do"]
        return [
            f"{first} in {self.elapsed_s:.1f} s, after {self.load_s:.1f} s of loading",
            f"tokens: {self.num_prompt_tokens:,} in ({self.speed(self.num_prompt_tokens):,.0f}/s, "
            f"{self.prefix_hit_rate:.0%} found in the prefix cache), "
            f"{self.num_output_tokens:,} out ({self.speed(self.num_output_tokens):,.0f}/s); "
            f"{self.num_preemptions:,} preemptions",
            f"KV blocks: {self.kv_blocks_free:,} free + {self.kv_blocks_cached:,} cached = {self.kv_blocks:,} total"
            + (f" - {self.kv_blocks_lost:,} LOST" if self.kv_blocks_lost else ""),
        ]


def run(
    job: Job,
    lines: Iterable[bytes],
    output: Output,
    load: Callable[[], LLM],
    *,
    total: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Answers those of `lines` that `output` doesn't answer yet. `load` is called only if there are any.

    total: how many lines there are, for a progress bar. Raises ConfigError if `output` belongs to something else, and
    whatever `load` and the engine raise; what is written by then stays and can be gone on with.
    """
    lines = iter(lines)
    num_failed = output.resume(job, lines)
    summary = Summary(num_lines=output.num_lines, num_kept=output.num_lines, num_failed=num_failed)
    first = next(lines, None)
    if first is None:
        return summary
    from quire.engine.garbage import short_collections
    from quire.engine.progress import GenerationProgress

    began_s = clock()
    with load() as llm, short_collections():
        summary.load_s, began_s = clock() - began_s, clock()
        numbered = enumerate(itertools.chain([first], lines), start=output.num_lines)
        with GenerationProgress(total, show=True, done=output.num_lines) as progress:
            for record in answer(job, llm, numbered, progress):
                output.write(record)
                summary.take(record)
        while llm.engine.has_unfinished:  # steps in flight behind the last answer
            llm.engine.step()
        summary.elapsed_s = clock() - began_s
        summary.take_engine(llm.engine)
    return summary
