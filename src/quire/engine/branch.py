"""`Branch`: a request that was forked from another one, as its caller sees it. Does not know which engine runs it, or where."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from quire.outputs import RequestOutput


class Aborts(Protocol):
    """An engine, as far as a branch needs one."""

    async def abort(self, request_id: str) -> bool: ...


class Branch:
    """Its outputs, as an asynchronous stream, and its end. One whose outputs nobody reads runs nevertheless: kill it."""

    def __init__(self, request_id: str, engine: Aborts, outputs: AsyncGenerator[RequestOutput, None]) -> None:
        self.request_id = request_id
        self._engine = engine
        self.outputs = outputs

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self.outputs

    async def result(self) -> RequestOutput:
        """Its last output. For several: `await asyncio.gather(*(branch.result() for branch in branches))`."""
        last = None
        async for output in self.outputs:
            last = output
        assert last is not None, "its outputs have been read"
        return last

    async def close(self) -> None:
        """Reads no further, and ends it if it runs."""
        await self.outputs.aclose()  # does nothing for one that was never read
        await self.kill()

    async def kill(self) -> bool:
        """Ends it; its blocks are free as soon as no step in flight touches them. False if it has ended already."""
        return await self._engine.abort(self.request_id)
