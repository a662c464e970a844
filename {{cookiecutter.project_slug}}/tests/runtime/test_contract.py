# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The contract of every broker, on real servers: each runs the same tests.

A test of a capability that the broker declares as missing is skipped with that reason.
"""

import time
from collections.abc import Callable

import pytest

from harness.contract import Connect, Counted, eventually, need, take
from harness.servers import Server
from runtime.brokers.source import Source
from runtime.message import OutgoingMessage

RETRY_SECONDS = 0.2
LONG_RETRY_SECONDS = 0.4
SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": LONG_RETRY_SECONDS}


@pytest.fixture
async def connect(connect: Connect, source_for: Callable[..., Source], broker: Server) -> Connect:
    """Connect to a queue on which a consumer has started once, so that each broker retains published messages."""
    await broker.introduce_consumer(source_for().settings)
    return connect


@pytest.mark.parametrize(
    "body",
    [b"", b'{"n": 1}', bytes(range(256)), b"\x00" * 1_000_000],
    ids=["empty", "json", "binary", "1 MB"],
)
async def test_body_id_type_and_headers_survive(connect: Connect, body: bytes) -> None:
    headers = {"traceparent": "00-ab-01", "größe": "ü", "n": 7, "yes": True, "list": ["a", 1]}
    async with connect(prefetch=1) as source:
        if len(body) > (source.largest_body_bytes or len(body)):
            pytest.skip(f"this broker takes at most {source.largest_body_bytes} bytes")
        await source.publish([OutgoingMessage(body, "order_created", "id-7", headers)])
        (message,) = await take(source, 1)
        assert message.body == body
        assert (message.id, message.type, message.attempt) == ("id-7", "order_created", 1)
        assert dict(message.headers) == headers
        await source.ack(message)


@pytest.mark.slow
async def test_a_retry_is_redelivered_after_its_delay_and_counted(connect: Connect) -> None:
    async with connect(prefetch=2) as source:
        need(source, "delayed_retry")
        need(source, "attempts")
        await source.publish([OutgoingMessage(b"body", "kind", "id-1", {"trace": "t"})])
        (message,) = await take(source, 1)
        for attempt in (2, 3):
            retried_at = time.monotonic()
            await source.retry(message, RETRY_SECONDS, "not now")
            (message,) = await take(source, 1)
            assert time.monotonic() - retried_at >= RETRY_SECONDS * 0.98
            assert (message.id, message.attempt) == ("id-1", attempt)
            assert (message.body, message.type) == (b"body", "kind")
            assert message.headers["trace"] == "t"
        await source.ack(message)


async def test_a_rejected_message_is_one_dead_letter_with_its_reason_and_replayed_a_new_message(
    connect: Connect, counted: Counted
) -> None:
    async with connect(prefetch=1) as source:
        need(source, "dead_letters")
        await source.publish([OutgoingMessage(b"bad", "kind", "id-1", {"trace": "t"})])
        (message,) = await take(source, 1)
        before = time.time()
        await source.reject(message, "cannot be read: größe")
        await counted(dead=1)
        [letter] = [letter async for letter in source.dead_letters(10)]
        assert (letter.id, letter.type, letter.body) == ("id-1", "kind", b"bad")
        assert letter.reason == "cannot be read: größe"
        assert letter.attempts == 1
        assert before - 1 <= letter.dead_lettered_at <= time.time() + 1
        await eventually(1, source.count_dead_letters)  # listing deletes none
        assert [moved async for moved in source.replay_dead_letters()][-1:] == [1]
        (message,) = await take(source, 1)
        assert (message.body, message.type, message.attempt) == (b"bad", "kind", 1)
        assert dict(message.headers) == {"trace": "t"}
        await source.ack(message)
    await counted()
