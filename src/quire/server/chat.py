"""POST /v1/chat/completions: a conversation goes on. Knows the form of the answer; `generation.py` knows the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.errors import QuireError, RequestError
from quire.outputs import CompletionOutput
from quire.server.errors import ApiError
from quire.server.generation import FINGERPRINT, THREAD_CHARS, Generation, Job, Service, rename
from quire.server.logprobs import chat_logprobs, prompt_logprobs
from quire.server.protocol import ChatRequest, TokenizeRequest
from quire.server.streaming import DONE, ClientGoneError, GoneResponse, event, start_stream, unless_gone

# Variables of chat templates that requests may set: switches that models document. Operators can add to them.
TEMPLATE_VARIABLES = frozenset({"enable_thinking", "thinking", "open_thinking", "reasoning_effort"})


async def create_chat_completion(service: Service, body: ChatRequest, http: Request) -> Response:
    """Raises ApiError or RequestError for what is wrong with the request."""
    record = http.state.record
    record.client_id = body.request_id
    service.check_model(body.model)
    body.refuse_what_is_missing()
    try:
        answer = _Answer(service, body, record, await unless_gone(http.receive, _prepare(service, body, record)))
        if body.stream:
            record.is_streamed = True
            return await start_stream(http.receive, answer.events(), record)
        found = await unless_gone(http.receive, answer.whole())
    except ClientGoneError:
        record.error = "the client went away"
        return GoneResponse()
    return Response(msgspec.json.encode(found), media_type="application/json")


async def encode_chat(service: Service, body: ChatRequest | TokenizeRequest) -> tuple[str, list[int]]:
    """The prompt that the model's chat template makes of the messages, and its tokens."""
    tokenizer = service.need_tokenizer("chat", "messages")
    variables = dict(body.chat_template_kwargs or {})
    allowed = TEMPLATE_VARIABLES.union(service.options.chat_template_kwarg)
    for name, value in variables.items():
        if name not in allowed:
            raise ApiError(
                400,
                f"chat_template_kwargs may hold {', '.join(sorted(allowed))}, not {name[:100]!r}",
                param="chat_template_kwargs",
            )
        if not isinstance(value, bool | int | float | str | None):
            raise ApiError(400, f"chat_template_kwargs: {name} must be a plain value", param="chat_template_kwargs")
    if isinstance(body, ChatRequest) and body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    if body.chat_template is not None and not service.options.trust_request_chat_template:
        raise ApiError(
            400,
            "this server takes no chat templates from requests (its operator can allow them: "
            "--trust-request-chat-template)",
            param="chat_template",
        )
    goes_on = bool(body.continue_final_message)
    begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    messages = body.messages or []

    def render() -> tuple[str, list[int]]:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=begins,
            continue_final_message=goes_on,
            chat_template=body.chat_template,
            **variables,
        )
        return text, tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))

    try:
        size = sum(len(str(message.get("content"))) for message in messages)
        return await asyncio.to_thread(render) if size > THREAD_CHARS else render()
    except RequestError as error:
        raise rename(error, {"prompt": "messages"}) from error
    except QuireError:
        raise
    except Exception as error:  # a template is a program, and the messages are its input: it may raise anything
        text = f"the chat template fails on these messages: {type(error).__name__}: {error}"
        raise ApiError(400, text, param="messages") from error


def _renamed(body: ChatRequest) -> Mapping[str, str]:
    most = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    return {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": most}


async def _prepare(service: Service, body: ChatRequest, record: Any) -> Job:
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.top_logprobs is not None and body.top_logprobs < 0:
        raise ApiError(400, f"top_logprobs must be at least 0, got {body.top_logprobs}", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")
    instead = {"max_tokens": asked, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    params = service.sampling_params(body, _renamed(body), **instead)
    text, token_ids = await encode_chat(service, body)
    token_ids = service.fit(token_ids, asked, body, "messages")
    return Job(0, f"{record.request_id}-0", text, token_ids, params, body.priority or 0, body.cache_salt)


class _Answer:
    """One call's answer: n messages to the same conversation."""

    def __init__(self, service: Service, body: ChatRequest, record: Any, job: Job) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._run = Generation(service, record, [job], _renamed(body))
        self._id = "chatcmpl-" + record.request_id.removeprefix("req-")

    async def whole(self) -> dict[str, Any]:
        (output,) = await self._run.results()
        choices = []
        for completion in output.outputs:
            message: dict[str, Any] = {
                "role": "assistant",
                "content": completion.text,
                "refusal": None,
                "annotations": [],
            }
            choices.append({**self._choice(completion), "message": message})
        found = {**self._head("chat.completion"), "choices": choices, "usage": self._run.usage}
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = self._job.token_ids
        return found

    async def events(self) -> AsyncGenerator[bytes, None]:
        head = self._head("chat.completion.chunk")
        if self._body.includes_usage:
            head["usage"] = None
        begun: set[int] = set()
        async with aclosing(self._run.outputs()) as outputs:
            async for _, output in outputs:
                choices: list[dict[str, Any]] = []
                for completion in output.outputs:
                    if completion.index not in begun:
                        begun.add(completion.index)
                        choices.append(self._first_choice(completion.index))
                    choices += self._pieces(completion)
                if choices:
                    yield b"".join(event({**head, "choices": [choice]}) for choice in choices)
        if self._body.includes_usage:
            yield event({**head, "choices": [], "usage": self._run.usage})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._run.created,
            "model": self._service.name,
            "system_fingerprint": FINGERPRINT,
            "service_tier": None,
        }

    def _first_choice(self, index: int) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._job.token_ids
        return choice

    def _pieces(self, completion: CompletionOutput) -> Sequence[dict[str, Any]]:
        """The chunks for what is new: text if there is any to show, then the end if this is it."""
        choice = self._choice(completion)
        is_last = completion.finish_reason is not None
        end = {**choice, "delta": {}}
        if not (completion.text or choice["logprobs"] or "token_ids" in choice):
            return [end] if is_last else []  # the text is held back: half a character, or what may become a stop string
        piece = {**choice, "delta": {"content": completion.text}, "finish_reason": None, "stop_reason": None}
        if "token_ids" in end:
            end["token_ids"] = []
        return [piece, {**end, "logprobs": None}] if is_last else [piece]

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs and self._service.tokenizer is not None:
            choice["logprobs"] = chat_logprobs(
                self._service.tokenizer, completion.token_ids, completion.logprobs, self._body.top_logprobs or 0
            )
        if self._body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
        return choice
