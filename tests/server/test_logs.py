"""The line that a request leaves behind."""

import json
import logging

import pytest

from quire.server.logs import RequestLog, RequestRecord

RECORD = RequestRecord(
    request_id="req-1",
    method="POST",
    path="/v1/completions\nforged line",
    began_s=0.0,
    status=200,
    elapsed_s=1.5,
    client_id="its\nlabel",
    num_prompts=1,
    num_prompt_tokens=12,
    num_cached_tokens=8,
    num_output_tokens=34,
    first_token_s=0.25,
    finish_reasons=["stop"],
    prompts=["the prompt"],
    answers={"0.0": "the answer"},
)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("with_prompts", [False, True])
def test_a_record_is_one_line(caplog: pytest.LogCaptureFixture, as_json: bool, with_prompts: bool) -> None:
    with caplog.at_level(logging.INFO, "quire.requests"):
        RequestLog(enabled=True, as_json=as_json, with_prompts=with_prompts).write(RECORD)
    (message,) = caplog.messages
    assert "\n" not in message and "req-1" in message
    assert ("the prompt" in message) == ("the answer" in message) == with_prompts
    if as_json:
        found = json.loads(message)
        assert (found["prompt_tokens"], found["cached_tokens"], found["completion_tokens"]) == (12, 8, 34)
        assert found["finish_reasons"] == ["stop"] and found["first_token_s"] == 0.25


def test_machines_that_ask_all_the_time_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quire.requests"):
        log = RequestLog(enabled=True, as_json=False, with_prompts=False)
        log.write(RequestRecord("req-2", "GET", "/health", 0.0, status=200))
        log.write(RequestRecord("req-3", "GET", "/health", 0.0, status=503))
        RequestLog(enabled=False, as_json=False, with_prompts=False).write(RECORD)
    assert len(caplog.messages) == 1 and "req-3" in caplog.text
