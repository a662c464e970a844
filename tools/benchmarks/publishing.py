"""CPU time of publishing a message to RabbitMQ: the service's publisher beside the bare client's batched confirms.

Both publish batches of 100 persistent messages of 200 bytes to a quorum queue, and wait for the confirms of each batch.
Also the rate: to a quorum queue, a classic queue and a topic exchange, one batch or ten in flight at a time, with
the CPU time of both sides.
Also the whole path of a message, from its delivery through a handler that returns another to the ack, beside the
bare client: it takes the messages that have arrived, publishes them gathered, and acknowledges them together.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from pydantic import SecretStr

from harness.servers import ServerMissing, server_module
from runtime.brokers.rabbitmq import RabbitBroker
from runtime.cancellation import CancellationEvent
from runtime.consumer import Consumer
from runtime.handlers import Router
from runtime.message import OutgoingMessage
from runtime.settings import ConsumerSettings
from tools.benchmarks.figures import Figure
from tools.benchmarks.service import Unavailable

WORD = ": publishing"
"""A part of the name of each part about publishing, of every broker."""
PART = f"RabbitMQ{WORD}"
BATCH = 100
BODY = b"x" * 200
OURS = "a service's publisher"
BARE = "aio-pika, 100 publishes gathered"
THROUGH = "a service whose handler returns a message"
BARE_THROUGH = "aio-pika: delivery, publishes gathered, one ack"
AT_MOST = 1.0
IN_FLIGHT = (1, 10)
"""The batches in flight: so many handlers publish at a time."""
PLACES = {
    "a quorum queue": "queue:published",
    "a classic queue": "queue:classic",
    "a topic exchange of a quorum queue": "exchange:topic/order.created",
}
PER_SECOND = 10_000.0

Measured = tuple[float, float]
"""Microseconds of CPU per message, and messages per second."""
BothSides = tuple[float, float, float]
"""Also, first, the broker's microseconds."""


def measure(folder: Path, messages: int, rounds: int) -> Iterator[Figure]:
    """Raises Unavailable without a RabbitMQ."""
    try:
        with server_module("rabbitmq").private(folder) as server:
            values = asyncio.run(_measure(server.url, messages, rounds))
            rates = asyncio.run(_rates(server, messages, rounds))
    except ServerMissing as missing:
        raise Unavailable(str(missing)) from None
    part = f"{PART} {messages:,} messages of 200 bytes, {BATCH} at a time"
    for name, measured in values.items():
        cpu, per_second = zip(*measured, strict=True)
        yield Figure(part, name, [*cpu], "µs of CPU per message")
        yield Figure(part, f"{name}, rate", [*per_second], "messages per second")
    cpus = {name: [cpu for cpu, _ in measured] for name, measured in values.items()}
    for ours, bare in ((OURS, BARE), (THROUGH, BARE_THROUGH)):
        ratio = [own / other for own, other in zip(cpus[ours], cpus[bare], strict=True)]
        yield Figure(part, f"{ours} / {bare}", ratio, at_most=AT_MOST if ours == OURS else None)
    yield from _figures_of(rates)


def _figures_of(rates: dict[tuple[str, int, str], list[BothSides]]) -> Iterator[Figure]:
    for place, in_flight in dict.fromkeys((place, in_flight) for place, in_flight, _ in rates):
        plural = f"{in_flight} batches" if in_flight > 1 else "one batch"
        part = f"{PART} to {place}, {plural} of {BATCH} in flight"
        ours, bare = (rates[place, in_flight, who] for who in (OURS, BARE))
        yield from figures_of(part, BARE, in_flight, ours, bare)


def figures_of(
    part: str, bare: str, in_flight: int, ours: list[BothSides], theirs: list[BothSides]
) -> Iterator[Figure]:
    for who, measured in ((OURS, ours), (bare, theirs)):
        broker, client, per_second = zip(*measured, strict=True)
        target = PER_SECOND if who == OURS and in_flight > 1 else None
        yield Figure(part, f"{who}, rate", [*per_second], "per second", at_least=target)
        yield Figure(part, f"{who}, CPU of the client", [*client], "µs per message")
        if all(broker):
            yield Figure(part, f"{who}, CPU of the broker", [*broker], "µs per message")
    ratio = [one[1] / another[1] for one, another in zip(ours, theirs, strict=True)]
    yield Figure(part, f"{OURS} / {bare}, CPU of the client", ratio, at_most=AT_MOST)


async def _rates(
    server: Any, messages: int, rounds: int
) -> dict[tuple[str, int, str], list[BothSides]]:
    settings = ConsumerSettings(broker_url=SecretStr(server.url), source="published")
    rates: dict[tuple[str, int, str], list[BothSides]] = {}
    async with RabbitBroker(settings) as source, await aio_pika.connect(server.url) as connection:
        await source.declare()
        channel = await connection.channel()
        quorum: Any = {"x-queue-type": "quorum"}
        queues = [
            await channel.get_queue("published"),
            await channel.declare_queue("classic", durable=True),
            await channel.declare_queue("bound", durable=True, arguments=quorum),
        ]
        topic = await channel.declare_exchange("topic", aio_pika.ExchangeType.TOPIC, durable=True)
        await queues[2].bind(topic, "order.#")

        async def ours(to: str) -> None:
            await source.publish([OutgoingMessage(BODY, "t", to=to) for _ in range(BATCH)])

        async def bare(to: str) -> None:
            kind, _, name = to.partition(":")
            exchange = topic if kind == "exchange" else channel.default_exchange
            persistent = aio_pika.DeliveryMode.PERSISTENT
            publishing = (
                exchange.publish(
                    aio_pika.Message(BODY, type="t", delivery_mode=persistent),
                    name.rpartition("/")[2],
                )
                for _ in range(BATCH)
            )
            await asyncio.gather(*publishing)

        for to in PLACES.values():  # the first to an exchange are published on their own channels
            await ours(to)
            await bare(to)
        cases = [(place, n, who) for place in PLACES for n in IN_FLIGHT for who in (OURS, BARE)]
        for _ in range(rounds):
            for case in random.sample(cases, len(cases)):
                place, in_flight, who = case
                how = partial(ours if who == OURS else bare, PLACES[place])
                rates.setdefault(case, []).append(await timed(server, how, messages, in_flight))
                for queue in queues:
                    await queue.purge()
    return {case: rates[case] for case in cases}


async def timed(
    server: Any, publish: Callable[[], Awaitable[object]], messages: int, in_flight: int
) -> BothSides:
    """Publish with this many batches at a time."""
    pid = getattr(getattr(server.instance, "_process", None), "pid", 0)
    batches = max(1, messages // BATCH // in_flight)

    async def one_after_another() -> None:
        for _ in range(batches):
            await publish()

    broker, cpu, clock = _cpu_of(pid), time.process_time(), time.perf_counter()
    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))
    count = batches * in_flight * BATCH
    return ((_cpu_of(pid) - broker) * 1e6 / count, *_since(cpu, clock, count))


def _cpu_of(pid: int) -> float:
    """CPU seconds of this process and of those that it has started, if the system has /proc."""
    seconds: dict[int, float] = {}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat") if pid else ():
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            one = int(stat.parent.name)
            parents[one] = int(fields[1])
            seconds[one] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family, new = set[int](), {pid}
    while new:
        family |= new
        new = {one for one, parent in parents.items() if parent in new}
    return sum(seconds.get(one, 0.0) for one in family)


async def _measure(url: str, messages: int, rounds: int) -> dict[str, list[Measured]]:
    settings = ConsumerSettings(
        broker_url=SecretStr(url), source="published", concurrency=BATCH, prefetch=BATCH
    )
    incoming = settings.model_copy(update={"source": "incoming"})
    async with (
        RabbitBroker(incoming) as before,
        RabbitBroker(settings) as source,
        await aio_pika.connect(url) as connection,
    ):
        for each in (before, source):
            await each.declare()
        channel = await connection.channel()
        queue = await channel.get_queue(settings.source)

        def batch() -> list[OutgoingMessage]:
            return [OutgoingMessage(BODY, "t", to="queue:published") for _ in range(BATCH)]

        async def bare(count: int = BATCH) -> None:
            persistent = aio_pika.DeliveryMode.PERSISTENT
            publishing = (
                channel.default_exchange.publish(
                    aio_pika.Message(BODY, type="t", delivery_mode=persistent), "published"
                )
                for _ in range(count)
            )
            await asyncio.gather(*publishing)

        async def ours() -> None:
            await source.publish(batch())

        async def published(publish: Callable[[], Awaitable[None]]) -> Measured:
            cpu, clock = time.process_time(), time.perf_counter()
            for _ in range(messages // BATCH):
                await publish()
            return _since(cpu, clock, messages)

        async def through(consume: Callable[[], Awaitable[Measured]]) -> Measured:
            for _ in range(messages // BATCH):
                await before.publish([OutgoingMessage(BODY, "t") for _ in range(BATCH)])
            return await consume()

        contenders: dict[str, Callable[[], Awaitable[Measured]]] = {
            OURS: lambda: published(ours),
            BARE: lambda: published(bare),
            THROUGH: lambda: through(lambda: _handled(incoming, messages)),
            BARE_THROUGH: lambda: through(lambda: _handled_bare(url, bare, messages)),
        }
        values: dict[str, list[Measured]] = {name: [] for name in contenders}
        await bare()
        await ours()
        for _ in range(rounds):
            for name in random.sample(list(contenders), len(contenders)):
                values[name].append(await contenders[name]())
                await queue.purge()
    return values


async def _handled(settings: ConsumerSettings, messages: int) -> Measured:
    """Measured from the first message in its handler to the last."""
    event = CancellationEvent(asyncio.get_running_loop())
    times: list[float] = []
    count, measured = 0, (0.0, 0.0)

    async def handle(body: bytes) -> OutgoingMessage:
        nonlocal count, measured
        count += 1
        if count == 1:
            times.extend((time.process_time(), time.perf_counter()))
        if count == messages:
            measured = _since(times[0], times[1], messages)
            event.set("the last message")
        return OutgoingMessage(body, "t", to="queue:published")

    source = RabbitBroker(settings, BATCH)
    assert await Consumer(source, Router({"t": handle}), event, settings).run() == 0
    return measured


async def _handled_bare(
    url: str, publish: Callable[[int], Awaitable[None]], messages: int
) -> Measured:
    """Measured from the first delivery to the last ack."""
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=False)
        await channel.set_qos(BATCH)
        queue = await channel.get_queue("incoming")
        await queue.consume(arrived.put)
        last, count = await arrived.get(), 1
        cpu, clock = time.process_time(), time.perf_counter()
        while True:
            taken = 1
            while not arrived.empty():
                last, taken = arrived.get_nowait(), taken + 1
            await publish(taken)
            await last.ack(multiple=True)
            if (count := count + taken - 1) >= messages:
                return _since(cpu, clock, messages)
            last, count = await arrived.get(), count + 1


def _since(cpu: float, clock: float, messages: int) -> Measured:
    seconds = time.perf_counter() - clock
    return (time.process_time() - cpu) * 1e6 / messages, messages / seconds
