"""POST /v1/completions: prompts go on. Knows the form of the answer, streamed or whole; `generation.py` knows the rest."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from quire.server.errors import ApiError
from quire.server.generation import FINGERPRINT, Generation, Job, Service
from quire.server.logprobs import CompletionLogprobs, prompt_logprobs
from quire.server.logs import RequestRecord
from quire.server.protocol import CompletionRequest
from quire.server.streaming import (
    DONE,
    MARK,
    ClientGoneError,
    EventTemplate,
    GoneResponse,
    event,
    start_stream,
    unless_gone,
)

DEFAULT_MAX_TOKENS = 16


async def create_completion(service: Service, body: CompletionRequest, http: Request) -> Response:
    """Raises ApiError or RequestError for what is wrong with the request."""
    record = http.state.record
    record.client_id = body.request_id
    service.check_model(body.model)
    body.refuse_what_is_missing()
    try:
        jobs = await unless_gone(http.receive, _prepare(service, body, record))
    except ClientGoneError:
        record.error = "the client went away"
        return GoneResponse()
    form = Form(
        echo=bool(body.echo),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
        token_ids=bool(body.return_token_ids),
        usage=body.includes_usage,
        is_scoring=body.max_tokens == 0,
    )
    run = Generation(service, record, jobs, _renamed(body), hidden=form.is_scoring)
    return await respond(TextAnswer(service, run, record, form), http, is_streamed=bool(body.stream))


async def _prepare(service: Service, body: CompletionRequest, record: Any) -> list[Job]:
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    instead: dict[str, Any] = {"max_tokens": asked if asked else 1}
    if body.echo and body.logprobs is not None:
        instead["prompt_logprobs"] = body.logprobs
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed; echo with logprobs can", param="prompt_logprobs")
    if body.logprobs is not None or (body.echo and not isinstance(body.prompt, str)):
        service.need_tokenizer("logprobs and echo", "logprobs" if body.logprobs is not None else "echo")
    params = service.sampling_params(body, _renamed(body), **instead)
    prompts = _listed(body.prompt)
    if not 1 <= len(prompts) <= service.options.max_prompts:
        most = service.options.max_prompts
        raise ApiError(400, f"prompt must hold 1 to {most} prompts on this server, got {len(prompts)}", param="prompt")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await service.encode(texts, add_special_tokens=body.add_special_tokens is not False))
    jobs = []
    for number, prompt in enumerate(prompts):
        token_ids = next(encoded) if isinstance(prompt, str) else prompt
        fitted = service.fit(token_ids, body.max_tokens, body, "prompt")
        text = prompt if isinstance(prompt, str) and len(fitted) == len(token_ids) else None
        if text is None and body.echo:
            tokenizer = service.need_tokenizer("echo", "echo")
            text = tokenizer.decode(fitted, skip_special_tokens=body.skip_special_tokens is not False)
        request_id = f"{record.request_id}-{number}"
        jobs.append(Job(number, request_id, text, fitted, params, body.priority or 0, body.cache_salt))
    return jobs


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return prompt  # type: ignore[return-value]


def _renamed(body: CompletionRequest) -> dict[str, str]:
    return {"prompt_logprobs": "logprobs"} if body.echo and body.prompt_logprobs is None else {}


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer is to hold. is_scoring: a prompt alone is scored, by drawing one token of which nobody is told."""

    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    token_ids: bool = False
    usage: bool = False  # in a stream
    is_scoring: bool = False


async def respond(answer: TextAnswer, http: Request, *, is_streamed: bool) -> Response:
    """Gives the answer, and gives it up when its client goes away."""
    record: RequestRecord = http.state.record
    if is_streamed:
        record.is_streamed = True
        return await start_stream(http.receive, answer.events(), record)
    try:
        found = await unless_gone(http.receive, answer.whole())
    except ClientGoneError:
        record.error = "the client went away"
        return GoneResponse()
    return Response(msgspec.json.encode(found), media_type="application/json")


class TextAnswer:
    """One call's answer. Choice i of prompt p has the index p · n + i."""

    def __init__(self, service: Service, run: Generation, record: RequestRecord, form: Form) -> None:
        self._service = service
        self._run = run
        self._form = form
        self._n = run.jobs[0].params.n
        self._id = "cmpl-" + record.request_id.removeprefix("req-")
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by index
        self._begun: set[int] = set()  # choices of a stream, by index
        self._templates: dict[int, EventTemplate] = {}  # of what those send mostly: text, and token ids if asked for
        self._event_head = {**self._head(), "usage": None} if form.usage else self._head()

    async def whole(self) -> dict[str, Any]:
        choices = []
        for job, output in zip(self._run.jobs, await self._run.results()):
            for completion in output.outputs:
                text = (job.text or "") if self._form.echo else ""
                choice = self._choice(job, output, completion, text, is_first=True)
                if self._form.prompt_logprobs:
                    choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
                choices.append(choice)
        return {**self._head(), "choices": choices, "usage": self._run.usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._run.batches()) as batches:
            async for batch in batches:
                events = [
                    self._event(job, output, completion) for job, output in batch for completion in output.outputs
                ]
                if self._run.is_over:
                    events.append(self._last_events())
                if written := b"".join(events):
                    yield written

    def _event(self, job: Job, output: RequestOutput, completion: CompletionOutput) -> bytes:
        """What there is to tell of a completion; nothing, if there is none."""
        form, index = self._form, job.number * self._n + completion.index
        if completion.finish_reason is None and (template := self._templates.get(index)) is not None:
            if form.token_ids:
                return template.fill(completion.text, completion.token_ids)
            return template.fill(completion.text) if completion.text else b""
        is_first = index not in self._begun
        self._begun.add(index)
        if is_first and form.logprobs is None and not form.is_scoring:
            later = self._choice(job, output, CompletionOutput(completion.index, MARK, ()), "", is_first=False)
            if form.token_ids:
                later["token_ids"] = MARK
            self._templates[index] = EventTemplate({**self._event_head, "choices": [later]})
        text = (job.text or "") if form.echo and is_first else ""
        choice = self._choice(job, output, completion, text, is_first=is_first)
        is_empty = not (choice["text"] or choice["logprobs"] or choice["finish_reason"] or form.token_ids)
        return b"" if is_empty else event({**self._event_head, "choices": [choice]})

    def _last_events(self) -> bytes:
        if not self._form.usage:
            return DONE
        return event({**self._event_head, "choices": [], "usage": self._run.usage}) + DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._run.created,
            "model": self._service.name,
            "system_fingerprint": FINGERPRINT,
        }

    def _choice(
        self, job: Job, output: RequestOutput, completion: CompletionOutput, text: str, *, is_first: bool
    ) -> dict[str, Any]:
        """`text` comes before the completion's own."""
        index = job.number * self._n + completion.index
        finish_reason: str | None = completion.finish_reason
        token_ids, found = list(completion.token_ids), completion.logprobs
        if self._form.is_scoring:
            token_ids, found = [], None
            finish_reason = "length" if finish_reason else None
        else:
            text += completion.text
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs_of(index, job, output, token_ids, found, is_first),
            "finish_reason": finish_reason,
            "stop_reason": None if self._form.is_scoring else completion.stop_reason,
        }
        if completion.beam_score is not None:
            choice["beam_score"], choice["cumulative_logprob"] = completion.beam_score, completion.cumulative_logprob
        if job.is_branch:
            choice["request_id"] = job.request_id
        if self._form.token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = job.token_ids if is_first else None
        return choice

    def _logprobs_of(
        self,
        index: int,
        job: Job,
        output: RequestOutput,
        token_ids: list[int],
        found: Sequence[TokenLogprobs] | None,
        is_first: bool,
    ) -> dict[str, Any] | None:
        if self._form.logprobs is None:
            return None
        tokenizer = self._service.need_tokenizer("logprobs", "logprobs")
        writer = self._logprobs.setdefault(index, CompletionLogprobs(tokenizer, self._form.logprobs))
        positions: list[TokenLogprobs | None] = list(found or ())
        if self._form.echo and is_first:
            token_ids = job.token_ids + token_ids
            positions = list(output.prompt_logprobs or ()) + positions
        return writer.render(token_ids, positions) if token_ids else None
