"""One line for each request, for people or as JSON. No prompt and no answer is in it unless the operator asks for them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger("quire.requests")

QUIET_PATHS = ("/health", "/metrics")  # asked for every few seconds by machines


@dataclass(slots=True)
class RequestRecord:
    """What is known of one HTTP request when it ends. `request_id` is ours, `client_id` a label that the client chose, `owner`
    the name of its key, empty where none is asked for."""

    request_id: str
    method: str
    path: str
    began_s: float
    status: int = 0
    elapsed_s: float = 0.0
    owner: str = ""
    client_id: str | None = None
    is_streamed: bool = False
    num_prompts: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_s: float | None = None  # after the request's begin
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    prompts: list[str] = field(default_factory=list)  # empty unless --log-prompts
    answers: dict[str, str] = field(default_factory=dict)


class RequestLog:
    """Writes records to the logger "quire.requests"."""

    def __init__(self, *, enabled: bool, as_json: bool, with_prompts: bool) -> None:
        self.with_prompts = with_prompts
        self._enabled = enabled
        self._as_json = as_json

    def write(self, record: RequestRecord) -> None:
        level = logging.DEBUG if record.path in QUIET_PATHS and record.status < 400 else logging.INFO
        if not self._enabled or not logger.isEnabledFor(level):
            return
        logger.log(level, "%s", self._json(record) if self._as_json else self._text(record))

    def _json(self, record: RequestRecord) -> str:
        told: dict[str, Any] = {
            "request_id": record.request_id,
            "client_id": record.client_id,
            "owner": record.owner,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "elapsed_s": round(record.elapsed_s, 6),
        }
        if record.num_prompts:
            told |= {
                "stream": record.is_streamed,
                "prompts": record.num_prompts,
                "prompt_tokens": record.num_prompt_tokens,
                "cached_tokens": record.num_cached_tokens,
                "completion_tokens": record.num_output_tokens,
                "first_token_s": None if record.first_token_s is None else round(record.first_token_s, 6),
                "finish_reasons": record.finish_reasons,
            }
        if record.error:
            told["error"] = record.error
        if self.with_prompts and record.prompts:
            told |= {"prompt": record.prompts, "answer": list(record.answers.values())}
        return json.dumps(told)  # escapes what is not ASCII, so a line stays a line

    def _text(self, record: RequestRecord) -> str:
        path = record.path.encode("unicode_escape", "replace").decode()  # a path may hold line breaks
        parts = [f"{record.method} {path} {record.status} {record.elapsed_s:.3f}s {record.request_id}"]
        if record.owner:
            parts.append(f"owner={record.owner}")
        if record.client_id:
            parts.append(f"client={record.client_id!r}")
        if record.num_prompts:
            parts.append(
                f"in={record.num_prompt_tokens} cached={record.num_cached_tokens} out={record.num_output_tokens} "
                f"finish={','.join(record.finish_reasons) or '-'}"
            )
        if record.first_token_s is not None:
            parts.append(f"first={record.first_token_s:.3f}s")
        if record.error:
            parts.append(f"error={record.error!r}")
        if self.with_prompts and record.prompts:
            parts.append(f"prompt={record.prompts!r} answer={list(record.answers.values())!r}")
        return " ".join(parts)
