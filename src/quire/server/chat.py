"""POST /v1/chat/completions: a conversation goes on. Knows the form of the answer; `generation.py` knows the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
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
from quire.server.tool_text import Marks
from quire.server.tools import FORMATS, Event, ToolFormat, ToolReader, format_of, gather

# Variables of chat templates that requests may set: switches that models document. Operators can add to them.
TEMPLATE_VARIABLES = frozenset({"enable_thinking", "thinking", "open_thinking", "reasoning_effort"})


async def create_chat_completion(service: Service, body: ChatRequest, http: Request) -> Response:
    """Raises ApiError or RequestError for what is wrong with the request."""
    record = http.state.record
    record.client_id = body.request_id
    service.check_model(body.model)
    body.refuse_what_is_missing()
    try:
        tools = _Tools.of(service, body)
        job = await unless_gone(http.receive, _prepare(service, body, record, tools))
        answer = _Answer(service, body, record, job, tools)
        if body.stream:
            record.is_streamed = True
            return await start_stream(http.receive, answer.events(), record)
        found = await unless_gone(http.receive, answer.whole())
    except ClientGoneError:
        record.error = "the client went away"
        return GoneResponse()
    return Response(msgspec.json.encode(found), media_type="application/json")


@dataclass(frozen=True, slots=True)
class _Tools:
    """How the answers to one request call tools.

    opening: what they begin with, so that they must; it stands at the end of the prompt. is_named: by the request's will.
    hidden: special tokens whose text is taken out here, since the markers of calls are special tokens too.
    """

    form: ToolFormat
    opening: str
    is_named: bool
    only_first: bool
    hidden: Marks | None = None
    keeps_special_tokens: bool = False

    @classmethod
    def of(cls, service: Service, body: ChatRequest) -> _Tools | None:
        """None if the request offers no tools. Raises ApiError if the model cannot be offered any."""
        offered = body.offered_tools
        if not offered:
            return None
        tokenizer = service.need_tokenizer("tools", "tools")
        parser = service.options.tool_call_parser
        template = tokenizer.chat_template_text(body.chat_template, with_tools=True)
        form = format_of(template) if parser == "auto" else FORMATS.get(parser)
        if form is None:
            reason = (
                "this server runs with --tool-call-parser none"
                if parser == "none"
                else "the chat template of this model teaches no form of tool calls that is known here (its operator can "
                "choose one: --tool-call-parser)"
            )
            raise ApiError(400, f"no tools can be called: {reason}", param="tools", code="unsupported_parameter")
        is_named = body.named_tool is not None
        opening = ""
        if is_named or body.tool_choice == "required":
            name = body.named_tool or (offered[0].function.name if len(offered) == 1 else None)
            opening = form.opening(name)
        special = {tokenizer.token(token_id) or "" for token_id in tokenizer.special_ids} - {""}
        markers = {form.opener, form.closer}
        keeps = bool(special & markers)
        hidden = Marks(special - markers) if keeps and body.skip_special_tokens is not False else None
        return cls(form, opening, is_named, is_named or body.parallel_tool_calls is False, hidden, keeps)

    def reader(self) -> ToolReader:
        return ToolReader(self.form, only_first=self.only_first, hidden=self.hidden, opening=self.opening)


async def encode_chat(
    service: Service, body: ChatRequest | TokenizeRequest, opening: str = ""
) -> tuple[str, list[int]]:
    """The prompt that the model's chat template makes of the messages, with `opening` behind it, and its tokens."""
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
    tools = [tool.for_template() for tool in body.offered_tools]

    def render() -> tuple[str, list[int]]:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=begins,
            continue_final_message=goes_on,
            tools=tools,
            chat_template=body.chat_template,
            **variables,
        )
        text += opening
        return text, tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))

    try:
        size = sum(len(str(message.get("content"))) for message in messages) + len(str(tools))
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


async def _prepare(service: Service, body: ChatRequest, record: Any, tools: _Tools | None) -> Job:
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.top_logprobs is not None and body.top_logprobs < 0:
        raise ApiError(400, f"top_logprobs must be at least 0, got {body.top_logprobs}", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed", param="prompt_logprobs")
    instead = {"max_tokens": asked, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if tools and tools.keeps_special_tokens:
        instead["skip_special_tokens"] = False
    params = service.sampling_params(body, _renamed(body), **instead)
    text, token_ids = await encode_chat(service, body, tools.opening if tools else "")
    token_ids = service.fit(token_ids, asked, body, "messages")
    return Job(0, f"{record.request_id}-0", text, token_ids, params, body.priority or 0, body.cache_salt)


class _Answer:
    """One call's answer: n messages to the same conversation."""

    def __init__(self, service: Service, body: ChatRequest, record: Any, job: Job, tools: _Tools | None) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._tools = tools
        self._readers: dict[int, ToolReader] = {}  # by choice
        self._run = Generation(service, record, [job], _renamed(body))
        self._id = "chatcmpl-" + record.request_id.removeprefix("req-")
        head = self._head("chat.completion.chunk")
        self._event_head = {**head, "usage": None} if body.includes_usage else head
        self._begun: set[int] = set()  # choices of a stream
        self._templates: dict[int, EventTemplate] = {}  # of what those send mostly: text alone

    async def whole(self) -> dict[str, Any]:
        (output,) = await self._run.results()
        choices = []
        for completion in output.outputs:
            content, calls = gather(self._read(completion))
            message: dict[str, Any] = {
                "role": "assistant",
                "content": None if calls and not content else content,
                "refusal": None,
                "annotations": [],
            }
            if calls:
                message["tool_calls"] = [
                    self._call(completion.index, index, name, arguments)
                    for index, (name, arguments) in enumerate(calls)
                ]
            choices.append({**self._choice(completion), "message": message})
        found = {**self._head("chat.completion"), "choices": choices, "usage": self._run.usage}
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = self._job.token_ids
        return found

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._run.batches()) as batches:
            async for batch in batches:
                events = [self._events_of(completion) for _, output in batch for completion in output.outputs]
                if self._run.is_over:
                    events.append(self._last_events())
                if written := b"".join(events):
                    yield written

    def _events_of(self, completion: CompletionOutput) -> bytes:
        """What there is to tell of a completion; nothing, if there is none."""
        index = completion.index
        if completion.finish_reason is None and (template := self._templates.get(index)) is not None:
            return template.fill(completion.text) if completion.text else b""
        choices = [] if index in self._begun else [self._first_choice(index)]
        self._begun.add(index)
        if choices and self._tools is None and not (self._body.logprobs or self._body.return_token_ids):
            (later,) = self._pieces(CompletionOutput(index, MARK, ()))
            self._templates[index] = EventTemplate({**self._event_head, "choices": [later]})
        choices += self._pieces(completion)
        return b"".join(event({**self._event_head, "choices": [choice]}) for choice in choices)

    def _last_events(self) -> bytes:
        if not self._body.includes_usage:
            return DONE
        return event({**self._event_head, "choices": [], "usage": self._run.usage}) + DONE

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
        """The chunks for what is new: text and calls if there are any to show, then the end if this is it."""
        deltas = [self._delta(completion.index, event) for event in self._read(completion)]
        choice = self._choice(completion)
        if not deltas and (choice["logprobs"] or "token_ids" in choice):
            # the text is held back: half a character, or what may become a stop string or a call
            deltas = [{"content": ""}]
        pieces = [{**choice, "delta": delta, "finish_reason": None, "stop_reason": None} for delta in deltas]
        if completion.finish_reason is not None:
            pieces.append({**choice, "delta": {}})
        for piece in pieces[1:]:  # tokens are told once
            piece["logprobs"] = None
            if "token_ids" in piece:
                piece["token_ids"] = []
        return pieces

    def _read(self, completion: CompletionOutput) -> Sequence[Event]:
        """What is new of text and calls."""
        if self._tools is None:
            return [completion.text] if completion.text else []
        reader = self._readers.get(completion.index)
        if reader is None:
            reader = self._readers[completion.index] = self._tools.reader()
        events = reader.feed(completion.text)
        return events if completion.finish_reason is None else [*events, *reader.finish()]

    def _delta(self, choice: int, event: Event) -> dict[str, Any]:
        if isinstance(event, str):
            return {"content": event}
        if event.name is None:
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
        call = self._call(choice, event.index, event.name, event.arguments)
        return {"tool_calls": [{"index": event.index, **call}]}

    def _call(self, choice: int, index: int, name: str, arguments: str) -> dict[str, Any]:
        assert self._tools is not None
        call_id = self._tools.form.call_id(self._id, choice, index)
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _finish_reason(self, completion: CompletionOutput) -> str | None:
        """That the model ended by itself is told as "tool_calls" if it has called; but as "stop", as OpenAI does, where the
        request named the function and there was nothing to decide."""
        reader = self._readers.get(completion.index)
        if reader is None or self._tools is None or self._tools.is_named or completion.finish_reason != "stop":
            return completion.finish_reason
        return "tool_calls" if reader.num_calls else "stop"

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            "logprobs": None,
            "finish_reason": self._finish_reason(completion),
            "stop_reason": completion.stop_reason,
        }
        if completion.beam_score is not None:
            choice["beam_score"], choice["cumulative_logprob"] = completion.beam_score, completion.cumulative_logprob
        if completion.logprobs and self._service.tokenizer is not None:
            choice["logprobs"] = chat_logprobs(
                self._service.tokenizer, completion.token_ids, completion.logprobs, self._body.top_logprobs or 0
            )
        if self._body.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
        return choice
