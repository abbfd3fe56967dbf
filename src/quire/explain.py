"""`quire explain`: asks a server why a request took its time, and prints what it says."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.text import Text

from quire.errors import ConfigError, RequestError


def ask(url: str, request_id: str, api_key: str | None = None) -> dict[str, Any]:
    """The explanation. Raises ConfigError if no server answers at `url`, RequestError if it does not know the request."""
    base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        path = f"{base}/v1/requests/{quote(request_id, safe='')}/explain"
        response = httpx.get(path, headers=headers, timeout=30.0)
        found = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"cannot ask {base}: {error or type(error).__name__}") from error
    except ValueError as error:
        raise ConfigError(f"what answers at {base} is no Quire server") from error
    if response.status_code != 200 or not isinstance(found, dict) or not isinstance(found.get("summary"), list):
        error_of = found.get("error") if isinstance(found, dict) else None
        message = error_of.get("message") if isinstance(error_of, dict) else f"status {response.status_code}"
        raise RequestError(f"{base} says: {message}")
    return found


def show(found: dict[str, Any]) -> None:
    """Its sentences, the first of them as a heading."""
    console = Console(highlight=False)
    heading, *others = map(str, found["summary"])
    console.print(Text(heading, style="bold"))
    for sentence in others:
        console.print(Text.assemble(("• ", "cyan"), sentence), soft_wrap=not console.is_terminal)
