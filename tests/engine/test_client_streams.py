"""Streams and mailboxes: whose output is whose, by the ids of either side."""

import asyncio

import pytest

from quire.engine.streams import NUM_PAST, Mailbox, Streams
from quire.errors import EngineDeadError, RequestError


def test_an_id_comes_again_and_a_key_never_does() -> None:
    streams = Streams()
    first = streams.new("same", Mailbox())
    streams.open([first])
    with pytest.raises(RequestError, match="'same' is in use"):
        streams.new("same", Mailbox())
    assert streams.last_key("same") == first.key and streams.last_key("other") is None
    streams.close(first)
    assert streams.last_key("same") == first.key  # until there is a later one
    second = streams.new("same", Mailbox())
    streams.open([second])
    assert second.key != first.key and streams.last_key("same") == second.key
    assert list(streams.by_key) == [second.key]
    streams.close(second)
    assert streams.last_key("same") == second.key and not streams.by_id and not streams.by_key


def test_ids_that_look_like_keys_are_ids_like_others() -> None:
    streams = Streams()
    made = []
    for request_id in ("a", "a#0", "a#1", "a#0#1", ""):
        made.append(streams.new(request_id, Mailbox()))
        streams.open(made[-1:])
    assert len({stream.key for stream in made}) == len(made)


def test_of_what_is_over_the_last_are_known() -> None:
    streams = Streams()

    def pass_by(request_id: str) -> None:
        streams.open([stream := streams.new(request_id, Mailbox())])
        streams.close(stream)

    pass_by("twice")
    pass_by("once")
    for number in range(NUM_PAST - 2):
        pass_by(f"request-{number}")
    pass_by("twice")
    assert streams.last_key("once") is not None
    pass_by("one more")
    assert streams.last_key("once") is None and streams.last_key("twice") is not None


def test_a_reader_that_was_cancelled_leaves_the_mailbox_whole() -> None:
    async def main() -> None:
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        error = EngineDeadError("gone")
        mailbox.put(error)
        assert await mailbox.take() == [error]

    asyncio.run(main())
