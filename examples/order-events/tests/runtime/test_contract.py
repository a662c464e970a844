# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The contract of every broker, on real servers: the same tests for each of them.

A test of a capability that the broker declares as missing is skipped, with that reason.
"""

import time
from collections import Counter
from collections.abc import Callable

import pytest

from harness.contract import (
    Connect,
    Counted,
    ack,
    as_promised,
    eventually,
    ids,
    length_of,
    need,
    publish,
    take,
)
from harness.servers import Server
from runtime.brokers.source import Source
from runtime.message import OutgoingMessage

RETRY_SECONDS = 0.2
LONG_RETRY_SECONDS = 0.4
SETTINGS = {"retry_seconds": 0.1, "retry_max_seconds": LONG_RETRY_SECONDS}


@pytest.fixture
async def connect(connect: Connect, source_for: Callable[..., Source], broker: Server) -> Connect:
    """To a queue that a consumer has started on once, so that each broker retains the published messages."""
    await broker.introduce_consumer(source_for().settings)
    return connect


# -- delivery


async def test_an_acknowledged_message_is_gone(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=10) as source:
        published = await publish(source, 3)
        messages = await take(source, 3)
        assert as_promised(source, ids(messages)) == as_promised(source, published)
        await ack(source, messages)
    await counted()


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


# -- failures


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


async def test_a_rejected_message_is_one_dead_letter_with_its_reason(
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
        await eventually(1, source.count_dead_letters)  # listing removes none


# -- shutdown


async def test_stop_requeues_untaken_messages_and_ends_deliveries(connect: Connect) -> None:
    published: list[str] = []

    async def others_get_everything() -> None:
        async with connect(prefetch=12) as other:
            messages = await take(other, 12)
            assert Counter(ids(messages)) == Counter(published)
            assert {message.attempt for message in messages} == {1}
            await ack(other, messages)

    async with connect(prefetch=0) as publisher:
        async with connect(prefetch=10) as one:
            published += await publish(publisher, 10)
            await eventually(10, length_of(one.buffer))
            await one.stop()
            published += await publish(publisher, 2)
            with pytest.raises(StopAsyncIteration):
                await anext(one)
            assert one.requeued_count == 10
            if one.capabilities.requeue:
                await others_get_everything()  # the first is still connected
        if not one.capabilities.requeue:
            await others_get_everything()


# -- operating


async def test_replayed_dead_letters_are_new_messages(connect: Connect, counted: Counted) -> None:
    async with connect(prefetch=3) as source:
        need(source, "dead_letters")
        await publish(source, 3, type="kind", headers={"trace": "t"})
        rejected = await take(source, 3)
        for message in rejected:
            await source.reject(message, "bad")
        await counted(dead=3)
        progress = [moved async for moved in source.replay_dead_letters()]
        assert progress == sorted(progress)
        assert progress[-1] == 3
        messages = await take(source, 3)
        assert as_promised(source, ids(messages)) == as_promised(source, ids(rejected))
        for message in messages:
            assert (message.attempt, message.type) == (1, "kind")
            assert dict(message.headers) == {"trace": "t"}
            await source.ack(message)
    await counted()
