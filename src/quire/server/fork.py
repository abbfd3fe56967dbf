"""POST /v1/fork: branches of a completion that runs go on from where it is. The answer is that of /v1/completions, each choice
with the `request_id` of its branch, by which it can be forked again, ended, or asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from quire.engine.streams import Mailbox
from quire.errors import RequestError
from quire.sampling_params import RequestOutputKind
from quire.server.completions import Form, TextAnswer, respond
from quire.server.errors import ApiError, no_such_request
from quire.server.generation import Generation, Job, Service, rename
from quire.server.logs import RequestRecord
from quire.server.protocol import ForkRequest


async def create_fork(service: Service, body: ForkRequest, http: Request) -> Response:
    """Raises ApiError or RequestError for what is wrong with the request; then there is no branch."""
    record: RequestRecord = http.state.record
    service.check_model(body.model)
    body.refuse_what_is_missing()
    service.check_count(body.n, "n")
    if body.n is not None and body.n < 1:
        raise ApiError(400, f"n must be at least 1, got {body.n}", param="n")
    if body.append is not None and body.append_token_ids is not None:
        raise ApiError(400, "give append or append_token_ids, not both", param="append")
    parent, index = service.running(body.request_id, record.owner).choice(body.index)
    if parent.params.use_beam_search:
        raise ApiError(400, "a beam search cannot be forked: it forks itself", param="request_id")
    if body.append is not None:
        service.need_tokenizer("a text to append", "append")
    logprobs = parent.params.logprobs if body.logprobs is None else body.logprobs
    if logprobs is not None:
        service.need_tokenizer("logprobs", "logprobs")
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    changes = {**body.sampling_options(), "output_kind": kind}
    changes.pop("n", None)
    try:  # most of what is wrong with them is known here; where the parent is, the engine knows
        params = replace(
            parent.params, **{"n": 1, "best_of": None, "min_tokens": 0, "prompt_logprobs": None, **changes}
        )
    except RequestError as error:
        raise rename(error, _renamed(body)) from error
    text = body.append if body.append is not None else str(body.append_token_ids or "")  # for the log
    jobs = [
        Job(number, f"{record.request_id}-{number}", text, [], params, parent.priority, is_branch=True)
        for number in range(body.n or 1)
    ]

    async def fork(mailbox: Mailbox) -> None:
        try:
            await service.client.submit_fork(
                parent.request_id,
                {job.request_id: mailbox for job in jobs},
                append_tokens=body.append if body.append_token_ids is None else body.append_token_ids,
                sampling_params=changes,
                index=index,
                client=record.owner,
            )
        except RequestError as error:
            if error.param in ("request_id", "index"):  # it has ended meanwhile, or this choice of it has
                raise no_such_request(body.request_id) from error
            raise

    run = Generation(service, record, jobs, _renamed(body), fork=fork)
    form = Form(logprobs=logprobs, token_ids=bool(body.return_token_ids), usage=body.includes_usage)
    return await respond(TextAnswer(service, run, record, form), http, is_streamed=bool(body.stream))


def _renamed(body: ForkRequest) -> Mapping[str, Any]:
    """What becomes too long does so by what is appended, if anything is."""
    appended = "append" if body.append is not None else "append_token_ids"
    is_appended = body.append is not None or body.append_token_ids is not None
    return {"prompt": appended if is_appended else "request_id", "append": appended}
