"""The engine's process, driven over a socket in this one."""

import socket

import pytest

from quire.config import EngineConfig
from quire.engine import process
from quire.engine.codec import HEADER_BYTES, Start, Stop, encode


@pytest.mark.parametrize(("messages", "status"), [([Start, Stop], 0), ([Stop], 2), ([], 2)])
def test_one_that_is_told_to_stop_before_it_is_built_builds_nothing(
    messages: list[type], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "Engine", lambda *args: pytest.fail("it was built"))
    ours, its = socket.socketpair()
    with ours, its:
        told = {Start: Start(EngineConfig(model="somewhere")), Stop: Stop()}
        ours.sendall(b"".join(encode(told[kind]) for kind in messages))
        if not messages:
            ours.shutdown(socket.SHUT_WR)
        assert process.serve(process.Channel(its)) == status
        its.close()
        assert ours.recv(HEADER_BYTES) == b""  # and says nothing
