"""Messages that handlers publish, on every broker: confirmed before the ack, and with the same id each time."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from consumer_harness import AT_ONCE, ConsumerHarness, Number, consume, done, numbers
from following import Next
from harness.contract import opened
from harness.scene import Scene, assert_clean_shutdown, wait_until
from harness.servers import Server
from harness.servers.proxy import Proxy
from other_clients import READERS, read
from processes import MISBEHAVING
from rabbitmq_client import open_channel, publish_raw
from refusing import REFUSING, Refusing
from runtime.brokers import make_source
from runtime.message import Failed, Message, OutgoingMessage
from runtime.settings import ConsumerSettings
from steps import over_the_network, start_once

rabbitmq = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True, scope="session")
CREATES_DESTINATIONS = {"postgres", "sqlite"}
"""Brokers on which a destination need not exist before."""
DROPS_REPEATED = {"nats"}
"""Brokers that store one of several messages with the same id."""


class Doubled(BaseModel):
    number: int


@pytest.fixture
async def following(
    broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> AsyncIterator[Next]:
    following = Next(settings_for(source=f"{queue}-next"))
    await following.declare()
    yield following
    await asyncio.to_thread(broker.delete, following.settings.source)


@pytest.fixture
async def refusing(
    broker: Server, broker_name: str, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> AsyncIterator[Refusing]:
    """A destination that refuses every message."""
    async with opened(make_source(settings_for())):  # creates the tables, if there are any
        pass
    refuse = REFUSING[broker_name](broker, f"{queue}-refusing")
    refusing = await asyncio.to_thread(refuse.__enter__)
    if refusing.settings:  # another user of the same session
        async with opened(make_source(settings_for(**refusing.settings))) as source:
            await source.start()
            await source.stop()
    yield refusing
    await asyncio.to_thread(refuse.__exit__, None, None, None)


@pytest.fixture(autouse=True)
async def started_once(settings_for: Callable[..., ConsumerSettings]) -> None:
    """Starts a consumer once, so that each broker retains the messages that are published before the test's own."""
    await start_once(settings_for())


async def test_what_a_handler_returns_is_published_before_its_message_is_acknowledged(
    harness: ConsumerHarness, following: Next
) -> None:
    handled: list[Message] = []

    async def double(event: Number, message: Message) -> OutgoingMessage:
        handled.append(message)
        return OutgoingMessage(
            Doubled(number=2 * event.number),
            "doubled",
            headers={"tenant": "acme"},
            to=following.to,
        )

    await harness.run(numbers(3), done(3), message_type="n", handlers={"n": double})
    taken = {message.body: message for message in await following.take(3)}
    assert sorted(taken) == [b'{"number":0}', b'{"number":2}', b'{"number":4}']
    message = taken[b'{"number":4}']
    assert (message.type, message.content_type) == ("doubled", "application/json")
    assert message.headers["tenant"] == "acme"
    assert {m.correlation_id for m in taken.values()} == {m.id for m in handled}
    assert len({m.id for m in taken.values()}) == 3
    assert await asyncio.to_thread(lambda: harness.left) == (0, 0)


async def test_a_message_that_is_published_twice_has_the_same_id_twice(
    harness: ConsumerHarness, following: Next, broker_name: str
) -> None:
    async def publish_and_fail_once(event: Number, message: Message) -> list[OutgoingMessage]:
        await message.publish(OutgoingMessage(b"a", to=following.to))
        if message.attempt == 1:
            raise RuntimeError
        return [OutgoingMessage(b"b", to=following.to), OutgoingMessage(b"c", to=following.to)]

    handlers = {"n": publish_and_fail_once}
    await harness.run(numbers(1), done(1), message_type="n", handlers=handlers, **AT_ONCE)
    copies = 1 if broker_name in DROPS_REPEATED else 2
    taken = await following.take(copies + 2)
    ids: dict[bytes, set[str]] = {}
    for message in taken:
        ids.setdefault(message.body, set()).add(message.id)
    assert sorted(message.body for message in taken) == [b"a"] * copies + [b"b", b"c"]
    assert [len(ids[body]) for body in (b"a", b"b", b"c")] == [1, 1, 1]
    assert len(set.union(*ids.values())) == 3


async def test_what_a_handler_publishes_at_once_is_confirmed_while_it_runs(
    harness: ConsumerHarness, following: Next
) -> None:
    """Another service has handled it before this handler ends."""
    seen: list[bytes] = []

    async def publish_and_look(event: Number, message: Message) -> None:
        await message.publish(OutgoingMessage(event, to=following.to))
        seen.extend(one.body for one in await following.take())

    _, consumer = await harness.run(
        numbers(1), done(1), message_type="n", handlers={"n": publish_and_look}, max_attempts=1
    )
    assert (consumer.handled_count, seen) == (1, [b'{"number":0}'])


async def test_a_delay_is_kept_or_refused_in_one_sentence(
    harness: ConsumerHarness, following: Next, settings_for: Callable[..., ConsumerSettings]
) -> None:
    async def publish(event: Number) -> OutgoingMessage:
        return OutgoingMessage(event, to=following.to, delay_seconds=1)

    began = time.time()
    _, consumer = await harness.run(
        numbers(1), done(1), message_type="n", handlers={"n": publish}, max_attempts=1
    )
    if make_source(settings_for()).capabilities.delayed_publish:
        assert consumer.handled_count == 1
        assert [message.body for message in await following.take()] == [b'{"number":0}']
        assert time.time() - began >= 1
    else:
        [rejected] = harness.events("message_rejected")
        assert "this broker cannot delay a message" in rejected["reason"]


@pytest.mark.parametrize("to", ["nowhere:x", "x", ""])
async def test_an_unknown_kind_of_destination_is_one_sentence_in_the_dead_letter(
    harness: ConsumerHarness, settings_for: Callable[..., ConsumerSettings], to: str
) -> None:
    async def publish(event: Number) -> OutgoingMessage:
        return OutgoingMessage(b"x", to=to)

    _, consumer = await harness.run(
        numbers(1), done(1), message_type="n", handlers={"n": publish}, max_attempts=2, **AT_ONCE
    )
    assert (consumer.handled_count, consumer.rejected_count) == (0, 1)
    assert len(harness.events("message_retried")) == 1
    [rejected] = harness.events("message_rejected")
    known = next(iter(make_source(settings_for()).destinations.values()))
    wanted = f"unknown destination {to!r}; known are {known}" if to else "needs a destination"
    assert wanted in rejected["reason"]


async def test_a_message_is_retried_while_its_destination_does_not_exist(
    harness: ConsumerHarness, following: Next, broker_name: str
) -> None:
    if broker_name in CREATES_DESTINATIONS:
        pytest.skip(f"{broker_name} has every destination that it is asked for")

    async def publish(event: Number) -> list[OutgoingMessage]:
        there, missing = (
            OutgoingMessage(b"x", to=to) for to in (following.to, f"{following.to}-missing")
        )
        return [there, missing]

    _, consumer = await harness.run(
        numbers(1), done(1), message_type="n", handlers={"n": publish}, max_attempts=2, **AT_ONCE
    )
    assert (consumer.handled_count, consumer.rejected_count) == (0, 1)
    [rejected] = harness.events("message_rejected")
    assert "failed 2 times, last with Broker" in rejected["reason"]
    assert f"{following.settings.source}-missing" in rejected["reason"]


async def test_a_batch_says_which_of_its_messages_failed(
    harness: ConsumerHarness, following: Next
) -> None:
    async def odd_ones_fail(events: list[Number], messages: list[Message]) -> list[Any]:
        results: list[Any] = []
        for event, message in zip(events, messages, strict=True):
            if event.number % 2 and message.attempt == 1:
                results.append(Failed(message, ValueError(f"odd: {event.number}")))
            else:
                results.append(OutgoingMessage(event, to=following.to))
        return results

    _, consumer = await harness.run(
        numbers(4), done(4), message_type="n", handlers={"n": odd_ones_fail}, **AT_ONCE
    )
    reasons = sorted(event["reason"] for event in harness.events("message_retried"))
    assert reasons == ["ValueError: odd: 1", "ValueError: odd: 3"]
    bodies = sorted(message.body for message in await following.take(4))
    assert bodies == [b'{"number":%d}' % number for number in range(4)]
    assert consumer.handled_count == 4


async def test_a_handler_that_returns_anything_else_fails(harness: ConsumerHarness) -> None:
    async def count(event: Number) -> int:
        return 7

    _, consumer = await harness.run(
        numbers(1), done(1), message_type="n", handlers={"n": count}, max_attempts=1
    )
    assert consumer.rejected_count == 1
    [rejected] = harness.events("message_rejected")
    assert "the handler returned int" in rejected["reason"]


async def test_a_handler_that_is_stopped_publishes_within_the_drain_time(
    harness: ConsumerHarness, following: Next
) -> None:
    async def finish(event: Number, message: Message) -> OutgoingMessage:
        await message.stopping.wait()
        return OutgoingMessage(event, to=following.to)

    exit_code, consumer = await harness.run(
        numbers(1), lambda c: bool(c.in_flight), message_type="n", handlers={"n": finish}
    )
    assert (exit_code, consumer.handled_count, len(consumer.abandoned)) == (0, 1, 0)
    assert [message.body for message in await following.take()] == [b'{"number":0}']
    assert await asyncio.to_thread(lambda: harness.left) == (0, 0)


@over_the_network
async def test_what_could_not_be_published_in_an_outage_is_published_after_it(
    settings_for: Callable[..., ConsumerSettings],
    following: Next,
    proxy: Proxy,
    shorten: Callable[..., None],
) -> None:
    shorten(0.2, "FIRST_PAUSE_SECONDS", "LONGEST_PAUSE_SECONDS")
    settings = settings_for(broker_url=proxy.url, **AT_ONCE)
    calls: list[str] = []

    async def forward(body: bytes, message: Message) -> OutgoingMessage:
        if not calls:
            proxy.refuse()
            asyncio.get_running_loop().call_later(1, proxy.resume)
        calls.append(message.id)
        return OutgoingMessage(body, "next", to=following.to)

    async with opened(make_source(settings)) as publisher:
        await publisher.publish([OutgoingMessage(b"x", "n")])
    consumer = await consume(make_source(settings), settings, done(1), {"n": forward})
    assert (consumer.handled_count, consumer.rejected_count) == (1, 0)
    async with following.consuming() as source, asyncio.timeout(30):
        first = await anext(source)
        await source.ack(first)
    assert first.body == b"x"
    assert set(calls) == {first.correlation_id}


@pytest.mark.slow
def test_a_kill_between_publishing_and_the_ack_repeats_the_message_with_the_same_id(
    broker: Server, queue: str, tmp_path: Path, broker_name: str
) -> None:
    settings = ConsumerSettings.model_validate(
        {"broker_url": broker.url, "source": f"{queue}-next"}
    )
    following = Next(settings)
    asyncio.run(following.declare())
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        [task] = scene.publish(kind="forward", end="exit")
        variables: dict[str, Any] = {"HANDLERS": "forward", "FORWARD_TO": following.to}
        killed = scene.start(consuming=False, url=broker.impatient_url, **variables)
        assert killed.wait() == 137
        process = scene.start(url=broker.impatient_url, KILLED="yes", **variables)
        wait_until(lambda: task in scene.ledger.ended)
        assert_clean_shutdown(process)
        scene.assert_left()
    count = 1 if broker_name in DROPS_REPEATED else 2
    copies = asyncio.run(following.take(count))
    assert len({message.id for message in copies}) == 1
    assert [message.body for message in copies] == [task.encode()] * count
    broker.delete(settings.source)


@rabbitmq
async def test_a_full_destination_keeps_the_message_and_harms_no_other(
    harness: ConsumerHarness, following: Next, broker: Server, queue: str
) -> None:
    full = f"{queue}-full"
    async with open_channel(broker.url) as channel:
        arguments: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        await channel.declare_queue(full, durable=True, arguments=arguments)
        await publish_raw(channel, full)

        async def publish(event: Number) -> OutgoingMessage:
            to = f"queue:{full}" if event.number == 1 else following.to
            return OutgoingMessage(event, to=to)

        _, consumer = await harness.run(
            numbers(3), done(3), message_type="n", handlers={"n": publish}, max_attempts=1
        )
        await channel.queue_delete(full)
    assert (consumer.handled_count, consumer.rejected_count) == (2, 1)
    [rejected] = harness.events("message_rejected")
    assert "the queue refused the message: it is full" in rejected["reason"]
    assert len(await following.take(2)) == 2


async def test_what_a_destination_refuses_is_a_dead_letter_with_the_reason_and_harms_no_other(
    harness: ConsumerHarness, refusing: Refusing, following: Next, broker_name: str
) -> None:
    async def publish(event: Number) -> OutgoingMessage:
        if event.number == 1:
            return OutgoingMessage(refusing.body, to=refusing.to)
        return OutgoingMessage(event, to=following.to)

    settings = {**AT_ONCE, **refusing.settings, "max_attempts": 2}
    _, consumer = await harness.run(
        numbers(3), done(3), message_type="n", handlers={"n": publish}, **settings
    )
    assert (consumer.handled_count, consumer.rejected_count) == (2, 1)
    [retried], [rejected] = map(harness.events, ("message_retried", "message_rejected"))
    assert retried["message_id"] == rejected["message_id"]
    assert refusing.reason in rejected["reason"]
    taken = await following.take(2)
    assert sorted(message.body for message in taken) == [b'{"number":0}', b'{"number":2}']
    async with make_source(harness.make_settings(**settings)) as source:
        if source.capabilities.dead_letters:
            [letter] = [letter async for letter in source.dead_letters(2)]
            assert (letter.reason, letter.attempts) == (rejected["reason"], 2)


async def test_of_a_batch_only_the_message_fails_whose_own_one_cannot_be_sent(
    harness: ConsumerHarness, refusing: Refusing, following: Next
) -> None:
    async def publish(events: list[Number], messages: list[Message]) -> list[OutgoingMessage]:
        return [
            OutgoingMessage(refusing.body, to=refusing.to, caused_by=message)
            if event.number == 1
            else OutgoingMessage(event, to=following.to, caused_by=message)
            for event, message in zip(events, messages, strict=True)
        ]

    settings = {**AT_ONCE, **refusing.settings}
    settings |= {"max_attempts": 2, "batch_size": 3, "batch_seconds": 1}
    _, consumer = await harness.run(
        numbers(3), done(3), message_type="n", handlers={"n": publish}, **settings
    )
    assert (consumer.handled_count, consumer.rejected_count) == (2, 1)
    [rejected] = harness.events("message_rejected")
    assert refusing.reason in rejected["reason"]
    async with following.consuming() as source, asyncio.timeout(30):
        ids: dict[bytes, set[str]] = {}
        while len(ids) < 2:
            message = await anext(source)
            ids.setdefault(message.body, set()).add(message.id)
            await source.ack(message)
    assert {body: len(them) for body, them in ids.items()} == {
        b'{"number":0}': 1,
        b'{"number":2}': 1,
    }


@pytest.mark.parametrize(
    "hostile",
    [
        {"type": "\ud800 from JSON"},
        {"headers": {"no JSON": object()}},
        {"id": "i" * 300_000},
        {"delay_seconds": float("nan")},
    ],
    ids=["type", "headers", "id", "delay"],
)
async def test_a_result_that_cannot_be_sent_fails_its_own_message_only(
    harness: ConsumerHarness, following: Next, hostile: dict[str, Any]
) -> None:
    async def publish(event: Number) -> OutgoingMessage:
        return OutgoingMessage(event, to=following.to, **(hostile if event.number == 1 else {}))

    exit_code, consumer = await harness.run(
        numbers(3), done(3), message_type="n", handlers={"n": publish}, max_attempts=1
    )
    assert exit_code == 0
    assert consumer.handled_count >= 2
    bodies = {message.body for message in await following.take(consumer.handled_count)}
    assert bodies >= {b'{"number":0}', b'{"number":2}'}


async def test_one_object_may_be_returned_for_many_messages(
    harness: ConsumerHarness, following: Next
) -> None:
    ping = OutgoingMessage(b"ping", to=following.to)

    async def publish(event: Number) -> OutgoingMessage:
        return ping

    await harness.run(numbers(3), done(3), message_type="n", handlers={"n": publish})
    taken = await following.take(3)
    assert len({message.id for message in taken}) == 3
    assert len({message.correlation_id for message in taken}) == 3


async def test_a_batch_cannot_settle_a_message_of_another(harness: ConsumerHarness) -> None:
    async def fail_another(events: list[Number]) -> list[Failed]:
        return [Failed(Message(b"other"), ValueError("not mine"))]

    _, consumer = await harness.run(
        numbers(1), done(1), message_type="n", handlers={"n": fail_another}, max_attempts=1
    )
    assert (consumer.handled_count, consumer.rejected_count) == (0, 1)
    [rejected] = harness.events("message_rejected")
    assert "a message that is not of its batch" in rejected["reason"]


@rabbitmq
async def test_another_client_reads_what_a_handler_publishes(
    harness: ConsumerHarness, broker: Server, queue: str
) -> None:
    """Through a topic exchange, from which aio-pika alone reads."""

    async def publish(event: Number) -> OutgoingMessage:
        to = f"exchange:{queue}-events/number.doubled"
        return OutgoingMessage(
            Doubled(number=2), "doubled", headers={"tenant": "acme"}, to=to, key="k"
        )

    async with open_channel(broker.url) as channel:
        exchange = await channel.declare_exchange(f"{queue}-events", "topic")
        bound = await channel.declare_queue(f"{queue}-bound")
        await bound.bind(exchange, "number.*")
        await harness.run(numbers(1), done(1), message_type="n", handlers={"n": publish})
        seen = await bound.get()
        await seen.ack()
        await bound.delete()
        await exchange.delete()
    assert (seen.body, seen.type, seen.routing_key) == (
        b'{"number":2}',
        "doubled",
        "number.doubled",
    )
    assert (seen.content_type, seen.delivery_mode.value) == ("application/json", 2)
    assert seen.headers == {"tenant": "acme", "message-key": "k"}
    assert seen.message_id
    assert seen.correlation_id
    assert seen.timestamp is not None


@pytest.mark.parametrize("broker", [*READERS], indirect=True, scope="session")
async def test_the_broker_s_other_clients_read_what_a_handler_publishes(
    harness: ConsumerHarness, following: Next, broker: Server, broker_name: str
) -> None:
    async def publish(event: Number, message: Message) -> OutgoingMessage:
        handled.append(message.id)
        headers = {"tenant": "acme"}
        return OutgoingMessage(
            Doubled(number=2), "doubled", headers=headers, to=following.to, key="k"
        )

    handled: list[str] = []
    await harness.run(numbers(1), done(1), message_type="n", handlers={"n": publish})
    seen = await read(broker_name, broker, following.settings.source)
    assert (seen.body, seen.type) == (b'{"number":2}', "doubled")
    assert seen.headers == {
        "tenant": "acme",
        "message-key": "k",
        "content-type": "application/json",
        "correlation-id": handled[0],
    }
    assert seen.id not in ("", handled[0])
