"""`EngineChild`: the engine's process (`process.py`) as its parent sees it. Starts it, passes messages both ways, ends it.

Does not know what messages are about, but for the first two, nor when to start it again. For one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Mapping
from typing import Any

from quire.config import EngineConfig
from quire.engine.codec import HEADER_BYTES, Ready, Start, StartFailed, ToEngine, api_side, body_length, encode
from quire.errors import CapacityError, ConfigError, EngineDeadError, ModelError, QuireError, WeightsError

START_ERRORS: Mapping[str, type[QuireError]] = {
    kind.__name__: kind for kind in (ConfigError, ModelError, WeightsError, CapacityError)
}
# Of reports that this side has not read yet, before the engine waits for it: many steps', for they must not wait while this
# process is busy with a burst of new requests. (The system may allow less.)
SOCKET_BYTES = 1 << 20


class EngineChild:
    """One process at a time: `start`, `end`, and `start` again."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._decoder = api_side()

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        return None if self._process is None else self._process.pid

    async def start(self, config: EngineConfig) -> Ready:
        """Starts the process and waits until it can serve. Raises what `Engine` raises, EngineDeadError if it ends; it is to be
        ended then too."""
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        try:
            with theirs:
                # -P: what lies in the working directory is not ours to import
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "quire.engine.process", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=SOCKET_BYTES)
            self.send(Start(config))
            match await self.receive():
                case Ready() as ready:
                    return ready
                case StartFailed(kind=kind, message=message):
                    raise START_ERRORS.get(kind, QuireError)(message)
                case _:
                    raise EngineDeadError("the engine's process ended while it was starting: its messages are above")
        except BaseException:
            (self._writer or ours).close()  # a process that finds nobody there ends by itself
            raise

    def send(self, message: ToEngine) -> None:
        """Does not wait; what is sent to a process that is gone is lost."""
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> Any:
        """The next message, None when there are no more. Raises CodecError."""
        assert self._reader is not None
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            return self._decoder.decode(await self._reader.readexactly(body_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def end(self, patience_s: float) -> str:
        """Waits for the process to end, kills it if it does not. How it ended, in words."""
        process, writer = self._process, self._writer
        if process is None:
            return "its process is gone"
        try:
            await asyncio.wait_for(process.wait(), patience_s)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if writer is not None:
            writer.close()
        self._process = self._writer = None
        status = process.returncode
        assert status is not None
        return f"killed by signal {-status}" if status < 0 else f"its process ended with status {status}"
