"""Requests made up from the API's own description, most of them wrong: none is answered by a 5xx, none leaves anything."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

ERROR_KEYS = {"message", "type", "param", "code"}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_is_answered_by_a_5xx(server: Any, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 8
    statuses: set[int] = set()

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 50)
        response = case.call(timeout=60)
        assert response.status_code < 500, response.text
        assert response.headers["x-request-id"][0].startswith("req-")
        if response.status_code >= 400:
            assert response.json()["error"].keys() == ERROR_KEYS
        statuses.add(response.status_code)

    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to get wrong
        limits = settings(
            max_examples=60 if operation.body else 5,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        limits(given(case=operation.as_strategy(generation_mode=mode))(check))()
    assert 400 in statuses
    server.wait_until_empty()
    with server.http() as http:
        assert http.get("/health").status_code == 200
