"""`quire serve`: starts the engine's process and the HTTP server, and ends both in order.

At a signal it takes no new connections; what runs may finish until the deadline, and is told then. A second signal ends it
at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from quire.config import EngineConfig
from quire.engine.client import EngineClient
from quire.engine.tokenizer import Tokenizer
from quire.errors import ConfigError
from quire.server.app import create_app
from quire.server.generation import Service
from quire.server.keys import read_keys
from quire.server.metrics import ServerMetrics
from quire.server.options import ServerOptions

logger = logging.getLogger(__name__)

YOUNG_OBJECTS = 20_000  # made and not yet gone, before the collector looks for cycles among them
LAST_WORDS_S = 5.0  # for what was told that the server stops to reach its client


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are handled here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: EngineConfig, options: ServerOptions) -> None:
    """Serves until a signal comes. Raises what `Engine` raises, and ConfigError for an address that cannot be had."""
    with _listen(options) as listener:
        asyncio.run(serve(config, options, listener, lambda *_: _spare_collections()))


async def serve(
    config: EngineConfig,
    options: ServerOptions,
    listener: socket.socket,
    on_ready: Callable[[EngineClient, asyncio.Event], None] | None = None,
) -> None:
    """The same on a socket that is bound. `on_ready` is told when requests are answered, with an event that ends it."""
    began_s = time.monotonic()
    keys = read_keys(options)
    config = dataclasses.replace(config, client_weights=keys.with_weights(config.client_weights))
    logger.info("starting the engine for %s", config.model_name)
    client = EngineClient(config, stall_timeout_s=options.stall_timeout)
    info = await client.start()
    for part, seconds in info.parts:
        logger.info("engine: %s: %.1f s", part, seconds)
    try:
        loading_s = time.monotonic()
        tokenizer = Tokenizer.from_dir(info.tokenizer_dir) if info.tokenizer_dir else None
        names = tuple(options.served_model_name) or (config.model_name,)
        service = Service(client, tokenizer, options, names, ServerMetrics(client, names[0]))
        app = create_app(service, keys)
        logger.info("tokenizer and routes: %.1f s", time.monotonic() - loading_s)
        server = _Server(_uvicorn_config(app, options))
        ending = asyncio.Event()
        _handle_signals(server, ending)
        ender = asyncio.create_task(_end(server, client, ending, options.shutdown_timeout))
        listener.listen()  # who connects because of the next line is answered as soon as uvicorn runs
        host, port = listener.getsockname()[:2]
        logger.info(
            "serving %s at http://%s:%d after %.1f s%s",
            ", ".join(names),
            f"[{host}]" if ":" in host else host,
            port,
            time.monotonic() - began_s,
            "" if keys else "; no API key is asked for",
        )
        if on_ready is not None:
            on_ready(client, ending)
        await server.serve(sockets=[listener])
        ender.cancel()
    finally:
        await client.stop()
        logger.info("stopped")


def _spare_collections() -> None:
    """Of garbage, in a process that does nothing but serve: what is there now stays, so none is to walk through it; and what a
    step of many streams makes goes when it has been sent, and is no reason for one."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def _end(server: _Server, client: EngineClient, ending: asyncio.Event, deadline_s: float) -> None:
    await ending.wait()
    logger.info("stopping: what runs has %.0f s to finish", deadline_s)
    server.should_exit = True
    await asyncio.sleep(deadline_s)
    client.fail_all("the server is stopping")


def _handle_signals(server: _Server, ending: asyncio.Event) -> None:
    def handle() -> None:
        if ending.is_set():
            server.force_exit = True
        ending.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, handle)
        except (ValueError, RuntimeError, NotImplementedError):  # not in the main thread: whoever runs us ends us
            return


def _uvicorn_config(app: object, options: ServerOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(options.shutdown_timeout + LAST_WORDS_S),
    )


def _listen(options: ServerOptions) -> socket.socket:
    """Bound before the model is loaded: an address that is taken is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot serve at {options.host}:{options.port}: {error}") from error
    listener.set_inheritable(False)
    return listener
