"""`quire bench startup`: from the command to the first token, each time in a fresh process: cold and warm, offline and serving.

*Cold* is an empty cache of compiled kernels (Triton's, and that of the C kernels); *warm* is the same again with what the
cold one left. Files may be in the machine's memory both times. Offline is a script that makes an engine, broken down; serving
is `quire serve`, until /health says that it is well and until a first token from there on.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire.bench.report import add_report_arguments, report
from quire.config import EngineConfig
from quire.errors import ConfigError

HELP = "from the command to the first token, with cold and warm caches, offline and serving"
SERVED_NAME = "startup"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from quire.bench.subject import add_model_arguments

    what = parser.add_argument_group("workload")
    what.add_argument("--input-len", type=int, default=16, help="tokens of the first prompt (16)")
    what.add_argument(
        "--server", action=argparse.BooleanOptionalAction, default=importlib.util.find_spec("fastapi") is not None,
        help="also start `quire serve` (default: if its libraries are installed)",
    )  # fmt: skip
    what.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for each start (300)")
    add_report_arguments(parser)
    add_model_arguments(what, parser)


def run(args: argparse.Namespace) -> int:
    from quire.bench.subject import chosen_config

    if args.input_len < 1:
        raise ConfigError("--input-len must be positive")
    columns: dict[str, dict[str, float]] = {"cold": {}, "warm": {}}
    compiled: dict[str, dict[str, float]] = {}
    with chosen_config(args, 2048) as config:
        with tempfile.TemporaryDirectory() as cache:
            for name, column in columns.items():
                parts, compiled[name] = offline(config, args.input_len, Path(cache), args.timeout)
                column |= parts
        if args.server:
            with tempfile.TemporaryDirectory() as cache:
                for column in columns.values():
                    column |= serving(config, args.input_len, Path(cache), args.timeout)
    rows = [
        {"seconds": part, **{name: column.get(part) for name, column in columns.items()}} for part in columns["cold"]
    ]
    report(args, f"{args.shape or args.model}: from the command to the first token", rows, dtype=config.dtype,
           **{f"Triton, {name}": found for name, found in compiled.items() if any(found.values())})  # fmt: skip
    return 0


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "TRITON_CACHE_DIR": str(cache / "triton"), "QUIRE_CACHE": str(cache / "quire")}


def offline(
    config: EngineConfig, input_len: int, cache: Path, timeout_s: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part, their sum at the end, and what Triton compiled."""
    asked = json.dumps({"config": dataclasses.asdict(config), "input_len": input_len})
    began_s = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "quire.bench.first_token", repr(began_s)],
            input=asked, capture_output=True, text=True, env=_environment(cache), timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"the engine did not start within {timeout_s:g} s: --timeout") from error
    if done.returncode:
        raise ConfigError(f"the engine did not start: {_last_line(done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    parts: dict[str, float] = dict(found["parts"])
    total_s = found["end_s"] - began_s
    parts["not accounted for"] = total_s - sum(parts.values())
    parts["offline: from the command to the first token"] = total_s
    return parts, found["compiled"]


def serving(config: EngineConfig, input_len: int, cache: Path, timeout_s: float) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "quire", "serve", *engine_options(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
    body = {"model": SERVED_NAME, "prompt": [i % 16 for i in range(input_len)], "max_tokens": 1, "ignore_eos": True}
    with tempfile.TemporaryFile("w+") as log:
        began_s = time.perf_counter()
        server = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(cache))
        try:
            while not _is_answered(port, "GET", "/health", timeout_s=5.0):
                if server.poll() is not None or time.perf_counter() - began_s > timeout_s:
                    log.seek(0)
                    raise ConfigError(f"the server did not start: {_last_line(log.read())}")
                time.sleep(0.02)
            ready_s = time.perf_counter() - began_s
            if not _is_answered(port, "POST", "/v1/completions", body, timeout_s=timeout_s):
                log.seek(0)
                raise ConfigError(f"the server gave no token: {_last_line(log.read())}")
            first_s = time.perf_counter() - began_s - ready_s
        finally:
            _end(server)
    return {"serving: from the command to /health": ready_s, "serving: first token from there on": first_s}


def engine_options(config: EngineConfig) -> list[str]:
    """The command line's options for what isn't a default: ["--model", "...", "--dtype=bfloat16", "--no-enforce-eager"]."""
    options = ["--model", config.model]
    for field in dataclasses.fields(config)[1:]:
        value = getattr(config, field.name)
        if value != field.default:
            name = field.name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{name}" if value else f"--no-{name}")
            else:
                options.append(f"--{name}={json.dumps(dict(value)) if isinstance(value, Mapping) else value}")
    return options


def _is_answered(port: int, method: str, path: str, body: Any = None, *, timeout_s: float) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"content-type": "application/json"} if body is not None else {}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
