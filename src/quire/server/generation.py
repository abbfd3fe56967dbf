"""One API call's requests to the engine: how they are prepared, run side by side, counted, and given up.

What completions and chat have in common. Does not know how an answer is written down.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from quire.engine.client import EngineClient
from quire.engine.streams import Mailbox
from quire.engine.tokenizer import Tokenizer
from quire.errors import EngineDeadError, QuireError, RequestError
from quire.outputs import RequestOutput
from quire.sampling_params import RequestOutputKind, SamplingParams, over_recommended
from quire.server.errors import (
    NOT_FOUND,
    ApiError,
    context_overflow,
    no_such_request,
    not_supported,
    queue_full,
    request_failed,
)
from quire.server.logs import RequestRecord
from quire.server.metrics import ServerMetrics
from quire.server.options import ServerOptions
from quire.server.protocol import GenerationRequest
from quire.version import __version__

FINGERPRINT = f"quire-{__version__}"
THREAD_CHARS = 4096  # tokenizing more than so many characters would hold up other clients' streams

# An API call is known by its x-request-id, req-HEX; its answer by cmpl-HEX or chatcmpl-HEX. Its requests to the engine are
# req-HEX-0, req-HEX-1, …: one for each prompt, or for each branch of a fork.
_PUBLIC_ID = re.compile(r"(?:req|cmpl|chatcmpl)-(?P<call>[0-9a-f]{32})(?:-(?P<number>0|[1-9][0-9]{0,5}))?")


def engine_id(request_id: str) -> str | None:
    """The request to the engine that a client's word for it means, the first of a call's; None if it can be none."""
    found = _PUBLIC_ID.fullmatch(request_id)
    return None if found is None else f"req-{found['call']}-{found['number'] or 0}"


@dataclass(frozen=True, slots=True)
class Running:
    """Requests that run, of one API call: all of them, or the one that was named."""

    jobs: Sequence[Job]

    def choice(self, index: int) -> tuple[Job, int]:
        """Whose is the choice with this index of the answer, and which of its completions? Raises ApiError."""
        n = self.jobs[0].params.n
        if index >= n * len(self.jobs):
            raise ApiError(400, f"index must be below {n * len(self.jobs)}, got {index}", param="index")
        return self.jobs[index // n], index % n


@dataclass(slots=True)
class Service:
    """What every handler works with: the model that is served, and by what rules."""

    client: EngineClient
    tokenizer: Tokenizer | None
    options: ServerOptions
    names: tuple[str, ...]
    metrics: ServerMetrics
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    calls: dict[str, tuple[str, Sequence[Job]]] = field(
        default_factory=dict
    )  # that run, by id: whose, and their requests

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def max_model_len(self) -> int:
        return self.client.info.max_model_len

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; {', '.join(self.names)} is",
                kind=NOT_FOUND,
                param="model",
                code="model_not_found",
            )

    def running(self, request_id: str, owner: str) -> Running:
        """By the id that a client knows. Raises ApiError, in the same words for what is unknown, finished, and another's."""
        found = _PUBLIC_ID.fullmatch(request_id)
        whose, jobs = self.calls.get(f"req-{found['call']}", ("", ())) if found else ("", ())
        if found and found["number"] is not None:
            jobs = jobs[int(found["number"]) :][:1]
        if not jobs or whose != owner:
            raise no_such_request(request_id)
        return Running(jobs)

    def need_tokenizer(self, what: str, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise not_supported(f"{what} without a tokenizer (skip_tokenizer_init left it out)", param)
        return self.tokenizer

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        if not texts:
            return []
        tokenizer = self.need_tokenizer("a text prompt", "prompt")

        def encode_all() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens) for text in texts]

        return await asyncio.to_thread(encode_all) if sum(map(len, texts)) > THREAD_CHARS else encode_all()

    def sampling_params(self, request: GenerationRequest, renamed: Mapping[str, str], **instead: Any) -> SamplingParams:
        """What was asked for, over what the model recommends. `renamed`: parameter -> the field that it came from."""
        self.check_count(request.n, "n")
        self.check_count(request.best_of, "best_of")
        info = self.client.info
        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        options = {**over_recommended(info.recommended, request.sampling_options()), **instead, "output_kind": kind}
        try:
            params = SamplingParams(**options)
            params.verify(vocab_size=info.vocab_size, max_model_len=info.max_model_len, max_logprobs=info.max_logprobs)
        except RequestError as error:
            raise rename(error, renamed) from error
        return params

    def check_count(self, count: int | None, field: str) -> None:
        if count is not None and count > self.options.max_n:
            most = self.options.max_n
            raise ApiError(400, f"{field} must be at most {most} on this server, got {count}", param=field)

    def fit(self, token_ids: list[int], asked: int | None, request: GenerationRequest, param: str) -> list[int]:
        """The prompt, cut as asked, if there is room for it and for `asked` tokens more. `param` is the prompt's field."""
        longest = self.max_model_len
        if (keep := request.truncate_prompt_tokens) is not None:
            if keep == -1:
                keep = max(longest - max(asked or 1, 1), 1)
            if keep < 1:
                raise ApiError(400, "truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")
            token_ids = token_ids[-keep:]
        if not token_ids:
            raise ApiError(400, "the prompt is empty: it needs at least one token", param=param)
        if len(token_ids) >= longest:
            raise context_overflow(
                f"this model's maximum context length is {longest} tokens; the prompt has {len(token_ids)}, and must leave "
                "room for at least one more",
                param,
            )
        if asked is not None and len(token_ids) + asked > longest:
            raise context_overflow(
                f"this model's maximum context length is {longest} tokens; {len(token_ids)} of the prompt and {asked} of "
                "the answer are more: shorten the prompt or ask for fewer",
                param,
            )
        return token_ids


def rename(error: RequestError, names: Mapping[str, str]) -> RequestError:
    return RequestError(str(error), param=names.get(error.param, error.param) if error.param else None)


def usage_of(num_prompt: int, num_cached: int, num_output: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


@dataclass(slots=True)
class Job:
    """One request to the engine: the `number`-th prompt of an API call, or branch of a fork."""

    number: int
    request_id: str
    text: str | None
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    is_branch: bool = False  # of a fork; its prompt is known with its first output
    # what was told of it so far
    num_cached: int = 0
    lengths: dict[int, int] = field(default_factory=dict)  # by choice
    told_s: float | None = None


class Generation:
    """Runs the jobs of one API call. `renamed` as in `Service.sampling_params`; `hidden`: tokens that are not told nor
    counted, which is how a prompt alone is scored; `fork` begins the branches that the jobs are, if that is what they are."""

    def __init__(
        self,
        service: Service,
        record: RequestRecord,
        jobs: Sequence[Job],
        renamed: Mapping[str, str],
        *,
        hidden: bool = False,
        fork: Callable[[Mailbox], Awaitable[None]] | None = None,
    ) -> None:
        self.jobs = jobs
        self.created = int(service.wall_clock())
        self._service = service
        self._record = record
        self._renamed = renamed
        self._hidden = hidden
        self._fork = fork
        self._num_left = len(jobs)
        record.num_prompts = len(jobs)
        record.num_prompt_tokens = sum(len(job.token_ids) for job in jobs)
        if service.options.log_prompts:
            record.prompts = [job.text if job.text is not None else str(job.token_ids) for job in jobs]

    @property
    def usage(self) -> dict[str, Any]:
        record = self._record
        return usage_of(record.num_prompt_tokens, record.num_cached_tokens, record.num_output_tokens)

    @property
    def is_over(self) -> bool:
        """All that there is has been given."""
        return not self._num_left

    async def results(self) -> list[RequestOutput]:
        """Each job's whole result, for parameters that ask for no increments."""
        found: dict[int, RequestOutput] = {}
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                found.update((job.number, output) for job, output in batch)
        return [found[job.number] for job in self.jobs]

    async def batches(self) -> AsyncGenerator[list[tuple[Job, RequestOutput]], None]:
        """What the engine gives, as it comes, of all jobs: a batch is what has come since the last one, usually of a step.
        Closing it, or cancelling who reads it, aborts what runs.

        Raises ApiError, RequestError or EngineDeadError; then all jobs are given up.
        """
        service, record = self._service, self._record
        by_id = {job.request_id: job for job in self.jobs}
        mailbox = Mailbox()
        has_failed = False
        service.calls[record.request_id] = record.owner, self.jobs
        try:
            await self._begin(mailbox)
            while not self.is_over:
                items, batch, error = await mailbox.take(), [], None
                now_s = service.clock()
                try:
                    for item in items:
                        if isinstance(item, Exception):
                            raise item
                        job = by_id[item.request_id]
                        self._note(job, item, now_s)
                        batch.append((job, item))
                except QuireError as raised:
                    error = raised  # what came before it is given first
                if batch:
                    yield batch
                if error is not None:
                    raise error
        except RequestError as error:
            has_failed = True
            raise rename(error, self._renamed) from error
        except (ApiError, EngineDeadError):
            has_failed = True
            raise
        finally:
            del service.calls[record.request_id]
            for job in self.jobs:
                service.client.drop(job.request_id, mailbox)
            if not (self.is_over or has_failed):
                service.metrics.aborted += len(self.jobs)

    async def _begin(self, mailbox: Mailbox) -> None:
        """Sends all jobs to the engine, or none. Raises ApiError if so many more are too many."""
        service, client = self._service, self._service.client
        # nothing may be awaited between this look and their start, so that a burst cannot slip through
        if client.num_queued(len(self.jobs)) > service.options.max_queue:
            raise queue_full(service.options.max_queue)
        if self._fork is not None:
            return await self._fork(mailbox)
        for job in self.jobs:
            prompt = {"prompt_token_ids": job.token_ids, "cache_salt": job.cache_salt}
            client.submit(job.request_id, mailbox, prompt, job.params, priority=job.priority, client=self._record.owner)

    def _note(self, job: Job, output: RequestOutput, now_s: float) -> None:
        """Counts what an output brings. Raises ApiError if the request has failed."""
        service, record = self._service, self._record
        if record.first_token_s is None:
            record.first_token_s = now_s - record.began_s
        if job.is_branch:
            # all branches have the same prompt, which counts once
            job.token_ids = list(output.prompt_token_ids or ())
            record.num_prompt_tokens = len(job.token_ids)
            record.num_cached_tokens = max(record.num_cached_tokens, output.num_cached_tokens or 0)
        elif output.num_cached_tokens and not job.num_cached:
            job.num_cached = output.num_cached_tokens
            record.num_cached_tokens += job.num_cached
        num_new = 0
        for completion in output.outputs:
            count = 0 if self._hidden else len(completion.token_ids)
            num_new += count
            job.lengths[completion.index] = job.lengths.get(completion.index, 0) + count
            if completion.finish_reason == "error":
                raise request_failed(str(completion.stop_reason))
            if completion.finish_reason is not None:
                record.finish_reasons.append(completion.finish_reason)
                service.metrics.finished[completion.finish_reason] += 1
            if record.prompts:
                key = f"{job.number}.{completion.index}"
                record.answers[key] = record.answers.get(key, "") + completion.text
        is_streamed = job.params.output_kind is RequestOutputKind.DELTA
        if is_streamed and job.told_s is not None and num_new:
            service.metrics.inter_token_s.observe(now_s - job.told_s, num_new)
        job.told_s = now_s
        record.num_output_tokens += num_new
        service.metrics.count_generated(record.owner, num_new)
        if output.finished:
            self._num_left -= 1
            self._finish(job, output, is_streamed)

    def _finish(self, job: Job, output: RequestOutput, is_streamed: bool) -> None:
        metrics = self._service.metrics
        metrics.count_prompt(self._record.owner, len(job.token_ids))
        if (times := output.metrics) is not None:
            if not is_streamed and times.first_token_time is not None:
                self._record.first_token_s = times.first_token_time - times.arrival_time
            metrics.observe(times, len(job.token_ids), list(job.lengths.values()), is_streamed)
