"""The load generator's HTTP: bodies in any pieces, and errors that are errors."""

import asyncio

import pytest

from quire.bench.http import ChunkedDecoder, HttpError, Response, Target
from quire.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "host", "port", "is_tls", "prefix"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, False, ""),
        ("localhost:9", "localhost", 9, False, ""),
        ("https://example.org/v1/", "example.org", 443, True, ""),
        ("http://[::1]:80/models/a/v1", "::1", 80, False, "/models/a"),
    ],
)
def test_url(url, host, port, is_tls, prefix):
    target = Target.from_url(url, "key")
    assert (target.host, target.port, target.is_tls, target.prefix) == (host, port, is_tls, prefix)
    assert target.headers == {"Authorization": "Bearer key"}


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:port", "http://a:99999"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="url"):
        Target.from_url(url)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_are_put_together_however_they_arrive(size):
    text = b"data: one\n\ndata: two\n\n"
    body = (
        b"".join(b"%X;ext=1\r\n%b\r\n" % (len(part), part) for part in (text[:5], text[5:6], text[6:])) + b"0\r\n\r\n"
    )
    decoder = ChunkedDecoder()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    assert b"".join(map(decoder.feed, pieces)) == text
    assert decoder.is_complete


def test_what_is_no_chunk_is_an_error():
    with pytest.raises(HttpError, match="chunked"):
        ChunkedDecoder().feed(b"hello\r\n")


def response(body: bytes, **headers: str) -> Response:
    """With a body that has arrived whole; call it in a running loop."""
    reader = asyncio.StreamReader()
    reader.feed_data(body)
    reader.feed_eof()
    return Response(200, {name.replace("_", "-"): value for name, value in headers.items()}, reader)


async def events(answer: Response) -> list[bytes]:
    return [data async for _, data in answer.events()]


def test_events_are_lines_of_data():
    async def run():
        return await events(response(b": comment\r\n\r\nevent: x\ndata: one\r\n\r\ndata:two\n\ndata: torn"))

    assert asyncio.run(run()) == [b"one", b"two"]


@pytest.mark.parametrize("headers", [{"content_length": "9"}, {"transfer_encoding": "chunked"}])
def test_a_body_that_ends_early_is_an_error(headers):
    async def run():
        await response(b"5\r\nhe", **headers).read()

    with pytest.raises(HttpError, match="in the middle"):
        asyncio.run(run())


def test_a_body_of_known_length_ends_there():
    async def run():
        return await response(b"hello and more", content_length="5").read()

    assert asyncio.run(run()) == b"hello"
