"""A server in a process of its own, as a user starts it: `quire serve` with a tiny random model and a real tokenizer."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from support import TINY_CONFIG, shared_data

LONG = 8192  # tokens: at a millisecond a step, a request that lasts


class Server:
    """`quire serve` with `options`, answering when this returns."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        common = ("--load-format", "dummy", "--num-threads", "1", "--port", "0", "--served-model-name", "tiny")
        command = [sys.executable, "-m", "quire", "serve", str(model), *common, *options]
        self._log = log
        with log.open("w") as file:
            # few arenas: what threads free is then seen by all, and resident memory tells a leak from a scattered heap
            environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        found = self.wait_for(lambda: re.search(r"serving .* at (http://\S+) after", self.log()), "an address")
        self.url: str = found[1]

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, look: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
        end = time.monotonic() + timeout_s
        while not (found := look()):
            assert time.monotonic() < end, f"waited in vain for {what}:\n{self.log()}"
            assert self.process.poll() is None or what == "the end", self.log()
            time.sleep(0.01)
        return found

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metrics(self, **options: Any) -> dict[str, float]:
        """Without the model's label: {'quire:kv_blocks{state="free"}': 512.0, …}"""
        with self.http(**options) as http:
            lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        pairs = (line.rsplit(" ", 1) for line in lines)
        return {re.sub(r',?model_name="[^"]*",?', "", name).replace("{}", ""): float(value) for name, value in pairs}

    def wait_until_empty(self) -> dict[str, float]:
        """Until no request is there; then nothing may be held."""

        def look() -> dict[str, float] | None:
            found = self.metrics()
            return found if found["quire:num_requests_running"] + found["quire:num_requests_waiting"] == 0 else None

        found = self.wait_for(look, "no request")
        free, cached = found['quire:kv_blocks{state="free"}'], found['quire:kv_blocks{state="cached"}']
        assert free + cached == found["quire:kv_blocks_all"]
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, the minimind tokenizer, and its chat template."""
    source = shared_data("tokenizers/minimind")
    directory = tmp_path_factory.mktemp("model") / "tinychat"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, directory / name)
    config = {**TINY_CONFIG, "vocab_size": 6400, "max_position_embeddings": LONG}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def make_server(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*options: str, model: Path = chat_model) -> Server:
        made.append(Server(model, tmp_path_factory.mktemp("log") / "serve.log", *options))
        return made[-1]

    yield make
    for server in made:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(make_server: Callable[..., Server]) -> Server:
    return make_server("--max-num-seqs", "16", "--num-gpu-blocks-override", "4096")


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as made:
        yield made
